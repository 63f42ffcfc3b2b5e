"""Weight maps of detr, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.entries import Entries, under
from deltax.weights.vision.backbones.resnet import backbone_from_hf

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

_NAMES = "{q,k,v,o,out}_proj.{weight,bias}"
BLOCK = (
    f"self_attn.{_NAMES}",
    "{self_attn,final}_layer_norm.{weight,bias}",
    "{mlp.,}fc{1,2}.{weight,bias}",
)
CROSS = (f"{{encoder,cross}}_attn.{_NAMES}", "{encoder,cross}_attn_layer_norm.{weight,bias}")


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` DetrForObjectDetection, on a ResNet of transformers, as that of a `DETR`."""
    inside = "model.backbone.model."
    with Entries(state, "DetrForObjectDetection") as theirs:
        backbone = backbone_from_hf(theirs.matching(f"{inside}**"), prefix=inside)
        named = theirs.matching(
            *("model.input_projection.{weight,bias}", "model.query_position_embeddings.weight"),
            *("model.decoder.layernorm.{weight,bias}", "class_labels_classifier.{weight,bias}"),
            *("bbox_predictor.layers.*.{weight,bias}", *under("model.encoder.layers.*.", BLOCK)),
            *under("model.decoder.layers.*.", (*BLOCK, *CROSS)),
        )
    return {f"backbone.{k}": v for k, v in backbone.items()} | {renamed(k, _HF): v for k, v in named.items()}


def renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """The name after every pattern has been replaced, one after the other."""
    for pattern, word in patterns:
        name = re.sub(pattern, word, name)
    return name
