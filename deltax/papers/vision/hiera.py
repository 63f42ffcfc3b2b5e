"""Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles. Ryali, Hu, Bolya, Wei, Fan, Huang, Aggarwal,
Chowdhury, Poursaeed, Hoffman, Malik, Li, Feichtenhofer, 2023. arXiv:2306.00989

A ViT with pooled attention, but nothing else: early attention stays inside mask units, and what convolutions and
relative positions used to bring is left to MAE to teach.

A mask unit is what one token of the last stage has come from, a square of patches. Masking whole units makes MAE sparse
on a pyramid too: no pooling and no local attention ever mixes a unit that is seen with one that is not. For the
decoder, every stage's view of a unit is mapped to the last stage's width, and summed. `vit+q-pooled-attention+hiera`
classifies; `vit+mae+q-pooled-attention+hiera` is pre-trained. The released models embed patches by 7 x 7 convolutions
of stride 4, fill `OverlappingPatches`, have units of 8 x 8 patches, and mask 60 % of them; the two last stages, and
the first block of the third, see everything.

Pooling is the largest of 2 x 2, of the queries and of what goes past them, and the classifier reads the mean of all
elements, normed after it. A released model that classifies pools three times. The same model is pre-trained with two
poolings, so that a unit ends as 2 x 2 elements and its last two stages are of one size; the published code fuses only
the stages up to there. Here pre-training pools as often as the classifier does, to one element a unit.
"""

import re

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper, part
from deltax.paper import paper_of
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.papers.vision.mae import keep, mae, masked_error, probe, standardised
from deltax.papers.vision.q_pooled_attention import ZOrdered, q_pooled_attention, z_order
from deltax.papers.vision.vit import ViT, renamed, vit
from deltax.parts.checking import assert_equal, faster, gradients, randomise, same_gradients
from deltax.parts.context import Context
from deltax.parts.linear import Glorot
from deltax.parts.nothing import Nothing
from deltax.parts.patches import Grid, LearnedGrid, Mean, Patches, Pooled, pair, patchify, unpatchify
from deltax.parts.stack import Stages
from deltax.shapes import Images, OtherStream, Stream


class MaskUnits(nn.Module):
    """The inner mixer, inside each run of `unit` elements alone. Stream (B, T, D) -> (B, T', D')."""

    def __init__(self, dim: int, *, inner: Part, unit: int):
        super().__init__()
        self.unit = unit
        self.inner = inner(dim)

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        units = self.inner(x.unflatten(1, (-1, self.unit)).flatten(0, 1), Context())
        return units.unflatten(0, (len(x), -1)).flatten(1, 2)


class Fused(nn.Module):
    """The last stage's view of each unit, and every earlier one's mapped to it, summed. Stream (B, T, D) -> (B, U, W).

    The inner part is `Stages` whose merges pool by `stride`, to one element a unit.
    """

    def __init__(self, dim: int, *, inner: Part, stride: int = 4, embed: Part = part(Glorot)):
        super().__init__()
        self.inner = inner(dim)
        self.width = self.inner.width
        levels = len(self.inner.merges)
        self.heads = nn.ModuleList(embed(dim * 2**i * stride ** (levels - i), self.width) for i in range(levels))

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        *views, last = self.inner.each(x, ctx)
        for head, view in zip(self.heads, views, strict=True):
            last = last + head(view.reshape(*last.shape[:2], -1))
        return last


class InUnits(nn.Module):
    """The inner trunk, as one whose tokens are mask units of 2^levels x 2^levels patches."""

    def __init__(self, channels: int, size: int | Grid, *, inner: Part, levels: int = 1):
        super().__init__()
        self.inner = inner(channels, size)
        self.width, self.prefix = self.inner.width, self.inner.prefix
        self.unit = 4**levels
        rows, columns = self.inner.grid
        self.grid = rows // 2**levels, columns // 2**levels

    def tokens(self, images: Images) -> Tensor:
        """The patches of each unit, (B, U, T / U, D)."""
        return self.inner.tokens(images).unflatten(1, (-1, self.unit))

    def read(self, units: Tensor) -> Stream:
        """What the trunk makes of these units, (B, N, W)."""
        return self.inner.read(units.flatten(1, 2))

    def forward(self, images: Images) -> Stream:
        return self.read(self.tokens(images))


class OverlappingPatches(nn.Module):
    """A convolution of `reach` x `reach` pixels and stride `patch`. Images (B, C, Y, X) -> stream (B, T, D)."""

    raster = True

    def __init__(self, channels: int, dim: int, *, patch: int = 4, reach: int = 7):
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(channels, dim, reach, stride=patch, padding=reach // 2)

    def grid(self, size: int | Grid) -> Grid:
        rows, columns = pair(size)
        if rows % self.patch or columns % self.patch:
            raise UserError(f"an image of {rows} x {columns} pixels is no multiple of the stride {self.patch}")
        return rows // self.patch, columns // self.patch

    def forward(self, images: Images) -> Stream:
        return self.conv(images).flatten(2).mT


class NormedMean(Mean):
    """The mean over the stream, then its norm. (B, T, D) -> (B, D)."""

    def __init__(self, dim: int, *, norm: Part):
        super().__init__(dim)
        self.norm = norm(dim)

    def forward(self, x: Stream) -> Pooled:
        return self.norm(super().forward(x))


@paper(
    on=(mae, q_pooled_attention),
    replaces=(mae, q_pooled_attention),
    year=2023,
    arxiv="2306.00989",
    whole="vit+q-pooled-attention",
)
def hiera(recipe: Part, *, local: int = 1) -> Part:
    """Attention inside mask units in the first `local` stages and the merges after them."""
    masked = "pixel_decoder" in recipe.slots()
    trunk = recipe["model.trunk"]
    if trunk["stack"].make is not Stages:
        raise UserError(f"{recipe.title} has no stages to keep local; write vit+q-pooled-attention+hiera")
    stages, merges, norm = list(trunk["stack.stages"]), list(trunk["stack.merges"]), trunk["norm"]
    levels = len(merges)
    for i in range(min(local, len(stages))):
        stages[i] = stages[i].wrap("mixer", MaskUnits, unit=4 ** (levels - i))
        if i < levels:
            merges[i] = merges[i].wrap("mixer", MaskUnits, unit=4 ** (levels - i))
    stack = part(trunk["stack"], stages=tuple(stages), merges=tuple(merges))
    recipe = recipe.set(ViT, position=LearnedGrid, stack=stack)
    if masked:
        return recipe.set(ViT, stack=part(Fused, inner=stack)).wrap("trunk", InUnits, levels=levels)
    return recipe.set(ViT, norm=Nothing).fill("pool", NormedMean, norm=norm)


_HF = (
    ("embeddings.patch_embeddings.projection", "patches.inner.conv"),
    ("layernorm_after", "mlp_residual.norm"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("proj", "shortcut"),
    ("norm.weight", "norm.gain"),
)


def from_hf(state: dict[str, Tensor], *, grid: Grid, levels: int = 3, local: int = 2) -> dict[str, Tensor]:
    """The state of a `transformers` HieraModel, without its pooler, as that of a `ViT` with these stages.

    grid: rows and columns of patches, which stand row by row there and in z-order here.
    """
    ours = {}
    for name, value in state.items():
        if name == "embeddings.position_embeddings":
            ours["position.table"] = value[0, list(z_order(grid, levels))]
        elif name.startswith("encoder.stages."):
            stage, block, rest = re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)", name).groups()
            i, j = int(stage), int(block)
            merge = i > 0 and j == 0
            here = f"stack.merges.{i - 1}" if merge else f"stack.stages.{i}.blocks.{j - (i > 0)}"
            mixer = "mixer.inner" if i - merge < local else "mixer"
            before = "norm" if merge else "mixer_residual.norm"
            if rest.startswith("attn.qkv"):
                kind = rest.rpartition(".")[2]
                for third, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    ours[f"{here}.{mixer}.project.{third}.{kind}"] = piece
            else:
                words = (("layernorm_before", before), ("attn.proj", f"{mixer}.project.out"))
                ours[f"{here}.{renamed(rest, words + _HF)}"] = value
        elif not name.startswith("pooler."):
            ours[renamed(name, _HF)] = value
    return {k: v.contiguous() for k, v in ours.items()}


def pretraining_from_hf(state: dict[str, Tensor], *, grid: Grid, levels: int = 3, local: int = 2) -> dict[str, Tensor]:
    """The state of a `transformers` HieraForPreTraining that pools to one element a unit as that of our model."""
    trunk = from_hf({k.removeprefix("hiera."): v for k, v in state.items() if k.startswith("hiera.")}, grid=grid,
                    levels=levels, local=local)  # fmt: skip
    ours = {f"trunk.inner.{k.replace('stack.', 'stack.inner.', 1)}": v for k, v in trunk.items()}
    for name, value in state.items():
        if name.startswith("multiscale_fusion."):
            i, kind = name.split(".")[2:]
            if kind == "weight":  # a unit's patches go row by row there, in z-order here, features last
                order = list(z_order((value.shape[2], value.shape[3]), levels - int(i)))
                value = value.flatten(2)[..., order].mT.flatten(1)
            ours[f"trunk.inner.stack.heads.{i}.{kind}"] = value
        elif name.startswith("encoder_norm."):
            ours[f"trunk.inner.norm.{'gain' if name.endswith('weight') else 'bias'}"] = value
    return ours | _decoder_from_hf({k: v for k, v in state.items() if k.startswith("decoder.")})


def _decoder_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("decoder.")
        if name == "mask_token":
            ours["pixel_decoder.mask_token"] = value.flatten()
        elif name == "decoder_position_embeddings":
            ours["pixel_decoder.position.table"] = value[0]
        elif name.startswith("decoder_block.layers."):
            block = from_hf({name.replace("decoder_block.layers.", "encoder.stages.0.layers."): value}, grid=(1, 1),
                            levels=0, local=0)  # fmt: skip
            ours |= {k.replace("stack.stages.0", "pixel_decoder.stack"): v for k, v in block.items()}
        else:
            words = (("decoder_embeddings", "enter"), ("decoder_norm", "norm"), ("decoder_pred", "predict"))
            ours[f"pixel_decoder.{renamed(name, (*words, ('norm.weight', 'norm.gain')))}"] = value
    return ours


@claim.parity(peer="transformers HieraPooler")
def the_mean_is_normed_after():
    """The classifier's pool is transformers', the norm of the mean and not the mean of norms."""
    from transformers import HieraConfig
    from transformers.models.hiera.modeling_hiera import HieraPooler

    theirs = HieraPooler(
        HieraConfig(embed_dim=3, depths=[1, 1], num_heads=[1, 1], num_query_pool=1, layer_norm_eps=1e-5)
    ).double()
    ours = NormedMean(6, norm=part(LayerNorm)).double()
    for ours_has, theirs_has in ((ours.norm.gain, theirs.layernorm.weight), (ours.norm.bias, theirs.layernorm.bias)):
        nn.init.normal_(theirs_has)
        ours_has.data.copy_(theirs_has)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), ours.norm(x).mean(1))


@claim
def a_unit_is_attended_as_if_alone():
    """Attention in mask units is attention on each unit's own patches, its gradients too, pooled or not; and one unit
    of the whole stream is the inner attention, to the bit."""
    trunk = randomise(_tiny["model.trunk"](2, (8, 12)))
    for mixer in (trunk.stack.stages[0].blocks[0].mixer, trunk.stack.merges[0].mixer):
        x = torch.randn(2, 96, 6, dtype=torch.float64, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        alone = torch.cat([mixer.inner(unit, Context()) for unit in other.split(16, 1)], 1)
        same_gradients(mixer(x, Context()), alone)
        torch.testing.assert_close(x.grad, other.grad)
        assert torch.equal(mixer(x[:, :16], Context()), mixer.inner(x[:, :16], Context()))


@claim
def what_is_not_seen_does_not_reach_what_is():
    """Whatever stands in the masked units, NaN included, the latents of the others are the same to the bit, through
    pooling, through stages that see everything, and through convolutions that reach over the border."""
    for patches in (part(Patches, patch=1), part(OverlappingPatches, patch=1, reach=3)):
        recipe = _masked.set(ZOrdered, inner=patches)
        model = randomise(recipe["model"](2, (8, 12)))
        images, kept = torch.randn(2, 2, 8, 12, dtype=torch.float64), keep(torch.rand(2, 6), 0.5)
        hidden = torch.ones(2, 6, dtype=torch.bool).scatter(1, kept, False)
        other = unpatchify(patchify(images, 4).masked_fill(hidden[..., None], torch.nan), 4, (2, 3))
        assert model.encode(images, kept).shape == (2, 3, 24)
        assert torch.equal(model.encode(other, kept), model.encode(images, kept))


@claim
def the_first_stages_do_not_see_across_units():
    """Before the first stage that is not local, a unit's elements depend on its own pixels alone; after it on all."""
    trunk = randomise(_tiny["model.trunk"](1, (8, 12)))
    images = torch.randn(1, 1, 8, 12, dtype=torch.float64, requires_grad=True)
    for stage, x in enumerate(trunk.stack.each(trunk.tokens(images), Context())):
        seen = torch.autograd.grad(x[0, 0].sum(), images, retain_graph=True)[0][0, 0].abs() > 0
        assert seen[:4, :4].all() and seen[4:].any() == (stage == 2) == seen[:, 4:].any()


@claim.parity(peer="transformers HieraModel")
def equals_transformers():
    """The same random weights give transformers' stream, pooled features and gradients on images that are not
    square."""
    from transformers import HieraModel

    recipe = _like(paper_of(vit)(dim=48, heads=8), (1, 2, 2, 1))
    theirs = randomise(HieraModel(_config(depths=[1, 2, 2, 1])))
    trunk = recipe["model.trunk"](2, (32, 64)).double()
    layout = {"grid": (8, 16), "levels": 3, "local": 2}
    trunk.load_state_dict(from_hf(theirs.state_dict(), **layout))
    pool = recipe["model.pool"](48).double()
    last = theirs.pooler.layernorm
    pool.load_state_dict({"norm.gain": last.weight.detach(), "norm.bias": last.bias.detach()})
    images = torch.randn(2, 2, 32, 64, dtype=torch.float64)
    peer = theirs(images)
    torch.testing.assert_close(trunk(images), peer.last_hidden_state)
    same_gradients(pool(trunk(images)), peer.pooler_output)
    assert_equal(gradients(trunk), from_hf(gradients(theirs), **layout))


@claim.parity(peer="transformers HieraForPreTraining")
def equals_transformers_pretraining():
    """The same random weights and noise give the pixels, loss and gradients of transformers' masked pre-training, its
    fusion of stages included."""
    from transformers import HieraForPreTraining

    config = _config(
        depths=[1, 1, 1, 1], decoder_hidden_size=8, decoder_depth=2, decoder_num_heads=2, mask_ratio=0.5
    )  # fmt: skip
    theirs = randomise(HieraForPreTraining(config))
    recipe = _like(paper_of(vit)(dim=48, heads=8) + mae(ratio=0.5, dim=8, depth=2, heads=2), (1, 1, 1, 1))
    recipe = recipe.put("model.pixel_decoder.position", part(LearnedGrid))
    ours = recipe["model"](2, (32, 64)).double()
    layout = {"grid": (8, 16), "levels": 3, "local": 2}
    ours.load_state_dict(pretraining_from_hf(theirs.state_dict(), **layout))
    images, noise = torch.randn(2, 2, 32, 64, dtype=torch.float64), torch.rand(2, 2)
    said, peer = ours(images, noise), theirs(images, noise=noise)
    torch.testing.assert_close(masked_error(said, standardised(patchify(images, 32))).mean(), peer.loss)
    same_gradients(said.pixels, peer.logits)
    assert_equal(gradients(ours), pretraining_from_hf(gradients(theirs), **layout))


@claim.measured(paper="more accurate than previous models, and simpler (abstract); Hiera-B 84.5 ImageNet top-1")
def a_pyramid_learns_as_much_for_less(lab):
    """Pre-trained by MAE on digits, one patch a pixel and masked in units of four, the pyramid's features tell digits
    apart by a linear map less than 2 points worse than a plain ViT's of as many blocks, pre-trained on patches of the
    same size as the units."""
    gaps, right = [], {"ViT": [], "Hiera": []}
    recipes = {"ViT": vit + mae, "Hiera": paper_of(vit)(patch=1) + mae + q_pooled_attention + hiera}
    for seed in lab.seeds(3):
        for name, recipe in recipes.items():
            run = lab.train(recipe, seed=seed)
            right[name].append(probe(run.model, run.task))
        gaps.append(100 * (right["ViT"][-1] - right["Hiera"][-1]))
    return lab.at_most(gaps, 2.0, unit="points of accuracy", numbers=right)


@claim.measured(paper="significantly faster both at inference and during training (abstract)")
def a_pyramid_is_faster(lab):
    """Forward and backward over 256 patches, both with the reference attention, takes a plain ViT of as many blocks and
    the same last width at least twice as long.

    A first version asked this of 1024 patches.
    """
    images, plain_vit = torch.randn(8, 1, 32, 32), paper_of(vit)(dim=128, depth=4, patch=2)
    recipes = (plain_vit + q_pooled_attention(depths=(1, 1, 2)) + hiera, plain_vit)
    trunks = [recipe["model.trunk"](1, 32) for recipe in recipes]
    found = lab.ratio(*(lambda trunk=trunk: trunk(images).sum().backward() for trunk in trunks))
    return lab.verdict(faster(found, 2.0), estimate=found.value, interval=found, unit="times the time")


def _config(**given):
    from transformers import HieraConfig

    return HieraConfig(image_size=[32, 64], num_channels=2, embed_dim=6, num_heads=[1, 2, 4, 8], **given)


def _like(recipe: Part, depths: tuple[int, ...]) -> Part:
    """A recipe with patches, stages and units of the released models."""
    recipe = recipe + q_pooled_attention(depths=depths) + hiera(local=2)
    return recipe.set(ZOrdered, inner=OverlappingPatches)


_small = paper_of(vit)(dim=24, heads=4, patch=1)
_tiny = _small + q_pooled_attention(depths=(1, 2, 2)) + hiera(local=2)
_masked = _small + mae(dim=8, heads=2) + q_pooled_attention(depths=(1, 2, 2)) + hiera(local=2)
