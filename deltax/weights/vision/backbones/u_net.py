"""Weight maps of u-net, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.entries import Entries

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

_NAMES = (
    "conv_{in,norm_out,out}",
    "{down,up}_blocks.*.resnets.*.{norm1,conv1,norm2,conv2,time_emb_proj,conv_shortcut}",
    "mid_block.resnets.*.{norm1,conv1,norm2,conv2,time_emb_proj,conv_shortcut}",
    "{down_blocks.*.downsamplers,up_blocks.*.upsamplers}.0.conv",
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `diffusers` UNet2DModel without attention as that of a `UNet` of `Conditioned` units.

    Its embedding of the time, which stays outside, is left out.
    """
    with Entries(state, "UNet2DModel") as theirs:
        theirs.leave("time_embedding.linear_{1,2}.{weight,bias}")
        named = theirs.matching(*(f"{words}.{{weight,bias}}" for words in _NAMES))
    ours = {}
    for name, value in named.items():
        for pattern, room in _ROOMS:
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", room, name)
                for theirs, thing in _THINGS.items():
                    name = name.replace(theirs, thing)
                ours[name] = value
    return ours
