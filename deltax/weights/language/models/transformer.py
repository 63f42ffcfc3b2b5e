"""Weight maps of transformer, from and to the state dicts of other libraries."""

import torch
from torch import Tensor

from deltax.weights.reading import reads

_TORCH = {
    "mixer.project.out": "self_attn.out_proj",
    "cross.project.out": "multihead_attn.out_proj",
    "mlp.up": "linear1",
    "mlp.down": "linear2",
}


_BLOCKS = "{encoder,decoder}.blocks.#"


@reads(
    "transformer's model",
    f"{_BLOCKS}.{{mixer,cross,mlp}}_residual.norm.{{gain,bias}} {_BLOCKS}.mlp.{{up,down}}.{{weight,bias}}",
    f"{_BLOCKS}.{{mixer,cross}}.project.{{query,key,value,out}}.{{weight,bias}}",
    left_out=("embedding.weight position.table head.{weight,bias}",),
)
def to_torch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder and decoder of a state as those of a `torch.nn.Transformer` whose stacks end without a norm.

    torch keeps query, key and value side by side, and numbers its norms in the order of the branches. Embedding,
    positions and head are left behind: torch's module has none.
    """
    theirs = {}
    for name in state:
        stack, _, index, rest = name.split(".", 3)
        branches = ["mixer", "cross", "mlp"] if stack == "decoder" else ["mixer", "mlp"]
        rest, _, kind = rest.rpartition(".")
        here, there = f"{stack}.blocks.{index}", f"{stack}.layers.{index}"
        if rest.endswith("_residual.norm"):
            number = 1 + branches.index(rest.removesuffix("_residual.norm"))
            theirs[f"{there}.norm{number}.{'weight' if kind == 'gain' else 'bias'}"] = state[name]
        elif rest in _TORCH:
            theirs[f"{there}.{_TORCH[rest]}.{kind}"] = state[name]
        elif rest.endswith(".query"):
            thirds = [
                state[f"{here}.{rest.removesuffix('query')}{third}.{kind}"] for third in ("query", "key", "value")
            ]
            attention = "self_attn" if rest.startswith("mixer") else "multihead_attn"
            theirs[f"{there}.{attention}.in_proj_{kind}"] = torch.cat(thirds)
    return theirs
