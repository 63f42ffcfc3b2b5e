"""Learning Transferable Visual Models From Natural Language Supervision. Radford, Kim, Hallacy, Ramesh, Goh, Agarwal,
Sastry, Askell, Mishkin, Clark, Krueger, Sutskever, 2021. arXiv:2103.00020

Contrastive learning, but the second view of an image is its caption, with an encoder of its own.

In a batch of pairs, each image is to find its text among all texts and each text its image; only pairs across count, so
there is one softmax over rows and one over columns. How sharp they are is learned. What this gives for free is a
classifier of anything that can be named: write each class as a sentence, and see which lies nearest. The image's side
is a ViT with one more norm before its blocks, the text's GPT, read where the text ends; both map linearly into the
shared space. ViT-L/14 was trained on 400 million pairs, 32,768 a batch; the default here reads digits and bytes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import PAIRS_TO_LOGITS, needs
from deltax.paper import paper_of
from deltax.papers.language.models.gpt import gpt
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.self_supervised.simclr import simclr
from deltax.parts.model.identity import Identity
from deltax.parts.model.linear import LinearNoBias
from deltax.parts.model.pairs import DualEncoder, TextEncoder
from deltax.parts.model.patches import First, ImageClassifier, Patches
from deltax.parts.training.objectives import mixes
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Run
from deltax.shapes import PerExample
from deltax.tasks.multimodal.pairs import PairBatch, Pairs


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the GELU of the released weights."""
    return x * torch.sigmoid(1.702 * x)


def symmetric(logits: Float[Tensor, "N N"]) -> PerExample:
    """How surprising it is, in nats, that row i belongs to column i: a mean of both directions (Figure 3)."""
    own = logits.float() if logits.dtype is not torch.float64 else logits
    return (own.logsumexp(0) + own.logsumexp(1)) / 2 - own.diagonal()


@needs("images", "texts", model=PAIRS_TO_LOGITS)
@mixes("the negatives of an example are the others of its piece")
def pair_contrast(model: nn.Module, batch: PairBatch) -> PerExample:
    """`symmetric` of a batch. What a pair is told from is its own piece of the batch."""
    return symmetric(model(batch.images, batch.texts))


@paper(on=simclr, year=2021, arxiv="2103.00020")
def clip(*, dim: int = 48, depth: int = 2, heads: int = 3, patch: int = 2, width: int = 32) -> Part:
    image = paper_of(vit)(dim=dim, depth=depth, heads=heads, patch=patch)["model.trunk"]
    image = image.fill("norm", LayerNorm, eps=1e-5).put("stack.entry", part(LayerNorm)).set(Patches, embed=LinearNoBias)
    text = paper_of(gpt)(dim=dim, depth=depth, heads=heads)["model"].put("head", part(Identity))
    model = part(
        DualEncoder,
        width=width,
        image=part(ImageClassifier, trunk=image, pool=First, classifier=LinearNoBias),
        text=part(TextEncoder, trunk=text),
    )
    return part(
        Run,
        model=model.fill("activation", quick_gelu),
        task=Pairs,
        objective=pair_contrast,
        batches=simclr["batches"],
        optimizer=part(adamw, lr=1e-3, beta2=0.98, weight_decay=0.2),
        schedule=simclr["schedule"],
        loop=simclr["loop"],
    )
