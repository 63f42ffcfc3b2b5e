"""What the lens does with models it does not know, models that fail, and letters that are hard to draw."""

import io

import pytest
import torch
from torch import nn

from deltax import UserError
from deltax.claims.interp.logit_lens import _tiny
from deltax.papers.interp.logit_lens import anatomy, distance_to_last, logit_lens, picture, streams
from deltax.papers.language.models.gpt import gpt
from deltax.papers.vision.backbones.register_tokens import register_tokens


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


def _foreign(family, **more):
    """A tiny causal model of transformers in float64, its matrices large enough that caps and scales matter."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=11, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=6,
        intermediate_size=20, pad_token_id=0, bos_token_id=None, eos_token_id=None, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7)
    return model


@pytest.mark.parametrize(
    ("family", "tail"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0}),
        ("Gemma2", {"final_logit_softcapping": None}),
        ("NanoChat", {"final_logit_softcapping": 3.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 7.0}),
        ("HyperCLOVAX", {"logits_scaling": 7.0}),
    ],
)
@torch.no_grad()
def test_scales_and_caps_behind_the_head_are_in_every_layer(family, tail):
    """Each layer is what the model says where its last block gives the stream of that layer."""
    model = _foreign(family, **tail)
    tokens = torch.randint(1, 11, (2, 5))
    lens, last = logit_lens(model, tokens), anatomy(model).blocks[-1]
    for x, layer in zip(streams(model, tokens), lens, strict=True):
        swap = lambda _, __, out, x=x: (x, *out[1:]) if isinstance(out, tuple) else x
        hook = last.register_forward_hook(swap)
        said = model(tokens).logits
        hook.remove()
        torch.testing.assert_close(layer, torch.log_softmax(said, -1), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tail_that_is_not_found_is_refused_by_name(dtype):
    model = _foreign("Llama").to(dtype)
    tokens = torch.randint(1, 11, (2, 5))
    assert logit_lens(model, tokens).isfinite().all()
    forward = model.forward
    model.forward = lambda *given, **named: _squared(forward(*given, **named))
    with pytest.raises(UserError, match="logits of LlamaForCausalLM are not its head of its last norm"):
        logit_lens(model, tokens)


def _squared(out):
    out.logits = out.logits * out.logits.abs()
    return out


def test_a_model_without_a_head_or_plain_blocks_is_refused():
    model = _foreign("Llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="cannot find blocks and a last norm in LlamaForCausalLM"):
        logit_lens(model, torch.ones(1, 2, dtype=torch.int64))
    registers = (gpt.put("model.dim", 12) + register_tokens)().build({"vocab": 11, "context": 9})
    with pytest.raises(UserError, match="in LanguageModel"):
        logit_lens(registers, torch.ones(1, 2, dtype=torch.int64))
