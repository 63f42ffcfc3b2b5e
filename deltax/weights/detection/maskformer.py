"""Weight maps of maskformer, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.detection.detr import BLOCK, BLOCKS_FROM_HF, CROSS, renamed
from deltax.weights.entries import Entries, under
from deltax.weights.vision.backbones.resnet import backbone_from_hf

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


_PIXELS = "model.pixel_level_module.decoder."
_NAMES = (
    *under(f"{_PIXELS}fpn.", ("layers.*.{proj,block}.{0,1}.{weight,bias}", "stem.{0,1}.{weight,bias}")),
    *(f"{_PIXELS}mask_projection.{{weight,bias}}", "model.transformer_module.input_projection.{weight,bias}"),
    *("model.transformer_module.queries_embedder.weight", "model.transformer_module.decoder.layernorm.{weight,bias}"),
    *under("model.transformer_module.decoder.layers.*.", (*BLOCK, *CROSS)),
    *("class_predictor.{weight,bias}", "mask_embedder.*.0.{weight,bias}"),
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` MaskFormerForInstanceSegmentation, on a ResNet of transformers whose last map is
    not as wide as the queries, as that of a `MaskFormer`."""
    with Entries(state, "MaskFormerForInstanceSegmentation") as theirs:
        return backbone_and(theirs, _NAMES, _HF)


def backbone_and(theirs: Entries, names: tuple[str, ...], patterns: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Our names for the entries of the ResNet and for those that match `names`; the weights of the loss are left."""
    theirs.leave("criterion.empty_weight")  # it follows from the number of classes
    inside = "model.pixel_level_module.encoder."
    backbone = backbone_from_hf(theirs.matching(f"{inside}**"), prefix=inside)
    ours = {f"backbone.{k}": v for k, v in backbone.items()}
    return ours | {renamed(k, patterns): v for k, v in theirs.matching(*names).items()}
