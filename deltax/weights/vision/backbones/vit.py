"""Weight maps of vit, from and to the state dicts of other libraries."""

import math
import re

from torch import Tensor, nn

from deltax.weights.reading import OUR_BLOCK, Fields, reads

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


def renamed(name: str, pairs: tuple[tuple[str, str], ...] = _HF) -> str:
    """A parameter's name in `transformers` as ours: each pair's first word becomes its second, in order."""
    for theirs, ours in pairs:
        name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\g<1>{ours}", name)
    return name


BLOCK = (
    "layers.#.attention.{q_proj,k_proj,v_proj,o_proj}.{weight,bias}",
    "layers.#.{layernorm_before,layernorm_after,mlp.fc1,mlp.fc2}.{weight,bias}",
)
SIZES = """hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size num_channels
    mlp_ratio encoder_stride pooler_output_size pooler_act"""
FIELDS = Fields({"hidden_act": ("gelu",), "layer_norm_eps": (1e-6,), "qkv_bias": (True, False)}, SIZES)


@reads(
    "ViTModel",
    "embeddings.{cls_token,position_embeddings} embeddings.patch_embeddings.projection.{weight,bias}",
    "layernorm.{weight,bias}",
    *BLOCK,
    left_out=("pooler.dense.{weight,bias} classifier.{weight,bias} embeddings.mask_token",),
    prefix="vit.",
    config=FIELDS,
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ViTModel as that of a `ViT`; a pooler, a classifier and a mask are left behind."""
    state = {k.removeprefix("embeddings."): v for k, v in state.items()}
    token, places = state.pop("cls_token"), state.pop("position_embeddings")
    ours = {"class_token.token": token[0, 0] + places[0, 0], "position.table": places[0, 1:]}
    for name, value in state.items():
        ours[renamed(name)] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}


@reads(
    "a ViT",
    "class_token.token position.table patches.embed.{weight,bias} norm.{gain,bias}",
    *OUR_BLOCK,
)
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
