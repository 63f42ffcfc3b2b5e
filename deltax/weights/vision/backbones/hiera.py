"""Weight maps of hiera, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.papers.vision.backbones.q_pooled_attention import z_order
from deltax.parts.model.patches import Grid
from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones.vit import renamed

_HF = (
    ("embeddings.patch_embeddings.projection", "patches.inner.conv"),
    ("layernorm_after", "mlp_residual.norm"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("proj", "shortcut"),
    ("norm.weight", "norm.gain"),
)


_LAYER = "{layernorm_before,layernorm_after,attn.qkv,attn.proj,proj,mlp.fc1,mlp.fc2}.{weight,bias}"
_TRUNK = (
    "embeddings.position_embeddings embeddings.patch_embeddings.projection.{weight,bias}",
    f"encoder.stages.#.layers.#.{_LAYER}",
)
_FIELDS = Fields(
    {
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-6,),
        "embed_dim_multiplier": (2, 2.0),
        "query_stride": ([2, 2],),
        "patch_size": ([7, 7],),
        "patch_stride": ([4, 4],),
        "patch_padding": ([3, 3],),
    },
    "embed_dim image_size mlp_ratio depths num_heads num_query_pool masked_unit_size masked_unit_attention "
    "num_channels hidden_size decoder_hidden_size decoder_depth decoder_num_heads normalize_pixel_loss mask_ratio "
    "layer_norm_init",
)


@reads("HieraModel", *_TRUNK, left_out=("pooler.layernorm.{weight,bias}",), config=_FIELDS)
def from_hf(state: dict[str, Tensor], *, grid: Grid, levels: int = 3, local: int = 2) -> dict[str, Tensor]:
    """The state of a `transformers` HieraModel, without its pooler, as that of a `ViT` with these stages.

    grid: rows and columns of patches, which stand row by row there and in z-order here.
    """
    ours = {}
    for name, value in state.items():
        if name == "embeddings.position_embeddings":
            ours["position.table"] = value[0, list(z_order(grid, levels))]
        elif name.startswith("encoder.stages."):
            stage, block, rest = re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)", name).groups()
            i, j = int(stage), int(block)
            merge = i > 0 and j == 0
            here = f"stack.merges.{i - 1}" if merge else f"stack.stages.{i}.blocks.{j - (i > 0)}"
            mixer = "mixer.inner" if i - merge < local else "mixer"
            before = "norm" if merge else "mixer_residual.norm"
            if rest.startswith("attn.qkv"):
                kind = rest.rpartition(".")[2]
                for third, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    ours[f"{here}.{mixer}.project.{third}.{kind}"] = piece
            else:
                words = (("layernorm_before", before), ("attn.proj", f"{mixer}.project.out"))
                ours[f"{here}.{renamed(rest, words + _HF)}"] = value
        else:
            ours[renamed(name, _HF)] = value
    return {k: v.contiguous() for k, v in ours.items()}


@reads(
    "HieraForPreTraining",
    *(f"hiera.{name}" for names in _TRUNK for name in names.split()),
    "multiscale_fusion.multi_scale_fusion_heads.#.{weight,bias} encoder_norm.{weight,bias}",
    "decoder.{mask_token,decoder_position_embeddings}",
    f"decoder.decoder_block.layers.#.{_LAYER}",
    "decoder.{decoder_embeddings,decoder_norm,decoder_pred}.{weight,bias}",
    left_out=("hiera.pooler.layernorm.{weight,bias}",),
    config=_FIELDS,
)
def pretraining_from_hf(state: dict[str, Tensor], *, grid: Grid, levels: int = 3, local: int = 2) -> dict[str, Tensor]:
    """The state of a `transformers` HieraForPreTraining that pools to one element a unit as that of our model."""
    trunk = from_hf({k.removeprefix("hiera."): v for k, v in state.items() if k.startswith("hiera.")}, grid=grid,
                    levels=levels, local=local)  # fmt: skip
    ours = {f"trunk.inner.{k.replace('stack.', 'stack.inner.', 1)}": v for k, v in trunk.items()}
    for name, value in state.items():
        if name.startswith("multiscale_fusion."):
            i, kind = name.split(".")[2:]
            if kind == "weight":  # a unit's patches go row by row there, in z-order here, features last
                order = list(z_order((value.shape[2], value.shape[3]), levels - int(i)))
                value = value.flatten(2)[..., order].mT.flatten(1)
            ours[f"trunk.inner.stack.heads.{i}.{kind}"] = value
        elif name.startswith("encoder_norm."):
            ours[f"trunk.inner.norm.{'gain' if name.endswith('weight') else 'bias'}"] = value
    return ours | _decoder_from_hf({k: v for k, v in state.items() if k.startswith("decoder.")})


def _decoder_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("decoder.")
        if name == "mask_token":
            ours["pixel_decoder.mask_token"] = value.flatten()
        elif name == "decoder_position_embeddings":
            ours["pixel_decoder.position.table"] = value[0]
        elif name.startswith("decoder_block.layers."):
            block = from_hf({name.replace("decoder_block.layers.", "encoder.stages.0.layers."): value}, grid=(1, 1),
                            levels=0, local=0)  # fmt: skip
            ours |= {k.replace("stack.stages.0", "pixel_decoder.stack"): v for k, v in block.items()}
        else:
            words = (("decoder_embeddings", "enter"), ("decoder_norm", "norm"), ("decoder_pred", "predict"))
            ours[f"pixel_decoder.{renamed(name, (*words, ('norm.weight', 'norm.gain')))}"] = value
    return ours
