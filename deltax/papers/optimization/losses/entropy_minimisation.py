"""Semi-supervised Learning by Entropy Minimization. Grandvalet, Bengio, 2004.

Cross-entropy where labels are known, but where they are not the network is asked to be sure of something.

Where classes lie apart, a boundary through the gap between them leaves no example in doubt, and examples without
labels show where the gap is. So the entropy of what is said of them is added to the loss. Its weight is how much one
believes that there is a gap: where there is none it only makes the network sure of its mistakes, and with too few
labels to hold on to it may put everything in one class.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper
from deltax.contract import IMAGES_TO_LOGITS, needs
from deltax.papers.optimization.losses.cross_entropy import cross_entropy
from deltax.shapes import PerExample
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.few_labels import UNLABELLED


def entropy(logits: Float[Tensor, "B V"]) -> PerExample:
    """- sum_k p_k log p_k of softmax(logits), in nats."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


@needs("images", "labels", model=IMAGES_TO_LOGITS)
def entropy_loss(model: nn.Module, batch: Batch, *, weight: float = 1.0) -> PerExample:
    """Cross-entropy of labelled images, and `weight` times the entropy of those labelled -100 (Eq. 6)."""
    logits = model(batch.images).float()
    labelled = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    return torch.where(batch.labels == UNLABELLED, weight * entropy(logits), labelled)


@paper(
    on=cross_entropy,
    replaces=cross_entropy,
    year=2004,
    url="https://papers.nips.cc/paper/2004/hash/96f2b50b5d3613adf9c27049b2a888c7-Abstract.html",
    whole="lenet-1989",
)
def entropy_minimisation(recipe: Part, *, weight: float = 1.0) -> Part:
    return recipe.fill("objective", entropy_loss, weight=weight)
