"""Weight maps of mask2former, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.detection.detr import BLOCKS_FROM_HF
from deltax.weights.detection.maskformer import BACKBONE, converted
from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones.resnet import FIELDS as RESNET

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


_DECODER, _QUERIES = "model.pixel_level_module.decoder", "model.transformer_module"
_CROSS = "cross_attn.{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}"


@reads(
    "Mask2FormerForUniversalSegmentation",
    *BACKBONE,
    f"{_DECODER}.level_embed {_DECODER}.input_projections.#.#.{{weight,bias}}",
    f"{_DECODER}.{{mask_projection,adapter_1.#,layer_1.#}}.{{weight,bias}}",
    f"{_DECODER}.encoder.layers.#.self_attn.{{sampling_offsets,attention_weights}}.{{weight,bias}}",
    f"{_DECODER}.encoder.layers.#.self_attn.{{value_proj,output_proj}}.{{weight,bias}}",
    f"{_DECODER}.encoder.layers.#.{{self_attn_layer_norm,final_layer_norm,fc1,fc2}}.{{weight,bias}}",
    f"{_QUERIES}.{{queries_embedder,queries_features,level_embed}}.weight {_QUERIES}.decoder.layernorm.{{weight,bias}}",
    f"{_QUERIES}.decoder.layers.#.self_attn.{{q_proj,k_proj,v_proj,out_proj}}.{{weight,bias}}",
    f"{_QUERIES}.decoder.layers.#.{_CROSS}",
    f"{_QUERIES}.decoder.layers.#.{{self_attn,cross_attn,final}}_layer_norm.{{weight,bias}}",
    f"{_QUERIES}.decoder.layers.#.{{fc1,fc2}}.{{weight,bias}}",
    f"{_QUERIES}.decoder.mask_predictor.mask_embedder.#.#.{{weight,bias}} class_predictor.{{weight,bias}}",
    left_out=("criterion.empty_weight",),  # of the loss
    config=Fields(
        {
            "backbone_config": RESNET,
            "activation_function": ("relu",),
            "pre_norm": (False,),
            "enforce_input_projection": (False,),
            "common_stride": (4,),
            "feature_strides": ([4, 8, 16, 32],),
        },
        "feature_size mask_feature_size hidden_dim encoder_feedforward_dim encoder_layers decoder_layers "
        "num_attention_heads dim_feedforward num_queries ignore_value train_num_points oversample_ratio "
        "importance_sample_ratio use_timm_backbone use_pretrained_backbone backbone backbone_kwargs",
    ),
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
    return converted(whole, _HF)
