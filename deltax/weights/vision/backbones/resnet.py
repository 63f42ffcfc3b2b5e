"""Weight maps of resnet, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.reading import Fields, reads

_HF = (
    (r"embedder\.embedder\.", "stem."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.", r"stages.\1.\2.branch.\3."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.", r"stages.\1.\2.shortcut."),
)


_KINDS = "{convolution.weight,normalization.weight,normalization.bias,normalization.running_mean,\
normalization.running_var,normalization.num_batches_tracked}"
TRUNK = (
    f"embedder.embedder.{_KINDS}",
    f"encoder.stages.#.layers.#.shortcut.{_KINDS}",
    f"encoder.stages.#.layers.#.layer.#.{_KINDS}",
)
FIELDS = Fields(
    {"hidden_act": ("relu",), "downsample_in_first_stage": (False,), "downsample_in_bottleneck": (False,)},
    "num_channels embedding_size hidden_sizes depths layer_type",
)


@reads("ResNetModel", *TRUNK, config=FIELDS)
def backbone_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ResNetModel as that of a `Backbone`."""
    return {
        _renamed(k.replace(".convolution.", ".conv.").replace(".normalization.", ".norm.")): v for k, v in state.items()
    }


@reads(
    "ResNetForImageClassification",
    *(f"resnet.{name}" for name in TRUNK),
    "classifier.1.{weight,bias}",
    config=FIELDS,
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ResNetForImageClassification as that of a `ResNet`."""
    inside = {k.removeprefix("resnet."): v for k, v in state.items() if k.startswith("resnet.")}
    last = {f"classifier.{kind}": state[f"classifier.1.{kind}"] for kind in ("weight", "bias")}
    return {f"backbone.{k}": v for k, v in backbone_from_hf(inside).items()} | last


def _renamed(name: str) -> str:
    for pattern, ours in _HF:
        name = re.sub(f"^{pattern}", ours, name)
    return name
