"""Weight maps of siglip, from and to the state dicts of other libraries."""

import torch
from torch import Tensor

from deltax import Part, part
from deltax.papers.multimodal.siglip import AttentionPool
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.scores import everywhere
from deltax.parts.model.linear import Linear
from deltax.parts.model.mlp import gelu_tanh
from deltax.parts.model.nothing import Nothing
from deltax.parts.model.pairs import at_last
from deltax.parts.model.patches import NoClassToken, Patches
from deltax.weights.entries import Entries, under
from deltax.weights.multimodal.clip import HF as CLIP
from deltax.weights.multimodal.clip import POSITION_IDS, TOWERS, hf_name, squares
from deltax.weights.vision.backbones import vit as vision_weights


def released_towers(recipe: Part) -> Part:
    """The encoders of the released models: `AttentionPool` over patches without a class token, a text that sees all of
    itself and is read at its last place, no map after the image's side. The pool has the heads and the MLP that the
    blocks of the image's side have in `recipe`: set these first."""
    norm = part(LayerNorm, eps=1e-6)
    recipe = recipe.fill("norm", norm).fill("class_token", NoClassToken).set(Patches, embed=Linear)
    recipe = recipe.put("model.image.trunk.stack.entry", part(Nothing)).fill("activation", gelu_tanh)
    block = recipe["model.image.trunk.stack.block"]
    pool = part(AttentionPool, heads=block["mixer.heads"], norm=norm, mlp=block["mlp"])
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
_POOL = under(
    "vision_model.head.",
    (
        "attention.{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}",
        "layernorm.{weight,bias}",
        "mlp.fc{1,2}.{weight,bias}",
    ),
)
_THIRDS = ("query", "key", "value")


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` SiglipModel as that of `released_towers`' model.

    Raises UserError for a vision tower without its attention pool (`vision_use_head=False`).
    """
    with Entries(state, "SiglipModel") as theirs:
        theirs.leave(POSITION_IDS)
        probe = theirs.take("vision_model.head.probe")
        named = theirs.matching(
            *("logit_scale", "logit_bias", "vision_model.embeddings.position_embedding.weight"),
            *("text_model.head.{weight,bias}", *TOWERS, *_POOL),
        )
    ours = {"image.pool.probe": probe.flatten()}
    for name, value in named.items():
        name = vision_weights.renamed(name, (*_HF, *CLIP))
        if ".in_proj_" in name:
            before, kind = name.split("in_proj_")
            ours |= {f"{before}project.{n}.{kind}": v for n, v in zip(_THIRDS, value.chunk(3), strict=True)}
        elif name.startswith("logits."):
            ours[name] = value.reshape(())
        else:
            ours[name] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}


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
