"""Weight maps of register-tokens, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.reading import Fields, reads
from deltax.weights.vision.backbones.vit import FIELDS, SIZES, renamed
from deltax.weights.vision.backbones.vit import from_hf as vit_from_hf


@reads(
    "Dinov2WithRegistersModel",
    "embeddings.{cls_token,register_tokens,position_embeddings} embeddings.patch_embeddings.projection.{weight,bias}",
    "encoder.layer.#.attention.{q_proj,k_proj,v_proj,o_proj}.{weight,bias}",
    "encoder.layer.#.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}",
    "encoder.layer.#.{layer_scale1,layer_scale2}.lambda1 layernorm.{weight,bias}",
    left_out=("embeddings.mask_token",),
    config=Fields(
        {**FIELDS.values, "use_swiglu_ffn": (False,)},
        SIZES + " num_register_tokens layerscale_value apply_layernorm reshape_hidden_states",
    ),
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` Dinov2WithRegistersModel as that of a `ViT` with registers.

    Layer scale is folded into the maps that it follows, which are linear.
    """
    state = {k.replace("encoder.layer.", "layers."): v for k, v in state.items()}
    registers = state.pop("embeddings.register_tokens")[0]
    for name in [k for k in state if k.endswith(".lambda1")]:
        branch = {"layer_scale1.lambda1": "attention.o_proj", "layer_scale2.lambda1": "mlp.fc2"}
        block, _, scale = name.partition(".layer_scale")
        last, gain = f"{block}.{branch[f'layer_scale{scale}']}", state.pop(name)
        state[f"{last}.weight"] = gain[:, None] * state[f"{last}.weight"]
        state[f"{last}.bias"] = gain * state[f"{last}.bias"]
    norms = (("norm1", "layernorm_before"), ("norm2", "layernorm_after"))
    ours = vit_from_hf({renamed(k, norms): v for k, v in state.items()})
    ours = {k.replace("stack.blocks", "stack.inner.blocks"): v for k, v in ours.items()}
    return {**ours, "stack.registers": registers}
