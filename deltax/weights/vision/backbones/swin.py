"""Weight maps of swin, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones.vit import renamed

_HF = (
    ("embeddings.patch_embeddings.projection", "patches.embed"),
    ("embeddings.norm", "stack.entry"),
    ("layernorm", "norm"),
    ("encoder.layers", "stack.stages"),
    ("layernorm_before", "mixer_residual.norm"),
    ("layernorm_after", "mlp_residual.norm"),
    ("attention.relative_position_bias.relative_position_bias_table", "mixer.inner.score.table"),
    ("attention.q_proj", "mixer.inner.project.query"),
    ("attention.k_proj", "mixer.inner.project.key"),
    ("attention.v_proj", "mixer.inner.project.value"),
    ("attention.o_proj", "mixer.inner.project.out"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("norm.weight", "norm.gain"),
    ("entry.weight", "entry.gain"),
)


_INSIDE = "encoder.layers.#.blocks.#"


@reads(
    "SwinModel",
    "embeddings.patch_embeddings.projection.{weight,bias} embeddings.norm.{weight,bias} layernorm.{weight,bias}",
    f"{_INSIDE}.attention.{{q_proj,k_proj,v_proj,o_proj}}.{{weight,bias}}",
    f"{_INSIDE}.attention.relative_position_bias.relative_position_bias_table",
    f"{_INSIDE}.{{layernorm_before,layernorm_after,mlp.fc1,mlp.fc2}}.{{weight,bias}}",
    "encoder.layers.#.downsample.{reduction.weight,norm.weight,norm.bias}",
    left_out=(
        "classifier.{weight,bias} embeddings.mask_token",
        f"{_INSIDE}.attention.relative_position_bias.relative_position_index",
    ),
    prefix="swin.",
    config=Fields(
        {"hidden_act": ("gelu",), "layer_norm_eps": (1e-5,), "use_absolute_embeddings": (False,), "qkv_bias": (True,)},
        "image_size patch_size num_channels embed_dim depths num_heads window_size mlp_ratio encoder_stride num_layers "
        "hidden_size",
    ),
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` SwinModel as that of a `ViT` with this stack; the epsilon of its norms is 1e-5. A
    classifier and a mask are left behind."""
    ours = {}
    for name, value in state.items():
        name = renamed(name, _HF)
        if ".downsample." in name:
            stage, _, rest = name.removeprefix("stack.stages.").partition(".downsample.")
            name = f"stack.merges.{stage}.{rest.replace('reduction', 'reduce')}"
        ours[name] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}
