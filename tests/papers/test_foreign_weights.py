"""Every map from another library reads all that it is given: another key, field or value is refused by name."""

import importlib
import pkgutil

import pytest
import torch

from deltax import UserError, recipe, weights
from deltax.claims.checking import randomise
from deltax.paper import paper_of
from deltax.papers.multimodal.clip import clip
from deltax.papers.multimodal.siglip import siglip
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.training.generate import generate
from deltax.weights.language.models import gpt as gpt_weights
from deltax.weights.language.models import transformer
from deltax.weights.multimodal import siglip as siglip_weights
from deltax.weights.reading import Fields
from deltax.weights.vision.backbones import u_net, vit


def maps():
    """Every function of deltax.weights that maps a foreign state to ours."""
    for info in pkgutil.walk_packages(weights.__path__, "deltax.weights."):
        module = importlib.import_module(info.name)
        for name, function in vars(module).items():
            if name.endswith("from_hf") and getattr(function, "__module__", "") == info.name and name[0] != "_":
                yield pytest.param(function, id=f"{info.name.removeprefix('deltax.weights.')}.{name}")


MAPS = list(maps())


def supported(fields):
    """A config that the map knows, with a field of each kind."""
    values = {k: supported(v) if isinstance(v, Fields) else v[0] for k, v in fields.values.items()}
    return values | dict.fromkeys(fields.sizes.split(), 3) | {"model_type": "x", "hidden_dropout_prob": 0.1}


def test_there_are_maps():
    assert len(MAPS) > 12


@pytest.mark.parametrize("convert", MAPS)
@pytest.mark.parametrize("key", ["extra.weight", "encoder.layers.0.gate_proj.weight", "layers.0.mlp.fc1.weight_scale"])
def test_a_key_that_no_map_reads_is_refused(convert, key):
    with pytest.raises(UserError, match=f"no map reads '{key}' of the state of "):
        convert({key: torch.zeros(2)})


@pytest.mark.parametrize("convert", [m for m in MAPS if m.values[0].reads.values])
def test_a_config_is_read_whole(convert):
    """As it is known, it passes; with a field more, less, renamed or of another value it is refused by name."""
    fields, known = convert.reads, supported(convert.reads)
    fields.check(known, "X")
    with pytest.raises(UserError, match=r"no map reads the field rope_scaling=2.0"):
        convert({}, config=known | {"rope_scaling": 2.0})
    for name, allowed in fields.values.items():
        renamed = {k: v for k, v in known.items() if k != name} | {f"{name}s": known[name]}
        with pytest.raises(UserError, match=f"lacks {name}; did you mean '{name}s'"):
            convert({}, config=renamed)
        if not isinstance(allowed, Fields):
            with pytest.raises(UserError, match=f"{name}='other' is not computed here"):
                convert({}, config=known | {name: "other"})
    nested = [name for name, allowed in fields.values.items() if isinstance(allowed, Fields)]
    for name in nested:
        with pytest.raises(UserError, match=f"{name} with hidden_act='other'|{name} with .*='other'"):
            first = next(k for k, v in fields.values[name].values.items() if not isinstance(v, Fields))
            convert({}, config=known | {name: known[name] | {first: "other"}})


def test_the_configs_of_transformers_pass_where_their_models_are_computed():
    """The claims' models: each config of the library is known whole, its other defaults are refused by value."""
    import transformers as hf

    for name, given, words in (
        ("GPT2Config", {}, ""),
        ("ViTConfig", {"layer_norm_eps": 1e-6}, ""),
        ("ViTConfig", {}, "layer_norm_eps=1e-12 is not computed here"),
        ("SwinConfig", {}, ""),
        ("HieraConfig", {}, ""),
        ("ViTMAEConfig", {"layer_norm_eps": 1e-6}, ""),
        ("Dinov2WithRegistersConfig", {}, ""),
        ("Dinov2WithRegistersConfig", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True is not computed here"),
        ("ResNetConfig", {}, ""),
        ("CLIPConfig", {}, ""),
        ("SiglipConfig", {}, ""),
        ("SiglipConfig", {"vision_config": {"vision_use_head": False}}, "vision_use_head=False is not computed here"),
        ("DetrConfig", {"backbone_config": hf.ResNetConfig()}, ""),
        ("Mask2FormerConfig", {"backbone_config": hf.ResNetConfig()}, ""),
        ("MaskFormerConfig", {"backbone_config": hf.ResNetConfig(),
                              "decoder_config": hf.DetrConfig(backbone_config=hf.ResNetConfig())}, ""),
    ):  # fmt: skip
        convert = OF[name]
        config = getattr(hf, name)(**given)
        if words:
            with pytest.raises(UserError, match=words):
                convert.reads.check(config, name)
        else:
            convert.reads.check(config, name)


OF = {
    f"{family}Config": next(p.values[0] for p in MAPS if p.id == f"{path}.from_hf")
    for family, path in {
        "GPT2": "language.models.gpt", "ViT": "vision.backbones.vit", "Swin": "vision.backbones.swin",
        "Hiera": "vision.backbones.hiera", "ViTMAE": "vision.self_supervised.mae",
        "Dinov2WithRegisters": "vision.backbones.register_tokens", "ResNet": "vision.backbones.resnet",
        "CLIP": "multimodal.clip", "Siglip": "multimodal.siglip", "Detr": "detection.detr",
        "MaskFormer": "detection.maskformer", "Mask2Former": "detection.mask2former",
    }.items()
}  # fmt: skip


def test_one_name_twice_is_refused():
    with pytest.raises(UserError, match=r"has 'layernorm.weight' twice, once as 'vit.layernorm.weight'"):
        vit.from_hf({"layernorm.weight": torch.zeros(2), "vit.layernorm.weight": torch.zeros(2)})


def test_a_key_that_is_lacking_is_named():
    with pytest.raises(UserError, match=r"the state of GPT2LMHeadModel lacks 'wte.weight'"):
        gpt_weights.from_hf({"wpe.weight": torch.zeros(2, 2)})


def test_a_u_net_with_attention_is_refused():
    from diffusers import UNet2DModel

    theirs = UNet2DModel(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                         norm_num_groups=4, attention_head_dim=4)  # fmt: skip
    with pytest.raises(UserError, match=r"no map reads 'mid_block.attentions.0"):
        u_net.from_hf(theirs.state_dict())


@pytest.mark.parametrize(
    ("title", "convert", "facts"),
    [
        ("gpt+swiglu", gpt_weights.to_hf, {"vocab": 11, "context": 9}),
        ("gpt+lora", gpt_weights.to_hf, {"vocab": 11, "context": 9}),
        ("transformer+swiglu", transformer.to_torch, {"vocab": 11, "context": 9}),
        ("vit+register-tokens", vit.to_hf, {"channels": 1, "size": 8, "classes": 3}),
    ],
)
def test_what_another_library_has_no_place_for_is_not_left_behind(title, convert, facts):
    model = recipe(title)().build(facts)
    with pytest.raises(UserError, match=r"no map reads '.*' of the state of"):
        convert(getattr(model, "trunk", model).state_dict())


# GPT-2


def gpt2(**given):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=13, n_positions=11, n_embd=15, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)
    config = GPT2Config(**sizes | given, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    theirs = randomise(GPT2LMHeadModel(config)).eval()
    ours = gpt_weights.from_config(config)().build({"vocab": 13, "context": 11}).double()
    ours.load_state_dict(gpt_weights.from_hf(theirs.state_dict(), config=config))
    return theirs, ours


CONFIGS = {
    "odd": {},
    "narrow": {"n_inner": 7, "activation_function": "gelu"},
    "relu": {"activation_function": "relu", "n_head": 5, "layer_norm_epsilon": 0.1},
}


@torch.no_grad()
@pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS)
def test_gpt2_of_any_shape_padded_and_in_pieces(given):
    """The recipe of the config gives transformers' logits: of a batch padded on either side, in pieces with a cache, of
    embeddings; and greedy continuations are the same."""
    theirs, ours = gpt2(**given)
    tokens = torch.randint(13, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    peer = theirs(tokens, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    given = {"positions": positions, "segments": 1 - mask}
    torch.testing.assert_close(ours(tokens, Context(**given))[real], peer[real])
    state = DecodingState()
    cut = [{k: v[:, a:b] for k, v in given.items()} for a, b in ((0, 4), (4, 5), (5, 6))]
    pieces = [ours(piece, Context(**c, state=state)) for piece, c in zip(tokens.split([4, 1, 1], 1), cut, strict=True)]
    torch.testing.assert_close(torch.cat(pieces, 1)[real], peer[real])
    ctx = Context(**given)
    stream = ours.position(theirs.transformer.wte(tokens), ctx)
    embedded = theirs(inputs_embeds=theirs.transformer.wte(tokens), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours.read(ours.stack(stream, ctx))[real], embedded[real])
    left = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    sent = tokens[:, :4]
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    wanted = theirs.generate(sent, attention_mask=left, **settings)
    assert torch.equal(generate(ours, sent, length=5, mask=left.bool(), temperature=0), wanted)


@torch.no_grad()
def test_gpt2_goes_there_and_back():
    """What `to_hf` gives is loaded by transformers with no key lacking or left, to the same logits."""
    theirs, ours = gpt2(n_inner=7)
    randomise(ours, seed=5)
    tokens = torch.randint(13, (2, 11))
    theirs.load_state_dict(gpt_weights.to_hf(ours.state_dict()))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens))


@pytest.mark.parametrize(("dim", "hidden"), [(7, 61), (11, 15), (768, 3072)])
def test_a_hidden_width_survives_as_a_ratio(dim, hidden):
    config = {"n_embd": dim, "n_layer": 1, "n_head": 1, "n_inner": hidden, "layer_norm_epsilon": 1e-5}
    tree = gpt_weights.from_config(supported(gpt_weights.from_hf.reads) | config)
    assert tree().build({"vocab": 2, "context": 2}).stack.blocks[0].mlp.up.out_features == hidden


def test_gpt2_with_what_gpt_has_no_part_for_is_refused():
    for given in (
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"activation_function": "silu"},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
    ):
        [(name, value)] = given.items()
        with pytest.raises(UserError, match=f"GPT2LMHeadModel with {name}={value!r} is not computed here"):
            gpt2(**given)
    theirs, ours = gpt2()
    state = theirs.state_dict()
    with pytest.raises(UserError, match=r"lm_head.weight differs from wte.weight, and gpt's head is"):
        gpt_weights.from_hf(state | {"lm_head.weight": state["lm_head.weight"] + 1})
    buffers = {"transformer.h.0.attn.bias": torch.ones(1), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    ours.load_state_dict(gpt_weights.from_hf(state | buffers))


# SigLIP


@pytest.mark.parametrize("heads", [2, 4])
def test_the_pool_of_a_released_siglip_has_the_heads_of_its_blocks(heads):
    from transformers import SiglipConfig, SiglipModel

    shape = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=48)
    config = SiglipConfig(
        text_config=dict(**shape, vocab_size=11, max_position_embeddings=7, bos_token_id=0, eos_token_id=10),
        vision_config=dict(**shape, image_size=6, patch_size=3, num_channels=2),
    )
    theirs = randomise(SiglipModel(config)).eval()
    recipe = siglip_weights.released_towers(paper_of(clip)(dim=12, depth=1, heads=heads, patch=3, width=12) + siglip)
    ours = recipe["model"](vocab=11, context=7, channels=2, size=6).double()
    state = theirs.state_dict()
    ours.load_state_dict(siglip_weights.from_hf(state, config=config))
    images, texts = torch.randn(3, 2, 6, 6).double(), torch.randint(11, (3, 7))
    peer = theirs(input_ids=texts, pixel_values=images).logits_per_image
    torch.testing.assert_close(ours(images, texts), peer)
    with pytest.raises(UserError, match=r"has no vision_model.head"):
        siglip_weights.from_hf({k: v for k, v in state.items() if not k.startswith("vision_model.head")})
