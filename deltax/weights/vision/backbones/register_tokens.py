"""Weight maps of register-tokens, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.entries import Entries, under
from deltax.weights.vision.backbones.vit import from_hf as vit_from_hf
from deltax.weights.vision.backbones.vit import renamed

_BLOCK = (
    "norm{1,2}.{weight,bias}",
    "attention.{q,k,v,o}_proj.{weight,bias}",
    "mlp.fc{1,2}.{weight,bias}",
    "layer_scale{1,2}.lambda1",
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` Dinov2WithRegistersModel as that of a `ViT` with registers.

    Layer scale is folded into the maps that it follows, which are linear.
    """
    with Entries(state, "Dinov2WithRegistersModel") as theirs:
        theirs.leave("embeddings.mask_token")
        registers = theirs.take("embeddings.register_tokens")[0]
        named = theirs.matching(
            "embeddings.{cls_token,position_embeddings,patch_embeddings.projection.weight}",
            *(
                "embeddings.patch_embeddings.projection.bias",
                "layernorm.{weight,bias}",
                *under("encoder.layer.*.", _BLOCK),
            ),
        )
    state = {k.replace("encoder.layer.", "layers."): v for k, v in named.items()}
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
