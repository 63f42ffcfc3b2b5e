"""What the lens does with models it does not know, models that fail, and letters that are hard to draw."""

import io

import pytest
import torch
from torch import nn

from deltax import UserError
from deltax.claims.checking import randomise
from deltax.claims.interp.logit_lens import _tiny
from deltax.papers.interp.logit_lens import _after_the_head, distance_to_last, logit_lens, picture
from deltax.papers.language.models.gpt import gpt
from deltax.papers.vision.backbones.register_tokens import register_tokens

TAILS = {  # models of transformers that scale or cap their head's logits, and by what
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 4},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.3, "head_dim": 4},
    "Granite": {"logits_scaling": 5.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "NanoChat": {"final_logit_softcapping": 2.0},
    "Llama": {},
}


@torch.no_grad()
@pytest.mark.parametrize("family", TAILS)
def test_the_last_layer_is_the_output_of_released_models_that_change_their_logits(family):
    """Every parameter random, so that a cap bends and a scale shows; earlier layers go the same way."""
    model, tokens = released(family)
    lens = logit_lens(model, tokens)
    torch.testing.assert_close(lens[-1], torch.log_softmax(model(tokens).logits, -1))
    states = model(tokens, output_hidden_states=True).hidden_states
    raw = model.lm_head(torch.stack([model.model.norm(states[0]), states[-1]]))
    wanted = {"Gemma2": lambda x: 3 * torch.tanh(x / 3), "NanoChat": lambda x: 2 * torch.tanh(x / 2),
              "Granite": lambda x: x / 5, "Cohere": lambda x: x * 0.25, "Cohere2": lambda x: x * 0.3}  # fmt: skip
    first = wanted.get(family, lambda x: x)(raw[0])
    torch.testing.assert_close(lens[0], torch.log_softmax(first, -1))


@torch.no_grad()
def test_a_cap_that_hardly_bends_is_found():
    """While logits are a thousandth of the cap, float32 holds it and the identity apart, and the cap is taken."""
    model, _ = released("NanoChat")
    raw = 2e-3 * torch.randn(1, 3, 11)
    found = _after_the_head(model, raw, 2 * torch.tanh(raw / 2))
    torch.testing.assert_close(found(1e4 * raw), 2 * torch.tanh(1e4 * raw / 2))


@torch.no_grad()
def test_logits_that_are_made_otherwise_are_refused():
    model, tokens = released("Llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out.square() if args[0].ndim == 3 else out)
    logit_lens(model, tokens)  # a head that squares is a head
    changed = model.forward
    model.forward = lambda *args, **kwargs: bent(changed(*args, **kwargs))
    with pytest.raises(UserError, match="logits of LlamaForCausalLM are not its head of its last norm of its stream"):
        logit_lens(model, tokens)
    with pytest.raises(UserError, match="cannot find blocks and a last norm in LanguageModel"):
        logit_lens((gpt + register_tokens)().build({"vocab": 11, "context": 9}), tokens)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_no_config_names_is_refused_in_every_dtype(dtype):
    model, tokens = released("Llama")
    model.to(dtype)
    logit_lens(model, tokens)
    model.forward = lambda *args, forward=model.forward: forward(*args).logits * 1.08
    with pytest.raises(UserError, match="logits of LlamaForCausalLM are not its head"):
        logit_lens(model, tokens)


def bent(out):
    out.logits = out.logits + out.logits.square()
    return out


def released(family):
    import transformers as hf

    sizes = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, vocab_size=11,
                 num_key_value_heads=3, bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    model = getattr(hf, f"{family}ForCausalLM")(getattr(hf, f"{family}Config")(**sizes, **TAILS[family]))
    return randomise(model).eval(), torch.randint(11, (2, 7))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="cannot find blocks and a last norm in Linear"):
        logit_lens(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.int64))


def test_hooks_go_even_when_the_model_fails():
    model, tokens = _tiny()
    with pytest.raises(IndexError):
        logit_lens(model, tokens + 11)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_each_layer_is_a_distribution():
    model, tokens = _tiny()
    lens = logit_lens(model.float(), tokens)
    torch.testing.assert_close(lens.exp().sum(-1), torch.ones(4, 2, 9))
    by_hand = (lens[-1].exp() * (lens[-1] - lens[0])).sum(-1)
    torch.testing.assert_close(distance_to_last(lens)[0], by_hand)


def test_any_letter_can_be_drawn():
    model, tokens = _tiny()
    letters = ["\n", "$", "$x$", "é", "\0", " ", "_", "^", "\\", "{", "%"]
    figure = picture(logit_lens(model, tokens), tokens, lambda ids: "".join(letters[i] for i in ids))
    with io.StringIO() as file:
        figure.savefig(file, format="svg")
        assert "<svg" in file.getvalue()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["embedding", "1", "2", "3"]
