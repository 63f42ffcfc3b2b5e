"""Weight maps of clip, from and to the state dicts of other libraries."""

import math

from torch import Tensor, nn

from deltax.weights.reading import OUR_BLOCK, Fields, reads
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


NAMES = (
    "{text_model,vision_model}.encoder.layers.#.self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
    "{text_model,vision_model}.encoder.layers.#.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    "text_model.embeddings.{token_embedding,position_embedding}.weight text_model.final_layer_norm.{weight,bias}",
    "vision_model.embeddings.position_embedding.weight vision_model.post_layernorm.{weight,bias}",
)
LEFT_OUT = ("{text_model,vision_model}.embeddings.position_ids",)
SIZES = """vocab_size hidden_size intermediate_size projection_dim projection_size num_hidden_layers
    num_attention_heads max_position_embeddings num_channels image_size patch_size"""
_TOWER = Fields({"hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,)}, SIZES)


@reads(
    "CLIPModel",
    *NAMES,
    "logit_scale visual_projection.weight text_projection.weight vision_model.pre_layrnorm.{weight,bias}",
    "vision_model.embeddings.{class_embedding,patch_embedding.weight}",
    left_out=LEFT_OUT,
    config=Fields({"text_config": _TOWER, "vision_config": _TOWER}, "projection_dim logit_scale_init_value"),
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` CLIPModel as that of clip's model, its class token with the place that it has."""
    state = dict(state)
    token = state.pop("vision_model.embeddings.class_embedding")
    places = state.pop("vision_model.embeddings.position_embedding.weight")
    ours = {"image.trunk.class_token.token": token + places[0], "image.trunk.position.table": places[1:]}
    for name, value in state.items():
        ours[vision_weights.renamed(name, HF)] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}


OURS = tuple(f"{{image,text}}.trunk.{name}" for name in (*OUR_BLOCK, "position.table", "norm.{gain,bias}"))


@reads(
    "clip's model",
    *OURS,
    "logits.log {image,text}.classifier.weight image.trunk.stack.entry.{gain,bias} text.trunk.embedding.weight",
    "image.trunk.{class_token.token,patches.embed.weight}",
)
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
