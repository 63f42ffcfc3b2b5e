"""Masked Autoencoders Are Scalable Vision Learners. He, Chen, Xie, Li, Dollar, Girshick, 2021. arXiv:2111.06377

A ViT that fills in masked patches as BERT fills in words, but three in four are masked, the encoder sees only the
others, and a small decoder gets the mask tokens.

A picture is so redundant that hiding a little asks for nothing but a little smoothing; hide most of it and the encoder
must know what it looks at. Because no mask token ever enters the encoder, a step costs about a quarter, and what it
learns is about images without holes. The target is each hidden patch, standardised by itself. The paper's decoder for
ViT-L has 8 blocks of width 512; the encoder alone is kept. Positions are fixed sinusoids in both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.contract import IMAGES_TO_MASKED_PATCHES, needs
from deltax.errors import UserError
from deltax.paper import paper_of
from deltax.papers.language.softmax_attention import Attention
from deltax.papers.vision.vit import from_hf as vit_from_hf
from deltax.papers.vision.vit import renamed, vit
from deltax.parts.checking import assert_equal, faster, gradients, randomise, same_gradients
from deltax.parts.context import Context
from deltax.parts.linear import Glorot
from deltax.parts.patches import Grid, GridSinusoids, pair, patchify, unpatchify
from deltax.parts.roles import tag
from deltax.parts.stack import Stack
from deltax.shapes import Images, OtherStream, PerExample, Stream
from deltax.tasks.digits import Batch
from deltax.tasks.pictures import Drawings

Pixels = Float[Tensor, "B T F"]


class Filled(NamedTuple):
    """What a masked autoencoder says the pixels of every patch are, and which patches it saw."""

    pixels: Pixels
    kept: Int[Tensor, "B N"]

    @property
    def masked(self) -> Tensor:
        """(B, T) boolean."""
        everything = torch.ones(self.pixels.shape[:2], dtype=torch.bool, device=self.kept.device)
        return everything.scatter(1, self.kept, False)


def keep(noise: Float[Tensor, "B T"], ratio: float) -> Int[Tensor, "B N"]:
    """The patches of least noise, a share of 1 - ratio, rounded down but at least one, in the order of their noise."""
    return noise.argsort(1)[:, : max(1, int(noise.shape[1] * (1 - ratio)))]


def take(x: Tensor, kept: Int[Tensor, "B N"]) -> Tensor:
    """Those elements of x (B, T, ...) -> (B, N, ...)."""
    return x.gather(1, kept.view(*kept.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


class PixelDecoder(nn.Module):
    """Mask tokens where nothing was seen, positions, a stack, a linear map to pixels (section 3, MAE decoder).

    Latent (B, .prefix + N, W) and kept (B, N) -> pixels (B, T, F) of every patch of the trunk's grid.
    """

    def __init__(
        self, trunk: nn.Module, pixels: int, *, dim: int, position: Part = part(GridSinusoids), stack: Part, norm: Part
    ):
        super().__init__()
        self.prefix, self.count = trunk.prefix, math.prod(trunk.grid)
        self.enter = Glorot(trunk.width, dim)
        self.mask_token = tag(nn.Parameter(torch.empty(dim)), "embedding")
        self.position = position(dim, trunk.grid)
        self.stack = stack(dim)
        self.norm = norm(self.stack.width)
        self.predict = Glorot(self.stack.width, pixels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: OtherStream, kept: Int[Tensor, "B N"]) -> Pixels:
        first, seen = self.enter(latent).tensor_split([self.prefix], 1)
        if seen.shape[1] != kept.shape[1]:
            raise UserError("a trunk that pools its patches has to keep mask units whole: add hiera, as in ...+hiera")
        where = kept[..., None].expand(-1, -1, seen.shape[-1])
        patches = self.mask_token.expand(len(seen), self.count, -1).scatter(1, where, seen.to(self.mask_token.dtype))
        x = torch.cat([first, self.position(patches, Context())], 1)
        return self.predict(self.norm(self.stack(x, Context())))[:, self.prefix :]


@needs(outside=("Windows", "SpaceTimeBlock"))
class MaskedAutoencoder(nn.Module):
    """Images (B, C, Y, X) -> `Filled`. channels and size are the task's.

    The trunk gives `.tokens(images)` (B, T, ...), reads any of them with `.read`, and has a `.grid` and a `.prefix`.
    """

    interface = IMAGES_TO_MASKED_PATCHES

    def __init__(self, channels: int, size: int | Grid, *, ratio: float = 0.75, trunk: Part, pixel_decoder: Part):
        super().__init__()
        if not 0 <= ratio < 1:
            raise UserError(f"ratio is the share of patches to mask, from 0 up to but not including 1, not {ratio}")
        self.ratio = ratio
        self.trunk = trunk(channels, size)
        self.patch = pair(size)[0] // self.trunk.grid[0]
        self.pixel_decoder = pixel_decoder(self.trunk, channels * self.patch**2)

    def encode(self, images: Images, kept: Int[Tensor, "B N"]) -> Stream:
        """What the encoder makes of these patches, (B, .prefix + N, W); of the others it is shown zeros at most."""
        patches = patchify(images, self.patch)
        hidden = torch.ones_like(patches[..., 0], dtype=torch.bool).scatter(1, kept, False)
        shown = unpatchify(patches.masked_fill(hidden[..., None], 0), self.patch, self.trunk.grid)
        return self.trunk.read(take(self.trunk.tokens(shown), kept))

    def forward(self, images: Images, noise: Float[Tensor, "B T"] | None = None) -> Filled:
        if noise is None:
            noise = torch.rand(len(images), math.prod(self.trunk.grid), device=images.device)
        kept = keep(noise, self.ratio)
        return Filled(self.pixel_decoder(self.encode(images, kept), kept), kept)


def standardised(patches: Pixels) -> Pixels:
    """Each patch less its mean, over its deviation: the target that learns most (Table 1d)."""
    spread = patches.var(-1, keepdim=True) if patches.shape[-1] > 1 else torch.ones_like(patches)
    return (patches - patches.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()


def plain(patches: Pixels) -> Pixels:
    """The pixels themselves."""
    return patches


def masked_error(said: Filled, target: Pixels) -> PerExample:
    """Squared error of the pixels, a mean over the masked patches alone, of each image."""
    each = (said.pixels - target).square().mean(-1)
    return (each * said.masked).sum(1) / said.masked.sum(1).clamp(min=1)


@needs("images", model=IMAGES_TO_MASKED_PATCHES)
def fill_in(model: nn.Module, batch: Any, *, target: Callable[[Pixels], Pixels] = part(standardised)) -> PerExample:
    """`masked_error` of a model against the target that is made of each image's patches."""
    return masked_error(model(batch.images), target(patchify(batch.images, model.patch)))


@paper(on=vit, year=2021, arxiv="2111.06377")
def mae(recipe: Part, *, ratio: float = 0.75, dim: int = 32, depth: int = 1, heads: int = 4) -> Part:
    trunk = recipe["model.trunk"].fill("position", GridSinusoids)
    decoder = part(
        PixelDecoder,
        dim=dim,
        stack=part(Stack, depth=depth, block=trunk["stack.block"]).set(Attention, heads=heads),
        norm=trunk["norm"],
    )
    model = part(MaskedAutoencoder, ratio=ratio, trunk=trunk, pixel_decoder=decoder)
    return recipe.put("model", model).fill("task", Drawings).put("objective", part(fill_in))


_HF_DECODER = (
    ("decoder.decoder_embed", "pixel_decoder.enter"),
    ("decoder.mask_token", "pixel_decoder.mask_token"),
    ("decoder.decoder_layers", "pixel_decoder.stack.blocks"),
    ("decoder.decoder_norm", "pixel_decoder.norm"),
    ("decoder.decoder_pred", "pixel_decoder.predict"),
)


def from_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of a `transformers` ViTMAEForPreTraining as that of a `MaskedAutoencoder`.

    Positions are not in the state; the released ones are those of `GridSinusoids`. `transformers` gives the channels of
    a pixel last, we first.
    """
    trunk = vit_from_hf({k: v for k, v in state.items() if k.startswith("vit.")})
    del trunk["position.table"]
    ours = {f"trunk.{k}": v for k, v in trunk.items()}
    for name, value in state.items():
        if name.startswith("decoder.") and not name.endswith("decoder_pos_embed"):
            if name.startswith("decoder.decoder_pred"):
                value = value.unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1)
            name = renamed(renamed(name, _HF_DECODER))
            ours[name] = value.flatten() if name.endswith("mask_token") else value
    return {k: v.contiguous() for k, v in ours.items()}


@claim
def the_encoder_does_not_see_what_is_masked():
    """Whatever stands in the masked patches, NaN included, the latents are the same to the bit; and what the encoder
    makes of seen patches is what a ViT makes of them alone."""
    model, images = _tiny()
    kept = keep(torch.rand(2, 6), 0.5)
    hidden = Filled(torch.empty(2, 6, 0), kept).masked
    other = unpatchify(patchify(images, 3).masked_fill(hidden[..., None], torch.nan), 3, (2, 3))
    latent = model.encode(images, kept)
    assert latent.shape == (2, 1 + 3, 12)
    assert torch.equal(model.encode(other, kept), latent)
    torch.testing.assert_close(model.trunk.read(take(model.trunk.tokens(images), kept)), latent)


@claim
def masking_nothing_is_the_vit():
    """With a ratio of 0 every patch is kept, and put back in order the latents are the ViT's."""
    model, images = _tiny()
    kept = keep(torch.rand(2, 6), 0.0)
    latent = model.encode(images, kept)
    order = kept.argsort(1)
    torch.testing.assert_close(torch.cat([latent[:, :1], take(latent[:, 1:], order)], 1), model.trunk(images))


@claim
def what_is_taken_is_put_back():
    """The decoder's gather and scatter undo each other: seen patches return to their places, and mask tokens stand
    everywhere else."""
    model, _ = _tiny()
    x, kept = torch.randn(2, 6, 12, dtype=torch.float64), keep(torch.rand(2, 6), 0.4)
    given = []
    model.pixel_decoder.stack.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.pixel_decoder(torch.cat([x[:, :1], take(x, kept)], 1), kept)
    entered = given[0][:, 1:] - model.pixel_decoder.position.table
    masked = Filled(x, kept).masked[..., None]
    expected = torch.where(masked, model.pixel_decoder.mask_token, model.pixel_decoder.enter(x))
    torch.testing.assert_close(entered, expected)


@claim
def only_masked_patches_are_learned():
    """The loss has no gradient for the pixels it says of seen patches, nor for their targets, and it is the mean over
    the others."""
    torch.manual_seed(0)
    said, target = torch.randn(2, 2, 7, 5, dtype=torch.float64).requires_grad_().unbind()
    filled = Filled(said, keep(torch.rand(2, 7), 0.6))
    loss = masked_error(filled, target)
    for gradient in torch.autograd.grad(loss.sum(), (said, target)):
        assert torch.equal(gradient.abs().amax(-1) > 0, filled.masked)
    torch.testing.assert_close(loss.mean(), (said - target)[filled.masked].square().mean())


@claim.parity(peer="transformers ViTMAEForPreTraining")
def equals_transformers():
    """The same random weights and noise give transformers' pixels, loss and gradients, and its fixed positions are
    ours."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=9, patch_size=3,
        num_channels=2, decoder_hidden_size=8, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, layer_norm_eps=1e-6, norm_pix_loss=True,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config)
    theirs.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False  # else its positions stay zero
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(9)
    places = [theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed]
    recipe = paper_of(vit)(dim=12, depth=2, heads=3, patch=3) + mae(dim=8, depth=2, heads=2)
    ours = recipe["model"](2, 9).double()
    tables = [ours.trunk.position.table, ours.pixel_decoder.position.table]
    for fixed, table in zip(places, tables, strict=True):
        torch.testing.assert_close(fixed[0, 1:].double(), table, rtol=0, atol=1e-7)
    randomise(theirs)
    for fixed, table in zip(places, tables, strict=True):
        fixed.data = nn.functional.pad(table, (0, 0, 1, 0))[None]
    ours.load_state_dict(from_hf(theirs.state_dict(), channels=2))

    images, noise = torch.randn(2, 2, 9, 9, dtype=torch.float64), torch.rand(2, 9)
    said, peer = ours(images, noise), theirs(images, noise=noise)
    torch.testing.assert_close(masked_error(said, standardised(patchify(images, 3))).mean(), peer.loss)
    logits = peer.logits.unflatten(-1, (9, 2)).mT.flatten(-2)
    torch.testing.assert_close(said.masked, peer.mask.bool())
    same_gradients(said.pixels, logits)
    yours = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    yours["vit.embeddings.position_embeddings"] = torch.zeros(1, 10, 12, dtype=torch.float64)
    assert_equal(gradients(ours), from_hf(yours, channels=2))


@claim.measured(
    paper="with mask tokens in the encoder 3.3 times the FLOPs (Table 1c), and 2.8 times the time (Table 2)"
)
def a_sparse_encoder_costs_less(lab):
    """A training step on 256 patches with the reference attention, three in four of them masked, takes less than half
    as long as the same step of an encoder that is given all 256."""
    recipe = paper_of(vit)(dim=128, depth=4) + mae(ratio=0.75, dim=32)
    images, labels, steps = torch.randn(16, 1, 32, 32), torch.zeros(16), []
    for ratio in (0.75, 0.0):
        model = recipe.set(MaskedAutoencoder, ratio=ratio)["model"](1, 32)
        steps.append(lambda model=model: fill_in(model, Batch(images, labels)).sum().backward())
    found = lab.ratio(*steps)
    return lab.verdict(faster(found, 2.0), estimate=found.value, interval=found, unit="times the time")


@claim.measured(paper="linear probe 73.5 at 75 % masked against 54.6 at 10 % and 66.1 at 90 % (Figure 5)")
def much_must_be_masked(lab):
    """What the encoder learns of unlabelled digits with three in four patches masked tells them apart by a linear map
    at least half a point better than what it learns with one in four."""
    gains, numbers, figures = [], {}, {}
    for seed in lab.seeds(3):
        right = {}
        for ratio in (0.25, 0.5, 0.75, 0.9):
            run = lab.train(vit + mae(ratio=ratio), seed=seed)
            right[ratio] = probe(run.model, run.task)
            numbers.setdefault(f"probe, {ratio:.0%} masked", []).append(right[ratio])
            if ratio == 0.75 and not figures:
                caption = "Seen; filled in, given each hidden patch's true mean and deviation; true"
                figures = {caption: lab.figure(reconstructions(run.model, run.task))}
        gains.append(100 * (right[0.75] - right[0.25]))
    return lab.at_least(gains, 0.5, unit="points of accuracy", numbers=numbers, figures=figures)


@torch.no_grad()
def probe(model: MaskedAutoencoder, task: Any) -> float:
    """The held-out accuracy of a linear classifier on the mean over what the encoder makes of all patches."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    training, held_out = (task.all(split) for split in ("train", "validation"))
    features = lambda images: model.trunk(images)[:, model.trunk.prefix :].mean(1).numpy()
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return float(
        linear.fit(features(training.images), training.labels).score(features(held_out.images), held_out.labels)
    )


def filled_in(model: MaskedAutoencoder, images: Images, noise: Float[Tensor, "B T"]) -> dict[str, Images]:
    """Images as they are seen, NaN where a patch is hidden; as they are filled in; and as they are.

    Filled patches have the mean and deviation of the true ones, which the target leaves out.
    """
    said, truth = model(images, noise), patchify(images, model.patch)
    masked = said.masked[..., None]
    filled = said.pixels * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
    rows = {"seen": truth.masked_fill(masked, float("nan")), "filled in": torch.where(masked, filled, truth)}
    return {word: unpatchify(row, model.patch, model.trunk.grid) for word, row in {**rows, "true": truth}.items()}


@torch.no_grad()
def reconstructions(model: MaskedAutoencoder, task: Any, *, count: int = 10) -> Any:
    """A matplotlib figure of held-out images: what is seen, what is filled in, what there is."""
    from matplotlib.figure import Figure

    images = task.all("validation").images[:count]
    noise = torch.rand(count, math.prod(model.trunk.grid), generator=torch.Generator().manual_seed(0))
    rows = filled_in(model, images, noise)
    figure = Figure(figsize=(0.6 * count, 2))
    for ax, (word, row) in zip(figure.subplots(3, 1), rows.items(), strict=True):
        ax.set_facecolor("0.7")
        ax.imshow(torch.cat(list(row[:, 0]), 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        ax.set_ylabel(word, rotation=0, ha="right", va="center")
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def _tiny() -> tuple[MaskedAutoencoder, Images]:
    recipe = paper_of(vit)(dim=12, depth=2, heads=3, patch=3) + mae(dim=8, heads=2)
    return randomise(recipe["model"](2, (6, 9))), torch.randn(2, 2, 6, 9, dtype=torch.float64)
