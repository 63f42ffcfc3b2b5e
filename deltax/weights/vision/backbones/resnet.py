"""Weight maps of resnet, from and to the state dicts of other libraries."""

import re

from torch import Tensor

_HF = (
    (r"embedder\.embedder\.", "stem."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.", r"stages.\1.\2.branch.\3."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.", r"stages.\1.\2.shortcut."),
)


def backbone_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ResNetModel as that of a `Backbone`."""
    return {
        _renamed(k.replace(".convolution.", ".conv.").replace(".normalization.", ".norm.")): v for k, v in state.items()
    }


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ResNetForImageClassification as that of a `ResNet`."""
    inside = {k.removeprefix("resnet."): v for k, v in state.items() if k.startswith("resnet.")}
    last = {f"classifier.{kind}": state[f"classifier.1.{kind}"] for kind in ("weight", "bias")}
    return {f"backbone.{k}": v for k, v in backbone_from_hf(inside).items()} | last


def _renamed(name: str) -> str:
    for pattern, ours in _HF:
        name = re.sub(f"^{pattern}", ours, name)
    return name
