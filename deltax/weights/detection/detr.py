"""Weight maps of detr, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones.resnet import FIELDS as RESNET
from deltax.weights.vision.backbones.resnet import TRUNK, backbone_from_hf

BLOCKS_FROM_HF = (
    (r"self_attn_layer_norm\.", "mixer_residual.norm."),
    (r"(encoder|cross)_attn_layer_norm\.", "cross_residual.norm."),
    (r"final_layer_norm\.", "mlp_residual.norm."),
    (r"self_attn\.", "mixer.project."),
    (r"(encoder|cross)_attn\.", "cross.project."),
    (r"(mlp\.)?fc1\.", "mlp.up."),
    (r"(mlp\.)?fc2\.", "mlp.down."),
    (r"project\.q_proj\.", "project.query."),
    (r"project\.k_proj\.", "project.key."),
    (r"project\.v_proj\.", "project.value."),
    (r"project\.(o|out)_proj\.", "project.out."),
    (r"(residual|head)\.norm\.weight$", r"\1.norm.gain"),
)
_HF = (
    (r"model\.input_projection\.", "project."),
    (r"model\.query_position_embeddings\.", "queries."),
    (r"model\.(en|de)coder\.layers\.(\d+)\.", r"\1coder.blocks.\2."),
    (r"model\.decoder\.layernorm\.", "detection_head.norm."),
    (r"class_labels_classifier\.", "detection_head.classes."),
    (r"bbox_predictor\.layers\.", "detection_head.box."),
    *BLOCKS_FROM_HF,
)


LAYER = (
    "{self_attn,encoder_attn}.{q_proj,k_proj,v_proj,o_proj}.{weight,bias}",
    "{self_attn_layer_norm,encoder_attn_layer_norm,final_layer_norm,mlp.fc1,mlp.fc2}.{weight,bias}",
)
FIELDS = Fields(
    {
        "backbone_config": RESNET,
        "activation_function": ("relu",),
        "position_embedding_type": ("sine",),
        "dilation": (False,),
    },
    "num_channels num_queries encoder_layers encoder_ffn_dim encoder_attention_heads decoder_layers decoder_ffn_dim "
    "decoder_attention_heads d_model backbone use_timm_backbone use_pretrained_backbone backbone_kwargs",
)


@reads(
    "DetrForObjectDetection",
    *(f"model.backbone.model.{name}" for name in TRUNK),
    *(f"model.{{encoder,decoder}}.layers.#.{name}" for name in LAYER),
    "model.input_projection.{weight,bias} model.query_position_embeddings.weight model.decoder.layernorm.{weight,bias}",
    "class_labels_classifier.{weight,bias} bbox_predictor.layers.#.{weight,bias}",
    config=FIELDS,
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` DetrForObjectDetection, on a ResNet of transformers, as that of a `DETR`."""
    inside = "model.backbone.model."
    backbone = backbone_from_hf({k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)})
    ours = {f"backbone.{k}": v for k, v in backbone.items()}
    for name in state.keys() - {k for k in state if k.startswith(inside)}:
        ours[renamed(name, _HF)] = state[name]
    return ours


def renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """The name after every pattern has been replaced, one after the other."""
    for pattern, word in patterns:
        name = re.sub(pattern, word, name)
    return name
