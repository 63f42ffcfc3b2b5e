"""Properties of every optimizer of the catalogue."""

import pytest
import torch
from all_meshes import compared, job, losses, trained
from torch import nn

from deltax import recipe
from deltax.parts.training.roles import by_role

SMALL = ["model.dim=12", "model.stack.depth=1", "model.stack.block.mixer.heads=2"]


def optimizers():
    """A recipe of gpt for each optimizer that a recipe of the catalogue has."""
    found = {}
    for expression in trained():
        optimizer = recipe(expression)["optimizer"]
        if expression.startswith("gpt") or optimizer.target not in {other.target for other in found}:
            found.setdefault(optimizer, expression)
    return tuple(found.values())


def _job(expression, lr=0.7):
    small = SMALL if expression.startswith("gpt") and "grpo" not in expression else []
    return job(expression, *small, steps=6, lr_scale=lr)


def test_every_optimizer_steps_on_replicas_as_in_one_process():
    """Under a schedule, and at another rate than its own: the rate reaches an optimizer inside another."""
    jobs = {expression: _job(expression) for expression in optimizers()}
    assert len(jobs) > 10
    assert compared(jobs, "dp=2") == {}
    at_others = losses({expression: _job(expression, lr=0.35) for expression in jobs})
    at_its_own = losses(jobs)
    assert [expression for expression in jobs if at_others[expression] == at_its_own[expression]] == []


class Shared(nn.Module):
    """A table that a head and a second branch read too."""

    def __init__(self):
        super().__init__()
        self.table, self.head, self.branch = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False), nn.Linear(6, 6)
        self.again = self.branch
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.again(self.branch(self.table(tokens))))


def shared_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config
    from transformers import T5ForConditionalGeneration as T5

    small = {"vocab_size": 11, "num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1}
    t5 = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=True)
    return {
        "shared": Shared(),
        "gpt-2": GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
        "t5": T5(t5),
        "llama": LlamaForCausalLM(LlamaConfig(**small, intermediate_size=8, tie_word_embeddings=True)),
    }


@pytest.mark.parametrize("name", ["shared", "gpt-2", "t5", "llama"])
def test_every_optimizer_takes_shared_weights_once(name):
    tokens = torch.arange(11)[None]
    for expression in optimizers():
        torch.manual_seed(0)
        model = shared_models()[name]
        roles = by_role(model)
        every = [p for of_role in roles.values() for p in of_role]
        assert len(every) == len({id(p) for p in every}) == len(list(model.parameters()))
        table = model.table if name == "shared" else model.get_input_embeddings()
        assert any(table.weight is p for p in roles["embedding"])
        optimizer = _job(expression).recipe["optimizer"](model)
        before = [p.detach().clone() for p in every]
        for _ in range(4):  # those with stale weights move the model late
            said = model(tokens) if name == "shared" else _logits(model, tokens)
            nn.functional.cross_entropy(said.flatten(0, -2), tokens.flatten().roll(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        assert not all(torch.equal(p, start) for p, start in zip(every, before, strict=True)), expression


def _logits(model, tokens):
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **more).logits
