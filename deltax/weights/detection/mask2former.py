"""Weight maps of mask2former, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.detection.detr import BLOCKS_FROM_HF
from deltax.weights.detection.maskformer import from_hf as maskformer_from_hf

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


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` Mask2FormerForUniversalSegmentation, on a ResNet of transformers with four maps, as
    that of a `MaskFormer` so filled."""
    whole = {}
    for name, tensor in state.items():
        kind = name.rpartition("in_proj_")[2]
        if kind == name:
            whole[name] = tensor
            continue
        for letter, third in zip("qkv", tensor.chunk(3), strict=True):
            whole[name.replace(f"in_proj_{kind}", f"{letter}_proj.{kind}")] = third
    return maskformer_from_hf(whole, _HF)
