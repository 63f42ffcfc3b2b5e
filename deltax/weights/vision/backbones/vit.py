"""Weight maps of vit, from and to the state dicts of other libraries."""

import math
import re

from torch import Tensor, nn

from deltax.weights.entries import Entries, under

_HF = (
    ("layernorm", "norm"),
    ("patch_embeddings.projection", "patches.embed"),
    ("layers", "stack.blocks"),
    ("layernorm_before", "mixer_residual.norm"),
    ("layernorm_after", "mlp_residual.norm"),
    ("attention.q_proj", "mixer.project.query"),
    ("attention.k_proj", "mixer.project.key"),
    ("attention.v_proj", "mixer.project.value"),
    ("attention.o_proj", "mixer.project.out"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("norm.weight", "norm.gain"),
)

BLOCK = (
    "layernorm_{before,after}.{weight,bias}",
    "attention.{q,k,v,o}_proj.{weight,bias}",
    "mlp.fc{1,2}.{weight,bias}",
)


def renamed(name: str, pairs: tuple[tuple[str, str], ...] = _HF) -> str:
    """A parameter's name in `transformers` as ours: each pair's first word becomes its second, in order."""
    for theirs, ours in pairs:
        name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\g<1>{ours}", name)
    return name


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ViTModel as that of a `ViT`; a pooler, a classifier and a mask are left behind."""
    with Entries(state, "ViTModel", prefix="vit.") as theirs:
        theirs.leave("{pooler.dense,classifier}.{weight,bias}", "embeddings.mask_token")
        token, places = theirs.take("embeddings.cls_token"), theirs.take("embeddings.position_embeddings")
        patches = theirs.matching("embeddings.patch_embeddings.projection.{weight,bias}")
        named = theirs.matching("layernorm.{weight,bias}", *under("layers.*.", BLOCK))
    ours = {"class_token.token": token[0, 0] + places[0, 0], "position.table": places[0, 1:]}
    ours |= {renamed(k.removeprefix("embeddings.")): v.flatten(1) if v.ndim == 4 else v for k, v in patches.items()}
    ours |= {renamed(name): value for name, value in named.items()}
    return {k: v.contiguous() for k, v in ours.items()}


def to_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of a `ViT` as that of a `transformers` ViTModel without pooler; its class token stands at zero."""
    back = tuple((ours, theirs) for theirs, ours in reversed(_HF))
    theirs = {}
    for name, value in state.items():
        if name == "class_token.token":
            theirs["embeddings.cls_token"] = value[None, None]
        elif name == "position.table":
            theirs["embeddings.position_embeddings"] = nn.functional.pad(value, (0, 0, 1, 0))[None]
        elif name == "patches.embed.weight":
            side = math.isqrt(value.shape[1] // channels)
            theirs[f"embeddings.{renamed(name, back)}"] = value.unflatten(1, (channels, side, side))
        else:
            theirs["embeddings." * name.startswith("patches.") + renamed(name, back)] = value
    return {k: v.contiguous() for k, v in theirs.items()}
