"""Weight maps of maskformer, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.detection.detr import BLOCKS_FROM_HF, LAYER, renamed
from deltax.weights.detection.detr import FIELDS as DETR
from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones.resnet import FIELDS as RESNET
from deltax.weights.vision.backbones.resnet import TRUNK, backbone_from_hf

_HF = (
    (r"model\.pixel_level_module\.decoder\.", "pixel_pyramid."),
    (r"fpn\.layers\.(\d+)\.proj\.", r"lateral.\1."),
    (r"fpn\.layers\.(\d+)\.block\.", r"smooth.\1."),
    (r"fpn\.stem\.", "stem."),
    (r"(lateral\.\d+|smooth\.\d+|stem)\.0\.", r"\1.conv."),
    (r"(lateral\.\d+|smooth\.\d+|stem)\.1\.", r"\1.norm."),
    (r"mask_projection\.", "pixels."),
    (r"model\.transformer_module\.input_projection\.", "pixel_pyramid.project."),
    (r"model\.transformer_module\.queries_embedder\.", "decoder.queries."),
    (r"model\.transformer_module\.decoder\.layers\.", "decoder.layers.blocks."),
    (r"model\.transformer_module\.decoder\.layernorm\.", "mask_head.norm."),
    (r"class_predictor\.", "mask_head.classes."),
    (r"mask_embedder\.(\d)\.0\.", r"mask_head.mask.\1."),
    *BLOCKS_FROM_HF,
)


BACKBONE = tuple(f"model.pixel_level_module.encoder.{name}" for name in TRUNK)
_DECODER, _QUERIES = "model.pixel_level_module.decoder", "model.transformer_module"


@reads(
    "MaskFormerForInstanceSegmentation",
    *BACKBONE,
    f"{_DECODER}.fpn.stem.#.{{weight,bias}} {_DECODER}.fpn.layers.#.{{proj,block}}.#.{{weight,bias}}",
    f"{_DECODER}.mask_projection.{{weight,bias}} {_QUERIES}.queries_embedder.weight",
    f"{_QUERIES}.input_projection.{{weight,bias}} {_QUERIES}.decoder.layernorm.{{weight,bias}}",
    *(f"{_QUERIES}.decoder.layers.#.{name}" for name in LAYER),
    "class_predictor.{weight,bias} mask_embedder.#.#.{weight,bias}",
    left_out=("criterion.empty_weight",),  # of the loss
    config=Fields(
        {"backbone_config": RESNET, "decoder_config": DETR},
        "fpn_feature_size mask_feature_size num_attention_heads num_hidden_layers",
    ),
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` MaskFormerForInstanceSegmentation, on a ResNet of transformers whose last map is
    not as wide as the queries, as that of a `MaskFormer`."""
    return converted(state, _HF)


def converted(state: dict[str, Tensor], patterns: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The state of a model on a ResNet, the names of the rest after every pattern."""
    inside = "model.pixel_level_module.encoder."
    backbone = backbone_from_hf({k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)})
    rest = (name for name in state if not name.startswith(inside))
    return {f"backbone.{k}": v for k, v in backbone.items()} | {renamed(k, patterns): state[k] for k in rest}
