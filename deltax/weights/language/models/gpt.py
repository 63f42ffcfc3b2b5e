"""Weight maps of gpt, from and to the state dicts of other libraries."""

import math
from typing import Any

import torch
from torch import Tensor

from deltax import Part
from deltax.errors import UserError
from deltax.paper import paper_of
from deltax.papers.language.models.gpt import gpt
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.model.mlp import MLP, gelu, gelu_tanh, relu
from deltax.weights.reading import OUR_BLOCK, Fields, reads

_HF_BLOCK = {
    "mixer_residual.norm": "ln_1",
    "mixer.project.out": "attn.c_proj",
    "mlp_residual.norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


_ACTIVATIONS = {"gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu, "relu": relu}
_CONFIG = Fields(
    {
        "activation_function": tuple(_ACTIVATIONS),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "vocab_size n_positions n_ctx n_embd n_layer n_head n_inner layer_norm_epsilon summary_type summary_use_proj "
    "summary_activation summary_proj_to_labels summary_first_dropout",
)


def from_config(config: Any) -> Part:
    """The recipe of a `transformers` GPT2Config, or of the mapping in its config.json: gpt in these sizes, with this
    activation and epsilon. Raises UserError for a value or field that gpt does not compute."""
    _CONFIG.check(config, "GPT2LMHeadModel")
    given = dict(config if isinstance(config, dict) else config.to_dict())
    tree = paper_of(gpt)(dim=given["n_embd"], depth=given["n_layer"], heads=given["n_head"])
    tree = tree.fill("activation", _ACTIVATIONS[given["activation_function"]])
    tree = tree.set(MLP, widen=_ratio(given["n_embd"], given.get("n_inner") or 4 * given["n_embd"]))
    return tree.set(LayerNorm, eps=given["layer_norm_epsilon"])


@reads(
    "GPT2LMHeadModel",
    "wte.weight wpe.weight lm_head.weight ln_f.{weight,bias} h.#.{ln_1,ln_2}.{weight,bias}",
    "h.#.{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}.{weight,bias}",
    left_out=("h.#.attn.{bias,masked_bias}",),  # the causal mask, which older versions store
    prefix="transformer.",
    config=_CONFIG,
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` GPT2LMHeadModel as that of gpt's model, or where a `config` is given as that of
    `from_config`'s, of which the number of heads and the epsilon are not in the state.

    `transformers` stores these matrices transposed (Conv1D), with query, key and value side by side. Raises UserError
    for a head that is not the embedding's table, and for a key or a field of the config that gpt has no part for.
    """
    head = state.get("lm_head.weight")
    if head is not None and not (head is state["wte.weight"] or torch.equal(head, state["wte.weight"])):
        raise UserError(
            "lm_head.weight differs from wte.weight, and gpt's head is its embedding's table: tie them, or convert a "
            "model with tie_word_embeddings=True"
        )
    ours = {
        "embedding.weight": state["wte.weight"],
        "position.table": state["wpe.weight"],
        "norm.gain": state["ln_f.weight"],
        "norm.bias": state["ln_f.bias"],
    }
    for i in range(_depth(state, "h.{}.ln_1.weight")):
        here, there = f"stack.blocks.{i}", f"h.{i}"
        for name, peer in _HF_BLOCK.items():
            weight = state[f"{there}.{peer}.weight"]
            ours[f"{here}.{name}.{'gain' if 'norm' in name else 'weight'}"] = weight.T if weight.ndim == 2 else weight
            ours[f"{here}.{name}.bias"] = state[f"{there}.{peer}.bias"]
        for name, weight, bias in zip(
            ("query", "key", "value"),
            state[f"{there}.attn.c_attn.weight"].T.chunk(3),
            state[f"{there}.attn.c_attn.bias"].chunk(3),
            strict=True,
        ):
            ours[f"{here}.mixer.project.{name}.weight"], ours[f"{here}.mixer.project.{name}.bias"] = weight, bias
    return {k: v.contiguous() for k, v in ours.items()}


@reads("gpt's model", "embedding.weight position.table norm.{gain,bias}", *OUR_BLOCK)
def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of gpt's model as that of a `transformers` GPT2LMHeadModel. The inverse of `from_hf`."""
    theirs = {
        "wte.weight": state["embedding.weight"],
        "wpe.weight": state["position.table"],
        "ln_f.weight": state["norm.gain"],
        "ln_f.bias": state["norm.bias"],
    }
    for i in range(_depth(state, "stack.blocks.{}.mlp.up.weight")):
        here, there = f"stack.blocks.{i}", f"h.{i}"
        for name, peer in _HF_BLOCK.items():
            weight = state[f"{here}.{name}.{'gain' if 'norm' in name else 'weight'}"]
            theirs[f"{there}.{peer}.weight"] = weight.T if weight.ndim == 2 else weight
            theirs[f"{there}.{peer}.bias"] = state[f"{here}.{name}.bias"]
        thirds = [f"{here}.mixer.project.{name}" for name in ("query", "key", "value")]
        theirs[f"{there}.attn.c_attn.weight"] = torch.cat([state[f"{third}.weight"] for third in thirds]).T
        theirs[f"{there}.attn.c_attn.bias"] = torch.cat([state[f"{third}.bias"] for third in thirds])
    theirs = {f"transformer.{k}": v.contiguous() for k, v in theirs.items()}
    return {**theirs, "lm_head.weight": state["embedding.weight"]}


def _ratio(dim: int, hidden: int) -> float:
    """By how much an MLP has to widen dim, so that it is hidden after it is rounded down."""
    ratio = hidden / dim
    return ratio if int(ratio * dim) == hidden else math.nextafter(ratio, math.inf)


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    depth = 0
    while pattern.format(depth) in state:
        depth += 1
    return depth
