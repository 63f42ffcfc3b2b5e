"""Weight maps of mask2former, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.detection.detr import BLOCK, BLOCKS_FROM_HF, CROSS, renamed
from deltax.weights.detection.maskformer import backbone_and
from deltax.weights.entries import Entries, under

_HF = (
    (r"model\.pixel_level_module\.decoder\.level_embed", "pixel_pyramid.level.weight"),
    (r"model\.pixel_level_module\.decoder\.", "pixel_pyramid."),
    (r"input_projections\.", "project."),
    (r"encoder\.layers\.(\d+)\.", r"encoder.blocks.\1."),
    (r"adapter_1\.0\.", "lateral.0.conv."),
    (r"adapter_1\.1\.", "lateral.0.norm."),
    (r"layer_1\.0\.", "smooth.0.conv."),
    (r"layer_1\.1\.", "smooth.0.norm."),
    (r"mask_projection\.", "pixels."),
    (r"self_attn\.sampling_offsets\.", "mixer.offsets."),
    (r"self_attn\.attention_weights\.", "mixer.weights."),
    (r"self_attn\.value_proj\.", "mixer.value."),
    (r"self_attn\.output_proj\.", "mixer.out."),
    (r"model\.transformer_module\.queries_embedder\.", "decoder.queries."),
    (r"model\.transformer_module\.queries_features\.", "decoder.features."),
    (r"model\.transformer_module\.level_embed\.", "decoder.level."),
    (r"model\.transformer_module\.decoder\.layers\.", "decoder.layers.blocks."),
    (r"model\.transformer_module\.decoder\.layernorm\.", "mask_head.norm."),
    (r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.", r"mask_head.mask.\1."),
    (r"class_predictor\.", "mask_head.classes."),
    *BLOCKS_FROM_HF,
)

_PIXELS, _DECODER = "model.pixel_level_module.decoder.", "model.transformer_module."
_NAMES = (
    f"{_PIXELS}level_embed",
    *under(_PIXELS, ("input_projections.*.{0,1}.{weight,bias}", "mask_projection.{weight,bias}")),
    *under(_PIXELS, ("adapter_1.{0,1}.{weight,bias}", "layer_1.{0,1}.{weight,bias}")),
    *under(f"{_PIXELS}encoder.layers.*.", BLOCK),
    f"{_PIXELS}encoder.layers.*.self_attn.{{sampling_offsets,attention_weights,value_proj,output_proj}}.{{weight,bias}}",
    *under(_DECODER, ("{queries_embedder,queries_features,level_embed}.weight", "decoder.layernorm.{weight,bias}")),
    *under(f"{_DECODER}decoder.layers.*.", (*BLOCK, *CROSS)),
    f"{_DECODER}decoder.mask_predictor.mask_embedder.*.0.{{weight,bias}}",
    "class_predictor.{weight,bias}",
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` Mask2FormerForUniversalSegmentation, on a ResNet of transformers with four maps, as
    that of a `MaskFormer` so filled."""
    with Entries(state, "Mask2FormerForUniversalSegmentation") as theirs:
        fused = theirs.matching(f"{_DECODER}decoder.layers.*.{{self,cross}}_attn.in_proj_{{weight,bias}}")
        ours = backbone_and(theirs, _NAMES, _HF)
    for name, tensor in fused.items():
        attention, _, kind = name.partition("in_proj_")
        for letter, third in zip("qkv", tensor.chunk(3), strict=True):
            ours[renamed(f"{attention}{letter}_proj.{kind}", _HF)] = third
    return ours
