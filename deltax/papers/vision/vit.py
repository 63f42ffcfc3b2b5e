"""An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale.
Dosovitskiy, Beyer, Kolesnikov, Weissenborn, Zhai, Unterthiner, Dehghani, Minderer, Heigold, Gelly, Uszkoreit, Houlsby,
2020. arXiv:2010.11929

A transformer's encoder, but its words are patches of an image.

Cut the image into squares, map each linearly to a token, add a learned vector for each place, and the rest is text: a
class token in front, as BERT has it, is read at the end. Nothing knows that patches are neighbours but what is learned,
so little data favours convolutions and much data does not. Norms stand before the branches, GELU inside them. The
released models give the class token a position too; two learned vectors that are only ever added are one, and here they
are. B/16 has 12 blocks of width 768 with 12 heads; the default here reads digits in 16 patches.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper, part
from deltax.paper import paper_of
from deltax.papers.language.softmax_attention import Attention
from deltax.papers.language.transformer import transformer
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.parts.checking import assert_equal, gradients, randomise, same_gradients
from deltax.parts.context import Context
from deltax.parts.mlp import gelu
from deltax.parts.nothing import Nothing
from deltax.parts.objectives import classify
from deltax.parts.optimizers import adamw
from deltax.parts.patches import (
    ClassToken,
    First,
    Grid,
    ImageClassifier,
    LearnedGrid,
    Mean,
    NoClassToken,
    Patches,
    pair,
    patchify,
    unpatchify,
)
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.parts.stack import PreNorm, Stack
from deltax.shapes import Images, OtherStream, Stream
from deltax.tasks.digits import Digits
from deltax.tasks.pictures import Pictures


class ViT(nn.Module):
    """patches -> position -> class token -> stack -> norm. Images (B, C, Y, X) -> stream (B, 1 + T, D)
    (Eqs. 1 to 4).

    `width` is the width of what leaves the stack, `grid` the rows and columns of patches, `prefix` how many elements
    stand before them.
    """

    gives_context = ("grid",)

    def __init__(
        self,
        channels: int,
        size: int | Grid,
        *,
        dim: int,
        patches: Part = part(Patches),
        class_token: Part = part(ClassToken),
        position: Part = part(LearnedGrid),
        stack: Part,
        norm: Part,
    ):
        super().__init__()
        self.size = pair(size)
        self.patches = patches(channels, dim)
        self.grid = self.patches.grid(size)
        self.position = position(dim, self.grid)
        self.class_token = class_token(dim)
        self.prefix = self.class_token.count
        self.stack = stack(dim)
        self.width = self.stack.width
        self.norm = norm(self.width)

    def tokens(self, images: Images, ctx: Context | None = None) -> Stream:
        """Each patch with its place, (B, T, D). Raises UserError for images of another size than was built for."""
        if tuple(images.shape[-2:]) != self.size:
            raise UserError(
                f"images of {tuple(images.shape[-2:])} pixels for a model of {self.size}: build it with that size, and "
                f"load its weights through deltax.papers.vision.vit.resized"
            )
        return self.position(self.patches(images), ctx or Context())

    def read(self, tokens: Stream, ctx: Context | None = None) -> OtherStream:
        """What the stack makes of tokens (B, T, D), all of them or some, normed: (B, 1 + T, D)."""
        return self.norm(self.stack(self.class_token(tokens), ctx or Context()))

    def forward(self, images: Images) -> OtherStream:
        return self.read(self.tokens(images), Context(grid=self.grid if self.patches.raster else None))


def mean_pooled(recipe: Part) -> Part:
    """No class token: the classifier reads the mean over patches, which does as well (appendix D.3)."""
    recipe = recipe.fill("class_token", NoClassToken) if "class_token" in recipe.slots() else recipe
    return recipe.fill("pool", Mean) if "pool" in recipe.slots() else recipe


def resized(table: Tensor, before: Grid, after: Grid) -> Tensor:
    """A table of positions (rows * columns, D) interpolated to another grid, bicubically (section 3.2)."""
    image = table.T.unflatten(1, before)[None]
    image = nn.functional.interpolate(image, size=after, mode="bicubic", align_corners=False)
    return image[0].flatten(1).T.contiguous()


@paper(on=transformer, year=2020, arxiv="2010.11929")
def vit(*, dim: int = 64, depth: int = 4, heads: int = 4, patch: int = 2) -> Part:
    norm = part(LayerNorm, eps=1e-6)
    stack = transformer["model.encoder"].fill("residual", PreNorm, norm=norm).fill("activation", gelu)
    trunk = part(
        ViT,
        dim=dim,
        patches=part(Patches, patch=patch),
        stack=stack.set(Stack, depth=depth).set(Attention, heads=heads),
        norm=norm,
    )
    return part(
        Run,
        model=part(ImageClassifier, trunk=trunk, pool=First),
        task=Pictures,
        objective=classify,
        batches=from_task,
        optimizer=part(adamw, rate=1e-3),
        schedule=cosine,
        loop=part(Loop, batch=64, steps=400),
    )


_HF = (
    ("layernorm", "norm"),
    ("patch_embeddings.projection", "patches.embed"),
    ("layers", "stack.blocks"),
    ("layernorm_before", "mixer_residual.norm"),
    ("layernorm_after", "mlp_residual.norm"),
    ("attention.q_proj", "mixer.project.query"),
    ("attention.k_proj", "mixer.project.key"),
    ("attention.v_proj", "mixer.project.value"),
    ("attention.o_proj", "mixer.project.out"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("norm.weight", "norm.gain"),
)


def renamed(name: str, pairs: tuple[tuple[str, str], ...] = _HF) -> str:
    """A parameter's name in `transformers` as ours: each pair's first word becomes its second, in order."""
    for theirs, ours in pairs:
        name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\g<1>{ours}", name)
    return name


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ViTModel as that of a `ViT`; a pooler, a classifier and a mask are left behind."""
    state = {k.removeprefix("vit.").removeprefix("embeddings."): v for k, v in state.items()}
    token, places = state.pop("cls_token"), state.pop("position_embeddings")
    ours = {"class_token.token": token[0, 0] + places[0, 0], "position.table": places[0, 1:]}
    for name, value in state.items():
        if not name.startswith(("pooler.", "classifier.", "mask_token")):
            ours[renamed(name)] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}


def to_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of a `ViT` as that of a `transformers` ViTModel without pooler; its class token stands at zero."""
    back = tuple((ours, theirs) for theirs, ours in reversed(_HF))
    theirs = {}
    for name, value in state.items():
        if name == "class_token.token":
            theirs["embeddings.cls_token"] = value[None, None]
        elif name == "position.table":
            theirs["embeddings.position_embeddings"] = nn.functional.pad(value, (0, 0, 1, 0))[None]
        elif name == "patches.embed.weight":
            side = math.isqrt(value.shape[1] // channels)
            theirs[f"embeddings.{renamed(name, back)}"] = value.unflatten(1, (channels, side, side))
        else:
            theirs["embeddings." * name.startswith("patches.") + renamed(name, back)] = value
    return {k: v.contiguous() for k, v in theirs.items()}


@claim
def a_patch_embedding_is_a_convolution():
    """Cutting into patches and mapping each linearly is a convolution of that size and stride, its gradients too, and
    cutting loses nothing: the patches put together again are the image."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 15, dtype=torch.float64)
    patches = Patches(3, 7, patch=3).double()
    conv = nn.Conv2d(3, 7, 3, stride=3).double()
    patches.load_state_dict({"embed.weight": conv.weight.detach().flatten(1), "embed.bias": conv.bias.detach()})
    same_gradients(patches(images), conv(images).flatten(2).mT)
    torch.testing.assert_close(patches.embed.weight.grad, conv.weight.grad.flatten(1))
    assert torch.equal(unpatchify(patchify(images, 3), 3, (2, 5)), images)


@claim
def without_positions_a_picture_is_a_bag_of_patches():
    """Without positions, shuffling an image's patches shuffles the stream and leaves a mean-pooled classifier's logits
    as they were; with positions it changes them."""
    images = torch.randn(2, 2, 6, 9, dtype=torch.float64)
    order = torch.randperm(6)
    shuffled = unpatchify(patchify(images, 3)[:, order], 3, (2, 3))
    bag = mean_pooled(_tiny).fill("position", Nothing)
    for recipe, same in ((bag, True), (mean_pooled(_tiny), False)):
        model = randomise(recipe().build({"channels": 2, "size": (6, 9), "classes": 5}))
        assert torch.allclose(model(shuffled), model(images)) == same
        assert torch.allclose(model.trunk(shuffled), model.trunk(images)[:, order]) == same


@claim.parity(peer="transformers ViTModel")
def equals_transformers():
    """The same random weights give transformers' stream and gradients on images that are not square, at their own size
    and, positions interpolated, at another; the weights go there and back unchanged."""
    from transformers import ViTConfig, ViTModel

    shape = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)

    def both(size: Grid) -> tuple[nn.Module, nn.Module]:
        config = ViTConfig(**shape, image_size=size, patch_size=3, num_channels=2, layer_norm_eps=1e-6)
        theirs = randomise(ViTModel(config, add_pooling_layer=False).double())
        ours = _tiny["model.trunk"](2, size).double()
        ours.load_state_dict(from_hf(theirs.state_dict()))
        return ours, theirs

    ours, theirs = both((9, 15))
    back = from_hf(to_hf(ours.state_dict(), channels=2))
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())

    images = torch.randn(2, 2, 9, 15, dtype=torch.float64)
    same_gradients(ours(images), theirs(images).last_hidden_state)
    peer = gradients(theirs)
    places = peer["embeddings.position_embeddings"]
    torch.testing.assert_close(places[:, :1], peer["embeddings.cls_token"])
    places[:, 0] = 0
    assert_equal(to_hf(gradients(ours), channels=2), peer)

    ours, theirs = both((9, 9))  # transformers interpolates from a square alone
    larger = _tiny["model.trunk"](2, (6, 15)).double()
    table = resized(ours.position.table.detach(), (3, 3), (2, 5))
    larger.load_state_dict({**ours.state_dict(), "position.table": table})
    images = torch.randn(2, 2, 6, 15, dtype=torch.float64)
    torch.testing.assert_close(larger(images), theirs(images, interpolate_pos_encoding=True).last_hidden_state)


@claim.measured(paper="ViT-L/16 below BiT when pre-trained on ImageNet-1k, above on JFT-300M (Figure 3)")
def with_little_data_convolutions_win(lab):
    """Trained on 100 digits, a ResNet of 8 layers with as many parameters is right on held-out ones at least 3 points
    more often than ViT."""
    return lab.at_least(_ahead(lab, 100), 3.0, unit="points of accuracy")


@claim.measured(paper="ViT-L/16 below BiT when pre-trained on ImageNet-1k, above on JFT-300M (Figure 3)")
def more_data_closes_the_gap(lab):
    """Trained on all 1250 digits or so, the ResNet's lead over ViT is at least 2 points smaller than on 100."""
    gaps = [few - many for few, many in zip(_ahead(lab, 100), _ahead(lab, 10_000), strict=True)]
    run = _trained(lab, "vit", 10_000, lab.seeds(1)[0])
    figure = lab.figure(attention_figure(run.model, run.task.all().images[:8]))
    return lab.at_least(gaps, 2.0, unit="points", figures={"What the class token looks at in the last block": figure})


def _ahead(lab, examples: int) -> list[float]:
    """Points of accuracy that a ResNet of 8 layers from width 26 has over ViT, for each seed."""
    right = lambda name, seed: _trained(lab, name, examples, seed).evaluation.metrics["accuracy"]
    return [100 * (right("resnet(n=1,width=26)", seed) - right("vit", seed)) for seed in lab.seeds(3)]


def _trained(lab, expression: str, examples: int, seed: int):
    return lab.train(lab.recipe(expression).put("task", part(Digits, examples=examples)), seed=seed, steps=300)


@torch.no_grad()
def attention_maps(trunk: ViT, images: Images, *, block: int = -1) -> Tensor:
    """How much the class token looks at each patch in a block, (B, H, rows, columns); a head's sum to at most 1."""
    attention, seen = [m for m in trunk.stack.modules() if isinstance(m, Attention)][block], []
    kernel = attention.kernel

    def watched(q: Tensor, k: Tensor, v: Tensor, rules: Any) -> Tensor:
        each = torch.eye(k.shape[1], dtype=v.dtype, device=v.device)[None, :, None]
        seen.append(kernel(q, k, each.expand(len(k), -1, k.shape[2], -1), rules))
        return kernel(q, k, v, rules)

    attention.kernel = watched
    try:
        trunk(images)
    finally:
        attention.kernel = kernel
    return seen[0][:, 0, :, -math.prod(trunk.grid) :].unflatten(-1, trunk.grid)


def attention_figure(model: ImageClassifier, images: Images) -> Any:
    """A matplotlib figure: images, and under each the mean over heads of `attention_maps`."""
    from matplotlib.figure import Figure

    maps = attention_maps(model.trunk, images).mean(1)
    figure = Figure(figsize=(0.7 * len(images), 1.6))
    axes = figure.subplots(2, len(images), squeeze=False)
    for (above, below), image, looked in zip(axes.T, images, maps, strict=True):
        above.imshow(image[0].numpy(), cmap="gray_r")
        below.imshow(looked.numpy(), cmap="magma", vmin=0)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure


_tiny = paper_of(vit)(dim=12, depth=2, heads=3, patch=3)
