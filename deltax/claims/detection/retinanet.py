"""Claims of retinanet: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim
from deltax.papers.detection.retinanet import DenseHead, focal, one_stage, retinanet
from deltax.tasks.detection.scenes import Scenes, draw


@claim
def without_focus_it_is_cross_entropy():
    """With gamma = 0 and no alpha, focal loss and its gradient are those of binary cross-entropy."""
    torch.manual_seed(0)
    logits, targets = 9 * torch.randn(99, dtype=torch.float64), (torch.rand(99) < 0.3).double()
    logits.requires_grad_()
    ours = focal(logits, targets, gamma=0.0, alpha=-1.0)
    plain = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(ours, plain)
    mine, theirs = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, plain))
    torch.testing.assert_close(mine, theirs)


@claim
def what_is_known_fades():
    """With gamma = 2, an example at p = 0.9 has a hundredth of the cross-entropy's loss, one at 0.968 less than a
    thousandth, and a wrong one at 0.5 at most a quarter (section 3.2); far out, loss and gradient stay finite."""
    p = torch.tensor([0.9, 0.9685, 0.5, 0.1], dtype=torch.float64)
    share = focal(p.logit(), torch.ones(4), alpha=-1.0) / -p.log()
    torch.testing.assert_close(share, (1 - p) ** 2)
    assert share[0] < 0.0101 and share[1] < 0.001 and share[2] <= 0.25
    far = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    loss = focal(far, torch.tensor([1.0, 0.0]))
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), far)[0].isfinite().all()


@claim
def silence_is_the_first_guess():
    """A new head gives every class at every anchor a probability of about 0.01, so that the background costs little."""
    model = retinanet["model"](channels=1, classes=3)
    odds = model(torch.randn(2, 1, 45, 37)).logits.sigmoid()
    assert (odds - 0.01).abs().max() < 0.001 and odds.shape[1] == len(model(torch.zeros(1, 1, 45, 37)).anchors)


@claim
def no_object_moves_no_box():
    """An empty scene's loss is finite, lowers every logit, and has no gradient in the offsets."""
    torch.manual_seed(0)
    model = retinanet["model"](channels=1, classes=3).double()
    batch = Scenes(classes=3).batch(0, size=2, seed=0)
    empty = batch._replace(images=batch.images.double(), labels=torch.full_like(batch.labels, -1))
    loss = one_stage(model, empty)
    of_classes, of_offsets = torch.autograd.grad(
        loss.sum(), (model.dense_head.classes.bias, model.dense_head.offsets.bias)
    )
    assert loss.isfinite().all() and (of_classes > 0).all() and of_offsets.abs().max() == 0


@claim.parity(peer="transformers sigmoid_focal_loss")
def equals_transformers():
    """The values and gradients of the focal loss with which transformers trains DETR's descendants."""
    from transformers.loss.loss_for_object_detection import sigmoid_focal_loss

    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True), torch.rand(3, 7, 5) < 0.2
    ours = focal(logits, targets.double(), gamma=2.0, alpha=0.3).mean(1).sum() / 4
    theirs = sigmoid_focal_loss(logits, targets.double(), num_boxes=4, alpha=0.3, gamma=2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


@claim.measured(paper="34.0 AP with focal loss against 31.1 with the best balanced cross-entropy (Table 1 b)")
def better_than_cross_entropy(lab):
    """Of every 500 answers one is an object's; from the same prior, focal loss ends at a higher AP than plain
    cross-entropy."""
    plain = retinanet.set(one_stage, gamma=0.0, alpha=-1.0)
    gains, shown = [], {}
    for seed in lab.seeds(3):
        ours, theirs = lab.train(retinanet, seed=seed), lab.train(plain, seed=seed)
        gains.append(ours.evaluation.metrics.get("AP", 0.0) - theirs.evaluation.metrics.get("AP", 0.0))
        if not shown:
            batch = next(ours.task.held_out_batches(8))
            figure = draw(batch.images, ours.model.detect(batch.images), batch)
            shown = {"Held-out scenes: what was found, and, dashed, what is there": lab.figure(figure)}
    return lab.at_least(gains, 0.0, unit="AP", figures=shown)


@claim.measured(paper="without the prior, cross-entropy diverges (section 5.1)")
def without_the_prior_background_swamps(lab):
    """The first loss of plain cross-entropy is at least 20 times higher when every anchor starts at a probability of a
    half than when it starts at a hundredth."""
    plain = retinanet.set(one_stage, gamma=0.0, alpha=-1.0)
    first = lambda recipe, seed: lab.train(recipe, seed=seed, steps=1).losses[0][1]
    times = [first(plain.set(DenseHead, prior=0.5), seed) / first(plain, seed) for seed in lab.seeds(3)]
    return lab.at_least(times, 20.0, unit="times")
