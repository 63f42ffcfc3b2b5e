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
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, UserError, paper, part
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.language.models.transformer import transformer
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.context import Context
from deltax.parts.model.mlp import gelu
from deltax.parts.model.patches import (
    ClassToken,
    First,
    Grid,
    ImageClassifier,
    LearnedGrid,
    Mean,
    NoClassToken,
    Patches,
    pair,
)
from deltax.parts.model.stack import PreNorm, Stack
from deltax.parts.training.objectives import classify
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.shapes import Images, OtherStream, Stream
from deltax.tasks.images.pictures import Pictures


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
                f"load its weights through deltax.papers.vision.backbones.vit.resized"
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
        optimizer=part(adamw, lr=1e-3),
        schedule=cosine,
        loop=part(Loop, batch=64, steps=400),
    )


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
