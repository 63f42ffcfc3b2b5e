"""Weight maps of gpt, from and to the state dicts of other libraries."""

import torch
from torch import Tensor

_HF_BLOCK = {
    "mixer_residual.norm": "ln_1",
    "mixer.project.out": "attn.c_proj",
    "mlp_residual.norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` GPT2LMHeadModel as that of gpt's model.

    `transformers` stores these matrices transposed (Conv1D), with query, key and value side by side.
    """
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
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


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    depth = 0
    while pattern.format(depth) in state:
        depth += 1
    return depth
