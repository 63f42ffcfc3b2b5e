"""Weight maps of clip, from and to the state dicts of other libraries."""

import math

from torch import Tensor, nn

from deltax.weights.entries import Entries, under
from deltax.weights.vision.backbones import vit as vision_weights

HF = (
    ("logit_scale", "logits.log"),
    ("vision_model", "image.trunk"),
    ("text_model", "text.trunk"),
    ("visual_projection", "image.classifier"),
    ("text_projection", "text.classifier"),
    ("embeddings.patch_embedding", "patches.embed"),
    ("embeddings.token_embedding", "embedding"),
    ("embeddings.position_embedding.weight", "position.table"),
    ("encoder.layers", "stack.blocks"),
    ("layer_norm1", "mixer_residual.norm"),
    ("layer_norm2", "mlp_residual.norm"),
    ("self_attn.q_proj", "mixer.project.query"),
    ("self_attn.k_proj", "mixer.project.key"),
    ("self_attn.v_proj", "mixer.project.value"),
    ("self_attn.out_proj", "mixer.project.out"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("pre_layrnorm.weight", "stack.entry.gain"),
    ("pre_layrnorm.bias", "stack.entry.bias"),
    ("image.trunk.post_layernorm", "image.trunk.norm"),
    ("text.trunk.final_layer_norm", "text.trunk.norm"),
    ("norm.weight", "norm.gain"),
)

POSITION_IDS = "{vision,text}_model.embeddings.position_ids"  # 0, 1, 2 and so on, which older versions stored
TOWERS = (
    "vision_model.embeddings.patch_embedding.{weight,bias}",
    "vision_model.post_layernorm.{weight,bias}",
    "text_model.embeddings.{token,position}_embedding.weight",
    "text_model.final_layer_norm.{weight,bias}",
    *under(
        "{vision,text}_model.encoder.layers.*.",
        ("layer_norm{1,2}.{weight,bias}", "self_attn.{q,k,v,out}_proj.{weight,bias}", "mlp.fc{1,2}.{weight,bias}"),
    ),
)
_ENTRY = ("vision_model.pre_layrnorm.{weight,bias}",)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` CLIPModel as that of clip's model, its class token with the place that it has."""
    with Entries(state, "CLIPModel") as theirs:
        theirs.leave(POSITION_IDS)
        token = theirs.take("vision_model.embeddings.class_embedding")
        places = theirs.take("vision_model.embeddings.position_embedding.weight")
        named = theirs.matching("logit_scale", "{visual,text}_projection.weight", *TOWERS, *_ENTRY)
    ours = {"image.trunk.class_token.token": token + places[0], "image.trunk.position.table": places[1:]}
    for name, value in named.items():
        ours[vision_weights.renamed(name, HF)] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}


def to_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of clip's model as that of a `transformers` CLIPModel; its class token stands at zero."""
    theirs = {hf_name(name): squares(name, value, channels) for name, value in state.items()}
    theirs["vision_model.embeddings.class_embedding"] = theirs.pop("vision_model.class_token.token")
    table = "vision_model.embeddings.position_embedding.weight"
    theirs[table] = nn.functional.pad(theirs[table], (0, 0, 1, 0))
    return {k: v.contiguous() for k, v in theirs.items()}


def hf_name(name: str) -> str:
    """A parameter's name as `transformers` has it."""
    return vision_weights.renamed(name, tuple((ours, theirs) for theirs, ours in reversed(HF)))


def squares(name: str, value: Tensor, channels: int) -> Tensor:
    """The weight of a patch embedding as a convolution's (D, C, patch, patch); any other value as it is."""
    if not name.endswith("patches.embed.weight"):
        return value
    side = math.isqrt(value.shape[1] // channels)
    return value.unflatten(1, (channels, side, side))
