"""Weight maps of u-net, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.reading import reads

_ROOMS = (
    (r"conv_in\.", "into."),
    (r"conv_norm_out\.", "norm."),
    (r"conv_out\.", "out."),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"shrink.\1."),
    (r"mid_block\.resnets\.(\d+)\.", r"middle.\1."),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)\.", r"up.\1.\2."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r"grow.\1."),
)
_THINGS = {"conv1.": "first.", "conv2.": "second.", "time_emb_proj.": "condition.", "conv_shortcut.": "shortcut."}


@reads(
    "UNet2DModel",
    "{conv_in,conv_norm_out,conv_out}.{weight,bias}",
    "{down_blocks.#,up_blocks.#,mid_block}.resnets.#.{norm1,norm2,conv1,conv2,time_emb_proj,conv_shortcut}.{weight,bias}",
    "down_blocks.#.downsamplers.0.conv.{weight,bias} up_blocks.#.upsamplers.0.conv.{weight,bias}",
    left_out=("time_embedding.{linear_1,linear_2}.{weight,bias} time_proj.weight",),
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `diffusers` UNet2DModel without attention as that of a `UNet` of `Conditioned` units.

    Its embedding of the time, which stays outside, is left out.
    """
    ours = {}
    for name, value in state.items():
        for pattern, room in _ROOMS:
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", room, name)
                for theirs, thing in _THINGS.items():
                    name = name.replace(theirs, thing)
                ours[name] = value
    return ours
