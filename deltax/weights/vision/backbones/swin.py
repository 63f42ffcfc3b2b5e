"""Weight maps of swin, from and to the state dicts of other libraries."""

from torch import Tensor

from deltax.weights.entries import Entries, under
from deltax.weights.vision.backbones.vit import BLOCK, renamed

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

_BLOCKS = "encoder.layers.*.blocks.*."
_TABLE = "attention.relative_position_bias.relative_position_bias_table"


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` SwinModel as that of a `ViT` with this stack; a classifier is left behind. The
    epsilon of its norms is 1e-5."""
    with Entries(state, "SwinModel", prefix="swin.") as theirs:
        # which row of the table a pair reads follows from the window
        theirs.leave("classifier.{weight,bias}", "encoder.**.relative_position_index")
        named = theirs.matching(
            *("embeddings.{norm,patch_embeddings.projection}.{weight,bias}", "layernorm.{weight,bias}"),
            *(
                "encoder.layers.*.downsample.{norm.weight,norm.bias,reduction.weight}",
                *under(_BLOCKS, (*BLOCK, _TABLE)),
            ),
        )
    ours = {}
    for name, value in named.items():
        name = renamed(name, _HF)
        if ".downsample." in name:
            stage, _, rest = name.removeprefix("stack.stages.").partition(".downsample.")
            name = f"stack.merges.{stage}.{rest.replace('reduction', 'reduce')}"
        ours[name] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}
