"""Weight maps of mae, from and to the state dicts of other libraries."""

import math

import torch
from torch import Tensor

from deltax.errors import UserError
from deltax.parts.model.patches import GridSinusoids
from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones.vit import BLOCK, FIELDS, SIZES, renamed
from deltax.weights.vision.backbones.vit import from_hf as vit_from_hf

_HF_DECODER = (
    ("decoder.decoder_embed", "pixel_decoder.enter"),
    ("decoder.mask_token", "pixel_decoder.mask_token"),
    ("decoder.decoder_layers", "pixel_decoder.stack.blocks"),
    ("decoder.decoder_norm", "pixel_decoder.norm"),
    ("decoder.decoder_pred", "pixel_decoder.predict"),
)


@reads(
    "ViTMAEForPreTraining",
    "vit.embeddings.{cls_token,position_embeddings} vit.embeddings.patch_embeddings.projection.{weight,bias}",
    "vit.layernorm.{weight,bias}",
    *(f"vit.{name}" for name in BLOCK),
    "decoder.mask_token decoder.decoder_pos_embed decoder.{decoder_embed,decoder_norm,decoder_pred}.{weight,bias}",
    *(f"decoder.decoder_{name}" for name in BLOCK),
    config=Fields(
        FIELDS.values,
        SIZES + " decoder_num_attention_heads decoder_hidden_size decoder_num_hidden_layers decoder_intermediate_size "
        "mask_ratio norm_pix_loss",
    ),
)
def from_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of a `transformers` ViTMAEForPreTraining as that of a `MaskedAutoencoder`.

    Positions are not in our state: those of both stacks are `GridSinusoids` of a square, and others raise UserError.
    `transformers` gives the channels of a pixel last, we first.
    """
    trunk = vit_from_hf({k: v for k, v in state.items() if k.startswith("vit.")})
    _check_positions("vit.embeddings.position_embeddings", trunk.pop("position.table"))
    ours = {f"trunk.{k}": v for k, v in trunk.items()}
    for name, value in state.items():
        if name == "decoder.decoder_pos_embed":
            _check_positions(name, value[0, 1:])
        elif name.startswith("decoder."):
            if name.startswith("decoder.decoder_pred"):
                value = value.unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1)
            name = renamed(renamed(name, _HF_DECODER))
            ours[name] = value.flatten() if name.endswith("mask_token") else value
    return {k: v.contiguous() for k, v in ours.items()}


def _check_positions(name: str, table: Tensor) -> None:
    side = math.isqrt(len(table))
    fixed = GridSinusoids(table.shape[1], (side, side)).table.to(table)
    if fixed.shape != table.shape or not torch.allclose(table, fixed, rtol=0, atol=1e-2):
        raise UserError(
            f"{name} are not the sines and cosines of a square grid, which our model has: convert a model that was "
            "trained with these"
        )
