"""Weight maps of cosmos-tokenizer, from and to the state dicts of other libraries."""

import re

from torch import Tensor

from deltax.weights.reading import reads

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


_BLOCK = "{encoder,decoder}.{down_blocks.#,up_blocks.#,mid_block}"


@reads(
    "AutoencoderKLCosmos",
    "{encoder,decoder}.{conv_in,conv_out}.{conv_s,conv_t}.{weight,bias} {encoder,decoder}.norm_out.norm.{weight,bias}",
    f"{_BLOCK}.resnets.#.{{norm1,norm2}}.norm.{{weight,bias}}",
    f"{_BLOCK}.resnets.#.{{conv1,conv2}}.{{conv_s,conv_t}}.{{weight,bias}}",
    f"{_BLOCK}.resnets.#.conv_shortcut.{{weight,bias}}",
    f"{_BLOCK}.{{attentions,temp_attentions}}.#.{{norm.norm,to_q,to_k,to_v,to_out.0}}.{{weight,bias}}",
    f"{_BLOCK}.{{downsamplers,upsamplers}}.0.{{conv1,conv2,conv3}}.{{weight,bias}}",
    "{quant_conv,post_quant_conv}.{weight,bias}",
    left_out=("{encoder.patch_embed,decoder.unpatch_embed}.{wavelets,_arange}",),  # buffers of the Haar wavelets
)
def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a diffusers AutoencoderKLCosmos as that of an `Autoencoder` of these parts."""
    ours = {}
    for name, value in state.items():
        for theirs, mine in _HF:
            name = re.sub(theirs, mine, name)
        linear = ".project." in name and value.ndim > 1
        ours[name] = (value.flatten(1) if linear else value).contiguous()
    return ours
