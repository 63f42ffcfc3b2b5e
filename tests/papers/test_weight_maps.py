"""What a weight map is given it reads, or leaves behind by a stated name, or refuses by name."""

import importlib
import pkgutil
import re

import pytest
import torch

import deltax.weights
from deltax import UserError
from deltax.claims.checking import randomise
from deltax.claims.multimodal.clip import tiny
from deltax.paper import paper_of
from deltax.papers.multimodal.clip import clip as clip_recipe
from deltax.papers.multimodal.siglip import siglip as siglip_recipe
from deltax.parts.model.mlp import MLP
from deltax.parts.model.patches import GridSinusoids
from deltax.weights.language.models import gpt as gpt_weights
from deltax.weights.multimodal import siglip as siglip_weights
from deltax.weights.vision.self_supervised import mae as mae_weights

SHAPE = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
PICTURE = {"image_size": 9, "patch_size": 3, "num_channels": 2}
WORDS = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 10}
HIERA = {"grid": (8, 16), "levels": 3, "local": 2}


def gpt2(**more):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**WORDS, n_positions=9, n_embd=12, n_layer=2, n_head=3, **more))


def siglip(shape=SHAPE, **vision):
    from transformers import SiglipConfig, SiglipModel

    text = {**shape, **WORDS, "max_position_embeddings": 7}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**shape, **PICTURE, **vision}))


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {**SHAPE, **WORDS, "max_position_embeddings": 7}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**SHAPE, **PICTURE}, projection_dim=12))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SHAPE, **PICTURE))


def dinov2():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, **PICTURE))


def swin():
    from transformers import SwinConfig, SwinForImageClassification

    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(**shape))


def mae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = ViTMAEForPreTraining(ViTMAEConfig(**SHAPE, **PICTURE, **decoder, decoder_intermediate_size=32))
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data = torch.nn.functional.pad(GridSinusoids(table.shape[-1], (3, 3)).table, (0, 0, 1, 0))[None].float()
    return model


def _hiera(kind, **more):
    import transformers

    config = transformers.HieraConfig(
        embed_dim=6, image_size=[32, 64], patch_kernel=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3],
        num_channels=2, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], query_stride=[2, 2], masked_unit_size=[8, 8],
        **more,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def hiera():
    return _hiera("HieraModel")


def hiera_pretraining():
    return _hiera("HieraForPreTraining", decoder_hidden_size=8, decoder_depth=1, decoder_num_heads=2)


def _resnet(widths):
    from transformers import ResNetConfig

    names = [f"stage{i + 1}" for i in range(len(widths))]
    return ResNetConfig(
        embedding_size=6, hidden_sizes=widths, depths=[1] * len(widths), layer_type="basic", out_features=names
    )


def resnet():
    from transformers import ResNetForImageClassification

    return ResNetForImageClassification(_resnet([8, 12]))


def resnet_backbone():
    from transformers import ResNetModel

    return ResNetModel(_resnet([8, 12]))


def _detr_config(widths):
    from transformers import DetrConfig

    return DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=_resnet(widths),
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=96, decoder_ffn_dim=96, num_queries=7, num_labels=4,
    )  # fmt: skip


def detr():
    from transformers import DetrForObjectDetection

    config = _detr_config([8, 12])
    config.backbone_config.out_features = ["stage2"]
    return DetrForObjectDetection(config)


def maskformer():
    from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation

    widths = [8, 12, 10]
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 24, "num_labels": 4}
    config = MaskFormerConfig(backbone_config=_resnet(widths), decoder_config=_detr_config(widths), **sizes)
    return MaskFormerForInstanceSegmentation(config)


def mask2former():
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=_resnet([8, 12, 10, 14]), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=64, encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=64,
        num_queries=7, num_labels=4,
    ))  # fmt: skip


def u_net():
    from diffusers import UNet2DModel

    return UNet2DModel(
        in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip


def cosmos():
    from diffusers import AutoencoderKLCosmos

    return AutoencoderKLCosmos(
        in_channels=2, out_channels=2, latent_channels=3, encoder_block_out_channels=(4, 6, 8),
        decode_block_out_channels=(6, 8, 8), attention_resolutions=(4,), resolution=16, num_layers=1, patch_size=2,
        spatial_compression_ratio=4, temporal_compression_ratio=2, latents_mean=[0.0], latents_std=[1.0],
    )  # fmt: skip


# each map: its peer, its arguments, and the names that its docstring says it leaves behind
MAPS = {
    "language.models.gpt.from_hf": (gpt2, {}, ""),
    "multimodal.clip.from_hf": (clip, {}, ""),
    "multimodal.siglip.from_hf": (siglip, {}, ""),
    "vision.backbones.vit.from_hf": (vit, {}, r"classifier\..*"),
    "vision.backbones.register_tokens.from_hf": (dinov2, {}, r"embeddings\.mask_token"),
    "vision.backbones.swin.from_hf": (swin, {}, r"classifier\..*"),
    "vision.self_supervised.mae.from_hf": (mae, {"channels": 2}, ""),
    "vision.backbones.hiera.from_hf": (hiera, HIERA, r"pooler\..*"),
    "vision.backbones.hiera.pretraining_from_hf": (hiera_pretraining, HIERA, ""),
    "vision.backbones.resnet.from_hf": (resnet, {}, ""),
    "vision.backbones.resnet.backbone_from_hf": (resnet_backbone, {}, ""),
    "vision.backbones.u_net.from_hf": (u_net, {}, r"time_embedding\..*"),
    "vision.video.cosmos_tokenizer.from_hf": (cosmos, {}, ""),
    "detection.detr.from_hf": (detr, {}, ""),
    "detection.maskformer.from_hf": (maskformer, {}, r"criterion\.empty_weight"),
    "detection.mask2former.from_hf": (mask2former, {}, r"criterion\.empty_weight"),
}


def test_every_map_is_tried():
    found = set()
    for module in pkgutil.walk_packages(deltax.weights.__path__, "deltax.weights."):
        names = vars(importlib.import_module(module.name)).items()
        own = (name for name, f in names if getattr(f, "__module__", "") == module.name and name.endswith("from_hf"))
        found |= {f"{module.name.removeprefix('deltax.weights.')}.{name}" for name in own if name[0] != "_"}
    assert found == MAPS.keys()


@pytest.mark.parametrize("title", MAPS)
def test_each_entry_is_read_or_refused_by_name(title):
    """An entry beside any other is refused; another value of any entry changes what comes out, or raises UserError."""
    module, _, function = title.rpartition(".")
    make, given, left = MAPS[title]
    torch.manual_seed(0)
    state = make().state_dict()
    convert = lambda state: getattr(importlib.import_module(f"deltax.weights.{module}"), function)(state, **given)
    plain = convert(state)
    kinds = {re.sub(r"\d+", "*", name): name for name in state}  # one of each, not one of each block
    for i, name in enumerate(kinds.values()):
        where, _, last = name.rpartition(".")
        extra = (f"{where}.extra.{last}", f"{name}_extra", f"{where}.lora_A.weight", f"extra.{name}")[i % 4].lstrip(".")
        with pytest.raises(UserError, match=f"no map reads {re.escape(repr(extra))} of the state of"):
            convert({**state, extra: state[name]})
        try:
            changed = convert({**state, name: state[name] + 1})
        except UserError as error:
            assert name.removeprefix("transformer.") in str(error), (name, error)
            continue
        same = all(torch.equal(value, plain[key]) for key, value in changed.items())
        assert same == bool(re.fullmatch(left, name)) and changed.keys() == plain.keys(), name


def test_a_block_behind_a_gap_is_refused():
    state = {k.replace("h.1.", "h.2."): v for k, v in gpt2().state_dict().items()}
    with pytest.raises(UserError, match=r"no map reads 'h\.2\..*is a block before it missing"):
        gpt_weights.from_hf(state)


def test_positions_that_are_not_ours_are_refused():
    state = mae().state_dict()
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        with pytest.raises(UserError, match=f"{name} are not the sines and cosines of a square grid"):
            mae_weights.from_hf({**state, name: torch.zeros_like(state[name])}, channels=2)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "widen"), [(2, 4), (6, 4), (3, 5)])
def test_the_pool_of_released_towers_is_as_their_blocks_are(heads, widen):
    shape = {**SHAPE, "num_attention_heads": heads, "intermediate_size": 12 * widen}
    theirs = randomise(siglip(shape)).eval()
    recipe = (paper_of(clip_recipe)(dim=12, depth=2, heads=heads, patch=3, width=12) + siglip_recipe).set(
        MLP, widen=widen
    )
    ours, images, texts = tiny(siglip_weights.released_towers(recipe))
    ours.load_state_dict(siglip_weights.from_hf(theirs.state_dict()))
    torch.testing.assert_close(ours(images, texts), theirs(input_ids=texts, pixel_values=images).logits_per_image)
