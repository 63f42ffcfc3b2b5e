"""Weight maps of gpt, from and to the state dicts of other libraries."""

import torch
from torch import Tensor

from deltax.errors import UserError
from deltax.weights.entries import Entries

_HF_BLOCK = {
    "mixer_residual.norm": "ln_1",
    "mixer.project.out": "attn.c_proj",
    "mlp_residual.norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` GPT2LMHeadModel as that of gpt's model.

    `transformers` stores these matrices transposed (Conv1D), with query, key and value side by side. Raises UserError
    for a head that is not the embedding, and for entries that gpt has no part for.
    """
    with Entries(state, "GPT2LMHeadModel", prefix="transformer.") as theirs:
        theirs.leave("h.*.attn.{bias,masked_bias}")  # the causal mask, which older versions stored
        ours = {
            "embedding.weight": theirs.take("wte.weight"),
            "position.table": theirs.take("wpe.weight"),
            "norm.gain": theirs.take("ln_f.weight"),
            "norm.bias": theirs.take("ln_f.bias"),
        }
        if "lm_head.weight" in theirs:
            _refuse_untied(theirs.take("lm_head.weight"), ours["embedding.weight"])
        depth = 0
        while f"h.{depth}.ln_1.weight" in theirs:
            ours |= _block(theirs, f"h.{depth}", f"stack.blocks.{depth}")
            depth += 1
    return {k: v.contiguous() for k, v in ours.items()}


def _block(theirs: Entries, there: str, here: str) -> dict[str, Tensor]:
    ours = {}
    for name, peer in _HF_BLOCK.items():
        weight = theirs.take(f"{there}.{peer}.weight")
        ours[f"{here}.{name}.{'gain' if 'norm' in name else 'weight'}"] = weight.T if weight.ndim == 2 else weight
        ours[f"{here}.{name}.bias"] = theirs.take(f"{there}.{peer}.bias")
    for name, weight, bias in zip(
        ("query", "key", "value"),
        theirs.take(f"{there}.attn.c_attn.weight").T.chunk(3),
        theirs.take(f"{there}.attn.c_attn.bias").chunk(3),
        strict=True,
    ):
        ours[f"{here}.mixer.project.{name}.weight"], ours[f"{here}.mixer.project.{name}.bias"] = weight, bias
    return ours


def _refuse_untied(head: Tensor, embedding: Tensor) -> None:
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise UserError(
            "lm_head.weight differs from wte.weight, and gpt's head is the embedding: give a model whose head is tied "
            "(tie_word_embeddings=True)"
        )


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of gpt's model as that of a `transformers` GPT2LMHeadModel. The inverse of `from_hf`."""
    with Entries(state, "gpt") as ours:
        theirs = {
            "wte.weight": ours.take("embedding.weight"),
            "wpe.weight": ours.take("position.table"),
            "ln_f.weight": ours.take("norm.gain"),
            "ln_f.bias": ours.take("norm.bias"),
        }
        depth = 0
        while f"stack.blocks.{depth}.mlp.up.weight" in ours:
            here, there = f"stack.blocks.{depth}", f"h.{depth}"
            for name, peer in _HF_BLOCK.items():
                weight = ours.take(f"{here}.{name}.{'gain' if 'norm' in name else 'weight'}")
                theirs[f"{there}.{peer}.weight"] = weight.T if weight.ndim == 2 else weight
                theirs[f"{there}.{peer}.bias"] = ours.take(f"{here}.{name}.bias")
            thirds = [f"{here}.mixer.project.{name}" for name in ("query", "key", "value")]
            theirs[f"{there}.attn.c_attn.weight"] = torch.cat([ours.take(f"{third}.weight") for third in thirds]).T
            theirs[f"{there}.attn.c_attn.bias"] = torch.cat([ours.take(f"{third}.bias") for third in thirds])
            depth += 1
    theirs = {f"transformer.{k}": v.contiguous() for k, v in theirs.items()}
    return {**theirs, "lm_head.weight": state["embedding.weight"]}
