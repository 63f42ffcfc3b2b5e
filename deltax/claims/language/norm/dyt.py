"""Claims of dyt: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import Part, claim
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.dyt import DyT, dyt
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.context import Context
from deltax.parts.model.nothing import Nothing


@claim
def no_feature_waits_for_another():
    """The Jacobian of DyT is diagonal; that of LayerNorm has no zero entries."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    jacobian = lambda norm: torch.func.jacrev(norm.double())(x).reshape(8, 8)
    ours = jacobian(DyT(8))
    assert torch.equal(ours, ours.diag().diag()) and ours.diag().all()
    assert jacobian(LayerNorm(8)).all()


@claim
def linear_near_zero():
    """Small inputs are multiplied by alpha and the gain, to first order."""
    torch.manual_seed(0)
    norm = DyT(8, alpha=0.7).double()
    nn.init.normal_(norm.gain)
    x = 1e-6 * torch.randn(1, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x), norm.gain * norm.alpha * x, rtol=1e-8, atol=0)


@claim
def the_stream_starts_at_order_one():
    """In a fresh gpt + dyt, hidden states enter the first block with a variance between 0.3 and 3; without the
    learned scale, below 0.01.
    """
    torch.manual_seed(0)
    ctx, tokens = Context(), torch.arange(256)[None]

    def variance(recipe: Part) -> float:
        model = recipe().build({"vocab": 256, "context": 256})
        return model.stack.entry(model.position(model.embedding(tokens), ctx)).var().item()

    assert 0.3 < variance(gpt + dyt) < 3
    assert variance(gpt) < 0.01


@claim
def slopes_start_where_they_are_told():
    """With alpha = 0.2, attention = 0.8 and final = 0.3, initial slopes are 0.2 before feed-forward branches, 0.8
    before attention and 0.3 at the end. All other weights are as with one alpha.
    """
    recipe = gpt + dyt(alpha=0.2, attention=0.8, final=0.3)
    models = []
    for tree in (recipe, gpt + dyt(alpha=0.2)):
        torch.manual_seed(0)
        models.append(tree().build({"vocab": 11, "context": 7}))
    three, one = (dict(model.named_parameters()) for model in models)
    assert three.keys() == one.keys()
    for name, value in three.items():
        if name.endswith("alpha"):
            start = 0.8 if ".mixer_residual." in name else 0.2 if ".mlp_residual." in name else 0.3
            assert value.item() == torch.tensor(start).item() and one[name].item() == torch.tensor(0.2).item()
        else:
            assert torch.equal(value, one[name])


@claim.measured(paper="ViT-B 82.5 against 82.3 with LayerNorm, ConvNeXt-B 83.7 against 83.7 (Table 1)")
def as_good_as_the_norm(lab):
    """Both with tuned learning rates, gpt + dyt needs at most 2 % more compute than gpt for the same loss."""
    return lab.compare("gpt", "gpt+dyt").no_worse


@claim.measured(paper="LLaMA needs the scalar after the embedding (section 5)")
def without_the_lift_it_does_not_learn(lab):
    """Without the learned scale after the embedding, gpt + dyt ends at least 0.5 bits per byte higher than with it."""
    lifted = lab.recipe("gpt+dyt")
    plain = lifted.fill("entry", Nothing)
    ends = lambda recipe, seed: lab.train(recipe, seed=seed).score
    return lab.at_least([ends(plain, s) - ends(lifted, s) for s in lab.seeds(3)], 0.5, unit="bits per byte")
