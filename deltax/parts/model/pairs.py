"""Two or more encoders into one space, where what belongs together is to lie together."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltax.contract import PAIRS_TO_LOGITS
from deltax.parts.attention.context import Context
from deltax.parts.model.linear import LinearNoBias
from deltax.parts.model.patches import Grid, Pooled
from deltax.parts.numerics.precision import of_length_one, similarity
from deltax.parts.training.roles import tag
from deltax.recipe import Part, part
from deltax.shapes import Images, Stream, Tokens

Vectors = Float[Tensor, "N K"]  # of length one


def at_end(x: Stream, ended: Bool[Tensor, "B T"]) -> Pooled:
    """The stream where the text first ends. (B, T, D) -> (B, D)."""
    return x[torch.arange(len(x), device=x.device), ended.int().argmax(1)]


def at_last(x: Stream, ended: Bool[Tensor, "B T"]) -> Pooled:
    """The stream at the last place, padding or not. (B, T, D) -> (B, D)."""
    return x[:, -1]


class TextEncoder(nn.Module):
    """embedding -> position -> stack -> norm -> summary -> classifier. Tokens (B, T) -> (B, width).

    The last token of the vocabulary ends a text and fills what is left of the context. `classifier` maps into the
    space that is shared, of `width`.
    """

    def __init__(
        self,
        vocab: int,
        context: int,
        width: int,
        *,
        trunk: Part,
        summary: Part = part(at_end),
        classifier: Part = part(LinearNoBias),
    ):
        super().__init__()
        self.end = vocab - 1
        self.trunk = trunk(vocab, context)
        self.summary = summary
        self.classifier = classifier(self.trunk.stack.width, width)

    def forward(self, tokens: Tokens) -> Pooled:
        stream = self.trunk.norm(self.trunk.stream(tokens, Context()))
        return self.classifier(self.summary(stream, tokens == self.end))


class Temperature(nn.Module):
    """Cosines times a learned exp(s), which starts at 1 / `start` and is never beyond `most`. (N, M) -> (N, M).

    As in CLIP's released code it is the parameter s that is clipped, when training, so that it can come back.
    """

    def __init__(self, *, start: float = 0.07, most: float = 100.0):
        super().__init__()
        self.start, self.most = start, most
        self.log = tag(nn.Parameter(torch.empty(())), "vector")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log, -math.log(self.start))

    def forward(self, cosines: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        if self.training:
            with torch.no_grad():
                self.log.clamp_(max=math.log(self.most))
        return cosines * self.log.exp()


class DualEncoder(nn.Module):
    """Images (B, C, Y, X) and texts (B, T) -> logits (B, B), an image a row, a text a column.

    `image` and `text` map to vectors of `width`, whose cosines `logits` scales.
    """

    interface = PAIRS_TO_LOGITS

    def __init__(
        self,
        channels: int,
        size: int | Grid,
        vocab: int,
        context: int,
        *,
        width: int,
        image: Part,
        text: Part,
        logits: Part = part(Temperature),
    ):
        super().__init__()
        self.image = image(channels, size, width)
        self.text = text(vocab, context, width)
        self.logits = logits()
        self.width = width

    def see(self, images: Images) -> Vectors:
        """Images as vectors of length one."""
        return of_length_one(self.image(images))

    def read(self, texts: Tokens) -> Vectors:
        """Texts as vectors of length one."""
        return of_length_one(self.text(texts))

    def forward(self, images: Images, texts: Tokens) -> Float[Tensor, "B B"]:
        return self.logits(similarity(self.see(images), self.read(texts)))
