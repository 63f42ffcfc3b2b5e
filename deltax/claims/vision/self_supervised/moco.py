"""Claims of moco: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from torch import nn

from deltax import claim, part
from deltax.papers.vision.self_supervised.moco import Momentum, info_nce, moco, queued_contrast
from deltax.papers.vision.self_supervised.simclr import Contrastive, simclr
from deltax.tasks.images.digits import Batch


@claim
def the_slow_network_gets_no_gradient():
    """A step's gradient reaches every weight of the inner network and none of the slow one's; the slow one has moved
    by Eq. 2, and with momentum 0 it is the inner network, to the bit."""
    torch.manual_seed(0)
    for momentum in (0.0, 0.9):
        model = _small(momentum=momentum).train()
        for parameter in model.inner.parameters():
            nn.init.normal_(parameter, std=0.3)
        start = [p.clone() for p in model.key_encoder.parameters()]
        queued_contrast(model, _batch(5)).mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.inner.parameters())
        assert all(p.grad is None for p in model.key_encoder.parameters())
        for slow, fast, before in zip(model.key_encoder.parameters(), model.inner.parameters(), start, strict=True):
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
def who_cannot_tell_is_at_chance():
    """Where all keys are one, the loss is log(1 + K) at any temperature, 11.09 nats with the paper's K of 65536; where
    the own key is the query and the others are opposite, it is log(1 + K exp(-2 / t))."""
    query = nn.functional.normalize(torch.randn(1, 128, dtype=torch.float64), dim=-1)
    queue = query.expand(65536, -1)
    for temperature in (0.07, 0.5):
        chance = info_nce(query, query, queue, temperature=temperature)
        torch.testing.assert_close(chance, torch.tensor([math.log(65537)], dtype=torch.float64))
        told = info_nce(query, query, -queue, temperature=temperature)
        torch.testing.assert_close(told, torch.log1p(65536 * torch.exp(torch.tensor([-2 / temperature]).double())))


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
