"""Weight maps of siglip, from and to the state dicts of other libraries."""

import torch
from torch import Tensor

from deltax import Part, part
from deltax.errors import UserError
from deltax.papers.multimodal.siglip import AttentionPool
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.scores import everywhere
from deltax.parts.model.linear import Linear
from deltax.parts.model.mlp import MLP, gelu_tanh
from deltax.parts.model.nothing import Nothing
from deltax.parts.model.pairs import at_last
from deltax.parts.model.patches import NoClassToken, Patches
from deltax.weights.multimodal.clip import HF as CLIP
from deltax.weights.multimodal.clip import LEFT_OUT, NAMES, OURS, SIZES, hf_name, squares
from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones import vit as vision_weights


def released_towers(recipe: Part) -> Part:
    """The encoders of the released models: `AttentionPool` over patches without a class token, a text that sees all of
    itself and is read at its last place, no map after the image's side. The pool has as many heads as a block of the
    image's side, which its weights do not show, and an MLP as wide: set these before."""
    norm, block = part(LayerNorm, eps=1e-6), recipe["model.image.trunk.stack.block"]
    recipe = recipe.fill("norm", norm).fill("class_token", NoClassToken).set(Patches, embed=Linear)
    recipe = recipe.put("model.image.trunk.stack.entry", part(Nothing)).fill("activation", gelu_tanh)
    pool = part(AttentionPool, heads=block["mixer.heads"], norm=norm).set(MLP, widen=block["mlp.widen"])
    recipe = recipe.put("model.image.pool", pool).fill("mask", everywhere)
    recipe = recipe.put("model.image.classifier", part(Nothing)).put("model.text.classifier", part(Linear))
    return recipe.put("model.text.summary", at_last)


_HF = (
    ("logit_bias", "logits.bias"),
    ("vision_model.head", "image.pool"),
    ("text_model.head", "text.classifier"),
    ("image.pool.attention.out_proj", "image.pool.attention.project.out"),
    ("image.pool.layernorm.weight", "image.pool.mlp_residual.norm.gain"),
    ("image.pool.layernorm.bias", "image.pool.mlp_residual.norm.bias"),
)
_THIRDS = ("query", "key", "value")
_TOWER = {"hidden_act": ("gelu_pytorch_tanh",), "layer_norm_eps": (1e-6,)}


@reads(
    "SiglipModel",
    *NAMES,
    "logit_scale logit_bias text_model.head.{weight,bias} vision_model.embeddings.patch_embedding.{weight,bias}",
    "vision_model.head.probe vision_model.head.attention.{in_proj_weight,in_proj_bias}",
    "vision_model.head.{attention.out_proj,layernorm,mlp.fc1,mlp.fc2}.{weight,bias}",
    left_out=LEFT_OUT,
    config=Fields(
        {"text_config": Fields(_TOWER, SIZES), "vision_config": Fields({**_TOWER, "vision_use_head": (True,)}, SIZES)}
    ),
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` SiglipModel as that of `released_towers`' model."""
    ours = {}
    for name, value in state.items():
        name = vision_weights.renamed(name, (*_HF, *CLIP))
        if ".in_proj_" in name:
            before, kind = name.split("in_proj_")
            ours |= {f"{before}project.{n}.{kind}": v for n, v in zip(_THIRDS, value.chunk(3), strict=True)}
        elif name.startswith("logits."):
            ours[name] = value.reshape(())
        else:
            ours[name] = value.flatten(1) if value.ndim == 4 else value
    if "image.pool.probe" not in ours:
        raise UserError("the state of SiglipModel has no vision_model.head: a model with vision_use_head=True has one")
    ours["image.pool.probe"] = ours["image.pool.probe"].flatten()
    return {k: v.contiguous() for k, v in ours.items()}


@reads(
    "released_towers' model",
    *OURS,
    "logits.{log,bias} {text.classifier,image.trunk.patches.embed}.{weight,bias} text.trunk.embedding.weight",
    "image.pool.probe image.pool.mlp_residual.norm.{gain,bias} image.pool.{mlp.up,mlp.down}.{weight,bias}",
    "image.pool.attention.project.{query,key,value,out}.{weight,bias}",
)
def to_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of `released_towers`' model as that of a `transformers` SiglipModel. The inverse of `from_hf`."""
    back = tuple((ours, theirs) for theirs, ours in reversed(_HF))
    theirs = {
        hf_name(vision_weights.renamed(name, back)): squares(name, value, channels) for name, value in state.items()
    }
    head = "vision_model.head"
    for kind in ("weight", "bias"):
        thirds = [theirs.pop(f"{head}.attention.project.{n}.{kind}") for n in _THIRDS]
        theirs[f"{head}.attention.in_proj_{kind}"] = torch.cat(thirds)
    theirs[f"{head}.probe"] = theirs[f"{head}.probe"][None, None]
    return {k: v.reshape(1) if v.ndim == 0 else v.contiguous() for k, v in theirs.items()}
