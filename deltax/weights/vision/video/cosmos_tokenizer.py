"""Weight maps of cosmos-tokenizer, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.entries import Entries

_HF = (
    (r"^quant_conv", "encoder.point"),
    (r"^post_quant_conv", "decoder.point"),
    (r"\.conv_in\.", ".enter."),
    (r"\.conv_out\.", ".leave."),
    (r"\.norm_out\.norm", ".norm"),
    (r"conv_s\.", "0."),
    (r"conv_t\.", "1."),
    (r"conv_shortcut", "shortcut"),
    (r"\.(norm[12])\.norm", r".\1"),
    (r"(down|up)_blocks", "levels"),
    (r"mid_block", "middle"),
    (r"resnets", "units"),
    (r"temp_attentions\.(\d+)\.norm\.norm", r"attention.\1.time_norm"),
    (r"attentions\.(\d+)\.norm\.norm", r"attention.\1.space_norm"),
    (r"temp_attentions\.(\d+)\.to_", r"attention.\1.time.inner.project.to_"),
    (r"attentions\.(\d+)\.to_", r"attention.\1.space.inner.project.to_"),
    (r"to_q", "query"),
    (r"to_k", "key"),
    (r"to_v", "value"),
    (r"to_out\.0", "out"),
    (r"levels\.(\d+)\.downsamplers\.0\.conv1", r"shrink.\1.plane"),
    (r"levels\.(\d+)\.downsamplers\.0\.conv2", r"shrink.\1.time"),
    (r"levels\.(\d+)\.downsamplers\.0\.conv3", r"shrink.\1.point"),
    (r"levels\.(\d+)\.upsamplers\.0\.conv1", r"grow.\1.time"),
    (r"levels\.(\d+)\.upsamplers\.0\.conv2", r"grow.\1.plane"),
    (r"levels\.(\d+)\.upsamplers\.0\.conv3", r"grow.\1.point"),
)

_LEVELS = "{en,de}coder.{{down,up}_blocks.*,mid_block}."
_NAMES = (
    "{post_,}quant_conv",
    "{en,de}coder.conv_{in,out}.conv_{s,t}",
    "{en,de}coder.norm_out.norm",
    _LEVELS + "resnets.*.{conv1.conv_s,conv1.conv_t,conv2.conv_s,conv2.conv_t,norm1.norm,norm2.norm,conv_shortcut}",
    _LEVELS + "{temp_,}attentions.*.{norm.norm,to_q,to_k,to_v,to_out.0}",
    _LEVELS + "{down,up}samplers.0.conv{1,2,3}",
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a diffusers AutoencoderKLCosmos as that of an `Autoencoder` of these parts."""
    with Entries(state, "AutoencoderKLCosmos") as theirs:
        named = theirs.matching(*(f"{words}.{{weight,bias}}" for words in _NAMES))
    ours = {}
    for name, value in named.items():
        for theirs, mine in _HF:
            name = re.sub(theirs, mine, name)
        linear = ".project." in name and value.ndim > 1
        ours[name] = (value.flatten(1) if linear else value).contiguous()
    return ours
