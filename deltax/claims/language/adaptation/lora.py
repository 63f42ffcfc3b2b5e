"""Claims of lora: the paper's equations, parity with peers, and what it measures."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, claim, part
from deltax.papers.language.adaptation.lora import LoRA, lora, merge
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.models.gpt import gpt
from deltax.parts.model.language_model import LanguageModel
from deltax.parts.model.linear import Linear
from deltax.parts.model.stack import Stack
from deltax.parts.rewriting.living import Fused


@claim
def the_start_is_the_base():
    """Before training, outputs equal the base model's bit for bit, for a recipe and for nn.Modules with fused QKV
    projections.
    """
    torch.manual_seed(0)
    base, adapted, tokens = _build(gpt), _build(gpt + lora(rank=3)), torch.randint(11, (2, 9))
    _randomise(base)
    adapted.load_state_dict(base.state_dict())
    assert torch.equal(adapted(tokens), base(tokens))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for living in (_Attention(12), nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0).double()):
        before = living(x)
        assert torch.equal(lora.apply(living, rank=3)(x), before)


@claim
def merging_changes_nothing():
    """With random A and B, merging gives a model of plain linear maps whose outputs equal those of the adapted model
    to 1e-12.
    """
    torch.manual_seed(0)
    tokens, x = torch.randint(11, (2, 9)), torch.randn(2, 5, 12, dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0).double()
    for model, given in (
        (_build(gpt + lora(rank=3)), tokens),
        (lora.apply(_Attention(12), rank=3), x),
        (lora.apply(layer, rank=3), x),
    ):
        _randomise(model)
        adapted = model(given)
        bare = merge(copy.deepcopy(model))
        torch.testing.assert_close(bare(given), adapted, rtol=1e-12, atol=1e-12)
        assert _adapters(model) and not _adapters(bare)
        assert all(type(m) is not Fused and "Parametrized" not in type(m).__name__ for m in bare.modules())
        for adapter in _adapters(model):
            nn.init.zeros_(adapter.b)
        assert not torch.allclose(model(given), adapted)


@claim
def only_the_adapters_learn():
    """Gradients and optimizer state exist for A and B alone, and an optimizer step changes no other parameter."""
    torch.manual_seed(0)
    recipe = gpt + lora(rank=3)
    model, tokens = _build(recipe), torch.randint(11, (2, 9))
    _randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = recipe["optimizer"](model)
    model(tokens).square().sum().backward()
    optimizer.step()
    adapters = {name for name in before if name.endswith((".a", ".b"))}
    assert len(adapters) == 2 * 2 * 2
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (parameter in optimizer.state) == (name in adapters), name
        assert torch.equal(parameter, before[name]) != (name in adapters), name


@claim
def the_change_has_the_rank():
    """The change of a weight is (alpha / r) B A and has rank r, for random A and B."""
    torch.manual_seed(0)
    adapter = LoRA(13, 9, inner=part(Linear), rank=4, alpha=6.0).double()
    _randomise(adapter)
    change = adapter.merged(adapter.weight) - adapter.weight
    torch.testing.assert_close(change, 1.5 * adapter.b @ adapter.a)
    assert torch.linalg.matrix_rank(change) == 4
    x = torch.randn(2, 5, 13, dtype=torch.float64)
    torch.testing.assert_close(adapter(x) - adapter.inner(x), x @ change.T)


@claim.parity(peer="peft LoraConfig on a transformers LlamaForCausalLM")
def equals_peft_on_llama():
    """With the same A and B in a Llama, logits and gradients equal peft's."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config).double()
    _randomise(base)
    ours = lora.apply(copy.deepcopy(base), rank=3, alpha=5.0)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=5.0, target_modules=["q_proj", "v_proj"]))
    pairs = [(m, peer) for m, peer in zip(_adapters(ours), _peft_layers(theirs), strict=True)]
    assert len(pairs) == 4
    for m, peer in pairs:
        nn.init.normal_(m.a), nn.init.normal_(m.b)
        peer.lora_A["default"].weight.data.copy_(m.a)
        peer.lora_B["default"].weight.data.copy_(m.b)
    _same_output_and_backward(ours, theirs)
    for m, peer in pairs:
        torch.testing.assert_close(m.a.grad, peer.lora_A["default"].weight.grad)
        torch.testing.assert_close(m.b.grad, peer.lora_B["default"].weight.grad)


@claim.parity(peer="peft LoraConfig on a transformers GPT2LMHeadModel")
def equals_peft_on_gpt2():
    """On GPT-2's fused QKV projection, adapters on query and value equal one peft adapter of twice the rank with
    block-diagonal B, in logits and gradients.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = _gpt2()
    ours = lora.apply(copy.deepcopy(base), rank=3, alpha=5.0)
    wide = LoraConfig(r=6, lora_alpha=10.0, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = get_peft_model(base, wide)
    adapters, peers = _adapters(ours), _peft_layers(theirs)
    assert (len(adapters), len(peers)) == (4, 2)
    for query, value, peer in zip(adapters[::2], adapters[1::2], peers, strict=True):
        _randomise(query), _randomise(value)
        peer.lora_A["default"].weight.data.copy_(torch.cat([query.a, value.a]))
        blocks = torch.zeros_like(peer.lora_B["default"].weight)
        blocks[:12, :3], blocks[24:, 3:] = query.b.detach(), value.b.detach()
        peer.lora_B["default"].weight.data.copy_(blocks)
    _same_output_and_backward(ours, theirs)
    for query, value, peer in zip(adapters[::2], adapters[1::2], peers, strict=True):
        a, b = peer.lora_A["default"].weight.grad, peer.lora_B["default"].weight.grad
        torch.testing.assert_close(torch.cat([query.a.grad, value.a.grad]), a)
        torch.testing.assert_close(query.b.grad, b[:12, :3])
        torch.testing.assert_close(value.b.grad, b[24:, 3:])


@claim.measured(paper="GPT-2 M on E2E: BLEU 70.4 with 0.35M parameters, 68.2 fine-tuning all 354.92M (Table 3)")
def closes_most_of_the_gap(lab):
    """A gpt trained on prose is tuned on Python source. LoRA (rank 8, queries and values) closes at least 60 % of the
    gap that full fine-tuning closes.
    """
    shares = []
    for seed in lab.seeds(3):
        base, frozen = _base(lab, seed)
        full = _tuned(lab, base, "gpt", seed, rate=1.0)
        adapted = _tuned(lab, base, "gpt+lora(rank=8)", seed, rate=8.0)
        shares.append((frozen - adapted) / (frozen - full))
    return lab.at_least(shares, 0.6, unit="of the gap")


@claim.measured(paper="WikiSQL 73.4 at rank 1 and 73.5 at rank 64, on queries and values (Table 6)")
def rank_one_is_enough(lab):
    """A gpt trained on prose is tuned on Python source. Rank 1 ends at most 0.1 nats per byte above rank 16."""
    gaps = []
    for seed in lab.seeds(3):
        base, _ = _base(lab, seed)
        one, sixteen = (_tuned(lab, base, f"gpt+lora(rank={rank})", seed, rate=8.0) for rank in (1, 16))
        gaps.append((one - sixteen) * math.log(2))
    return lab.at_most(gaps, 0.1, unit="nats per byte")


def _base(lab: Any, seed: int) -> tuple[Any, float]:
    """A gpt trained on prose, and its score on code."""
    base = lab.train(lab.recipe("gpt").put("task.source", "prose"), seed=seed)
    return base, base.score_at(source="code")


def _tuned(lab: Any, base: Any, recipe: str, seed: int, rate: float) -> float:
    """The base's score on code after 200 steps of the recipe on code."""
    recipe = lab.recipe(recipe).put("task.source", "code")
    return lab.train(recipe, seed=seed, steps=200, rate=rate, weights=base.model.state_dict()).score


def _build(recipe: Part) -> nn.Module:
    return recipe.set(LanguageModel, dim=12).set(Stack, depth=2)().build({"vocab": 11, "context": 9}).double()


class _Attention(nn.Module):
    """Attention of three heads whose projections are one linear map."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).unbind(-3)
        return attend(q, k, v).flatten(-2)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=11, n_positions=9, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0, **no_dropout
        )
    )
    _randomise(model.double())
    return model


def _randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def _adapters(model: nn.Module) -> list[LoRA]:
    return [m for m in model.modules() if isinstance(m, LoRA)]


def _peft_layers(model: nn.Module) -> list[nn.Module]:
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def _same_output_and_backward(ours: nn.Module, theirs: nn.Module) -> None:
    tokens = torch.randint(11, (2, 9))
    a, b = ours(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
