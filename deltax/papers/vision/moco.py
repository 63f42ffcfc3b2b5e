"""Momentum Contrast for Unsupervised Visual Representation Learning. He, Fan, Wu, Xie, Girshick, 2020.
arXiv:1911.05722

Contrastive learning, but what an image is told from waits in a queue, encoded by a slow copy of the network.

With negatives from the batch alone their number is the batch. A queue of past encodings holds many more, if those
encoded a while ago can still be compared with those of now; so the encoder of the queue moves slowly, as an average
of the one that learns. No gradient reaches it. On arXiv since November 2019, the paper came a little before SimCLR,
whose projector and views this recipe keeps, as MoCo v2 does (arXiv:2003.04297). Over maps that are normalised in groups
no shuffling between devices is needed.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.papers.vision.simclr import Contrastive, Vectors, simclr
from deltax.parts.steps import Moving
from deltax.parts.views import jittered
from deltax.shapes import Images, PerExample
from deltax.tasks.digits import Batch


class Momentum(Moving):
    """The inner network, and beside it as `slow` one that follows it, and a queue of what that one said.

    Images (B, C, Y, X) -> (B, .width), the inner network's. The queue, (length, width), starts as noise of length one.
    """

    def __init__(self, channels: int, *, inner: Part = part(Contrastive), momentum: float = 0.99, length: int = 512):
        super().__init__()
        self.momentum = momentum
        self.inner, self.slow = inner(channels), inner(channels)
        self.slow.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(length, self.inner.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.slow.load_state_dict(self.inner.state_dict())
        self.queue.copy_(nn.functional.normalize(torch.randn_like(self.queue), dim=-1))

    def features(self, images: Images) -> Float[Tensor, "B D"]:
        return self.inner.features(images)

    def forward(self, images: Images) -> Vectors:
        return self.inner(images)

    def before(self) -> None:
        self.follow()

    def move(self, keys: Vectors) -> None:
        self.enqueue(keys)

    @torch.no_grad()
    def follow(self) -> None:
        """slow <- momentum slow + (1 - momentum) inner (Eq. 2)."""
        for slow, fast in zip(self.slow.parameters(), self.inner.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, images: Images) -> Vectors:
        """What the slow network says of images."""
        return self.slow(images)

    @torch.no_grad()
    def enqueue(self, keys: Vectors) -> None:
        """The newest keys enter at the front, and as many of the oldest leave."""
        self.queue.copy_(torch.cat([keys.to(self.queue), self.queue])[: len(self.queue)])


def info_nce(queries: Vectors, keys: Vectors, others: Float[Tensor, "M K"], *, temperature: float = 0.5) -> PerExample:
    """How surprising it is that queries[i] belongs to keys[i] and to none of the others, in nats (Eq. 1)."""
    own = (queries * keys).sum(-1, keepdim=True)
    scores = torch.cat([own, queries @ others.mT], -1).float() / temperature
    return scores.logsumexp(-1) - scores[:, 0]


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


@claim
def the_slow_network_gets_no_gradient():
    """A step's gradient reaches every weight of the inner network and none of the slow one's; the slow one has moved
    by Eq. 2, and with momentum 0 it is the inner network, to the bit."""
    torch.manual_seed(0)
    for momentum in (0.0, 0.9):
        model = _small(momentum=momentum).train()
        for parameter in model.inner.parameters():
            nn.init.normal_(parameter, std=0.3)
        start = [p.clone() for p in model.slow.parameters()]
        queued_contrast(model, _batch(5)).mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.inner.parameters())
        assert all(p.grad is None for p in model.slow.parameters())
        for slow, fast, before in zip(model.slow.parameters(), model.inner.parameters(), start, strict=True):
            torch.testing.assert_close(slow.data, momentum * before + (1 - momentum) * fast.data)
            assert torch.equal(slow, fast) == (momentum == 0)


@claim
def with_the_batch_for_a_queue_it_is_contrast_within_the_batch():
    """With the other keys of the batch in place of the queue the loss is that of telling pairs in a batch: the rows of
    queries by keys, softmaxed, with gradients."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    queries, keys = (nn.functional.normalize(x, dim=-1) for x in (q, k))
    rows = queries @ keys.mT / 0.2
    within = nn.functional.cross_entropy(rows, torch.arange(6), reduction="none")
    ours = torch.cat([info_nce(queries[[i]], keys[[i]], keys[torch.arange(6) != i], temperature=0.2) for i in range(6)])
    torch.testing.assert_close(ours.double(), within, rtol=1e-5, atol=1e-6)
    slopes = (torch.autograd.grad(loss.sum(), [q, k], retain_graph=True) for loss in (ours, within))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@claim
def first_in_first_out():
    """The queue holds the newest keys, newest first, and forgets the oldest, also when a batch is longer than it."""
    model = _small(length=7)
    keys = torch.randn(4, 3, model.inner.width)
    for each in keys:
        model.enqueue(each)
    newest = torch.cat([keys[3], keys[2], keys[1]])[:7]
    torch.testing.assert_close(model.queue, newest)
    many = torch.randn(9, model.inner.width)
    model.enqueue(many)
    torch.testing.assert_close(model.queue, many[:7])


@claim
def looking_changes_nothing():
    """In evaluation the loss moves neither queue nor slow network."""
    model = _small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    queued_contrast(model, _batch(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@claim.measured(paper="momentum 0 fails, 0.9 gives 55.2, 0.99 57.8, 0.999 59.0 % of ImageNet (section 4.1)")
def the_copy_must_be_slow(lab):
    """With a queue, a copy that does not lag is read at least 5 % worse by a linear classifier than one of momentum
    0.99."""
    errors = {m: [lab.train(simclr + moco(momentum=m), seed=s).score for s in lab.seeds(3)] for m in (0.0, 0.9, 0.99)}
    worse = [a - b for a, b in zip(errors[0.0], errors[0.99], strict=True)]
    return lab.at_least(worse, 5.0, unit="% error of a linear probe", numbers={"error by momentum": errors})


@claim.measured(paper="MoCo needs no batch of thousands: 60.6 % linear at batch 256 (Table 1)")
def small_batches_suffice(lab):
    """At batches of 16, both tuned, MoCo's features are read better by a linear classifier than SimCLR's."""
    x = simclr.put("loop.batch", 16)
    return lab.compare(x, x + moco, budget="solid", pairs=3, ladder="off").better


def _small(**settings) -> Momentum:
    torch.manual_seed(0)
    backbone = simclr["model.backbone"]
    return Momentum(1, inner=part(Contrastive, backbone=backbone), **settings)


def _batch(size: int) -> Batch:
    return Batch(torch.randn(size, 1, 8, 8), torch.zeros(size, dtype=torch.long))
