import pytest
import torch

from deltax.errors import UserError
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.position.alibi import alibi
from deltax.papers.language.position.rope import rope
from deltax.parts.training.generate import choose, generate

RECIPES = {"gpt": gpt, "rope": gpt + rope, "alibi": gpt + alibi}


@pytest.fixture(params=RECIPES)
def model(request):
    torch.manual_seed(0)
    tree = RECIPES[request.param].put("model.dim", 12).put("model.stack.depth", 2)
    model = tree().build({"vocab": 11, "context": 17}).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize(
    "choice", [{"temperature": 0}, {}, {"temperature": 0.3}, {"top_k": 3}, {"temperature": 2.0, "top_k": 50}]
)
def test_a_cache_chooses_what_the_full_pass_would(model, choice):
    prompt = torch.randint(11, (3, 4))
    tokens = generate(model, prompt, length=14, generator=torch.Generator().manual_seed(5), **choice)
    full, generator = prompt, torch.Generator().manual_seed(5)
    for _ in range(14):
        full = torch.cat([full, choose(model(full)[:, -1], generator=generator, **choice)], 1)
    assert tokens.shape == (3, 18) and torch.equal(tokens, full)
    assert len(tokens[:, 4:].unique()) > 1


def test_each_token_is_read_once(model):
    read = []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    generate(model, torch.randint(11, (2, 5)), length=4)
    assert read == [5, 1, 1, 1]


def test_draws_follow_the_softmax_and_stay_among_the_likeliest():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, -2.0])
    draws = choose(logits.expand(40_000, 5), temperature=0.7)
    share = torch.bincount(draws.flatten(), minlength=5) / len(draws)
    torch.testing.assert_close(share, torch.softmax(logits / 0.7, -1), atol=0.01, rtol=0)
    assert set(choose(logits.expand(1000, 5), top_k=2).flatten().tolist()) == {0, 2}


def test_tokens_can_be_trained_on():
    model = gpt.put("model.dim", 12)().build({"vocab": 11, "context": 17})
    tokens = generate(model, torch.randint(11, (2, 5)), length=3)
    model(tokens).sum().backward()
    assert not tokens.is_inference() and model.embedding.weight.grad is not None


def test_a_table_of_positions_ends():
    prompt = torch.zeros(1, 10, dtype=torch.int64)
    build = lambda recipe: recipe.put("model.dim", 12)().build({"vocab": 11, "context": 17})
    assert generate(build(gpt), prompt, length=8).shape == (1, 18)
    with pytest.raises(UserError, match=r"learned 17 positions.*10 with 9 more needs 18"):
        generate(build(gpt), prompt, length=9)
    assert generate(build(gpt), torch.zeros(1, 30, dtype=torch.int64), length=0).shape == (1, 30)
    assert generate(build(gpt + rope), prompt, length=50).shape == (1, 60)


@pytest.mark.parametrize(
    ("name", "value"), [("length", -1), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0)]
)
def test_arguments_that_make_no_sense(name, value):
    with pytest.raises(UserError, match=f"{name} must be at least ., not {value}"):
        generate(torch.nn.Identity(), torch.zeros(1, 3, dtype=torch.int64), **{"length": 2, name: value})


@pytest.mark.parametrize(
    "prompt", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 3)]
)
@pytest.mark.usefixtures("unchecked")
def test_a_prompt_is_rows_of_tokens(prompt):
    with pytest.raises(UserError, match="prompt"):
        generate(torch.nn.Identity(), prompt, length=1)
