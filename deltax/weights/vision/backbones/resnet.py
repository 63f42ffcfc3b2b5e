"""Weight maps of resnet, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.entries import Entries

_HF = (
    (r"embedder\.embedder\.", "stem."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.", r"stages.\1.\2.branch.\3."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.", r"stages.\1.\2.shortcut."),
)

_UNITS = ("embedder.embedder", "encoder.stages.*.layers.*.{layer.*,shortcut}")
_ENTRIES = (
    "convolution.weight",
    "normalization.{weight,bias,running_mean,running_var,num_batches_tracked}",
)


def backbone_from_hf(state: dict[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """The state of a `transformers` ResNetModel, whose names may have a prefix, as that of a `Backbone`."""
    with Entries(state, "ResNetModel", prefix=prefix) as theirs:
        named = theirs.matching(*(f"{unit}.{entry}" for unit in _UNITS for entry in _ENTRIES))
    return {
        _renamed(k.replace(".convolution.", ".conv.").replace(".normalization.", ".norm.")): v for k, v in named.items()
    }


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ResNetForImageClassification as that of a `ResNet`."""
    with Entries(state, "ResNetForImageClassification") as theirs:
        backbone = backbone_from_hf(theirs.matching("resnet.**"), prefix="resnet.")
        last = {f"classifier.{kind}": theirs.take(f"classifier.1.{kind}") for kind in ("weight", "bias")}
    return {f"backbone.{k}": v for k, v in backbone.items()} | last


def _renamed(name: str) -> str:
    for pattern, ours in _HF:
        name = re.sub(f"^{pattern}", ours, name)
    return name
