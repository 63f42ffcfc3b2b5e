"""Cut over ranks, heads keep their numbers and gates their units."""

import pytest
import torch
from torch import nn

from deltax import recipe


@pytest.mark.parametrize("whole", ["gpt+alibi", "gpt+swiglu+rms-norm", "gpt+rope"])
def test_cut_models_compute_what_whole_ones_do(whole):
    sizes = ["model.dim=24", "model.stack.depth=2"]
    heads = "model.stack.block.mixer{}.heads=4"
    ours = recipe(f"{whole}+megatron(ranks=4)", [*sizes, heads.format(".inner")])
    theirs = recipe(whole, [*sizes, heads.format("")])
    ours, theirs = (r().build({"vocab": 11, "context": 9}).double() for r in (ours, theirs))
    torch.manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.4)
    theirs.load_state_dict({k.replace(".inner.", "."): v for k, v in ours.state_dict().items()})
    tokens, weight = torch.randint(0, 11, (2, 7)), torch.randn(2, 7, 11, dtype=torch.float64)
    for model in (ours, theirs):
        (model(tokens) * weight).sum().backward()
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-10, atol=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_ranks_that_do_not_divide_the_heads_are_one_sentence():
    with pytest.raises(ValueError, match="2 ranks do not divide 3 heads"):
        recipe("gpt+megatron")().build({"vocab": 11, "context": 9})
