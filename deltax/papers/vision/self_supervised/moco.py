"""Momentum Contrast for Unsupervised Visual Representation Learning. He, Fan, Wu, Xie, Girshick, 2020.
arXiv:1911.05722

Contrastive learning, but what an image is told from waits in a queue, encoded by a slow copy of the network.

With negatives from the batch alone their number is the batch. A queue of past encodings holds many more, if those
encoded a while ago can still be compared with those of now; so the encoder of the queue moves slowly, as an average
of the one that learns. No gradient reaches it. On arXiv since November 2019, the paper came a little before SimCLR,
whose projector and views this recipe keeps, as MoCo v2 does (arXiv:2003.04297). Over maps that are normalised in groups
no shuffling between devices is needed.

The paper has a queue of 65536, momentum 0.999, temperature 0.07, vectors of 128 from one linear map, and SGD at 0.03
with batches of 256; v2 a temperature of 0.2 and a hidden layer. The defaults here are for images of 8 x 8 and some
hundred steps: 512, 0.99, and SimCLR's temperature of 0.5, which `set(queued_contrast, temperature=0.07)` changes. In
the released code, as here, the slow network follows before it encodes the keys, and they enter the queue after the
loss.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper, part
from deltax.contract import IMAGES_TO_VECTORS, needs
from deltax.papers.vision.self_supervised.simclr import Contrastive, Vectors, simclr
from deltax.parts.numerics.precision import similarity
from deltax.parts.training.steps import Moving
from deltax.parts.training.views import jittered
from deltax.shapes import Images, PerExample
from deltax.tasks.images.digits import Batch


@needs(model=IMAGES_TO_VECTORS)
class Momentum(Moving):
    """The inner network, and beside it as `key_encoder` one that follows it, and a queue of what that one said.

    Images (B, C, Y, X) -> (B, .width), the inner network's. The queue, (length, width), starts as noise of length one.
    """

    def __init__(self, channels: int, *, inner: Part = part(Contrastive), momentum: float = 0.99, length: int = 512):
        super().__init__()
        self.momentum = momentum
        self.inner, self.key_encoder = (inner(channels=channels) for _ in range(2))
        self.key_encoder.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(length, self.inner.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.key_encoder.load_state_dict(self.inner.state_dict())
        self.queue.copy_(nn.functional.normalize(torch.randn_like(self.queue), dim=-1))

    def features(self, images: Images) -> Float[Tensor, "B D"]:
        return self.inner.features(images)

    def forward(self, images: Images) -> Vectors:
        return self.inner(images)

    def before(self) -> None:
        self.momentum_update()

    def move(self, keys: Vectors) -> None:
        self.enqueue(keys)

    @torch.no_grad()
    def momentum_update(self) -> None:
        """key_encoder <- momentum key_encoder + (1 - momentum) inner (Eq. 2)."""
        for slow, fast in zip(self.key_encoder.parameters(), self.inner.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, images: Images) -> Vectors:
        """What the slow network says of images."""
        return self.key_encoder(images)

    @torch.no_grad()
    def enqueue(self, keys: Vectors) -> None:
        """The newest keys enter at the front, and as many of the oldest leave."""
        self.queue.copy_(torch.cat([keys.to(self.queue), self.queue])[: len(self.queue)])


def info_nce(queries: Vectors, keys: Vectors, others: Float[Tensor, "M K"], *, temperature: float = 0.5) -> PerExample:
    """How surprising it is that queries[i] belongs to keys[i] and to none of the others, in nats (Eq. 1)."""
    own = similarity(queries[:, None], keys[:, None])[:, 0]
    scores = torch.cat([own, similarity(queries, others)], -1) / temperature
    return scores.logsumexp(-1) - scores[:, 0]


@needs("images", model=IMAGES_TO_VECTORS)
def queued_contrast(
    model: Momentum, batch: Batch, *, view: Part = part(jittered), temperature: float = 0.5
) -> PerExample:
    """`info_nce` of a view of each image against the slow network's view of it and the queue (Algorithm 1).

    In training the slow network follows first, and the keys are queued last, once a step.
    """
    if model.training:
        model.ahead()
    queries, keys = model(view(batch.images)), model.keys(view(batch.images))
    losses = info_nce(queries, keys, model.queue.clone(), temperature=temperature)
    if model.training:
        model.note(keys)
    return losses


@paper(on=simclr, year=2020, arxiv="1911.05722")
def moco(recipe: Part, *, momentum: float = 0.99, length: int = 512) -> Part:
    changed = recipe.fill("objective", queued_contrast)
    return changed.wrap("model", Momentum, momentum=momentum, length=length)
