"""Claims of model-soup: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.papers.optimization.losses.dropout import dropout
from deltax.papers.vision.training.model_soup import State, soup, uniform
from deltax.parts.model.perceptron import Perceptron, classifier
from deltax.tasks.images.digits import Batch
from deltax.tasks.images.zip_codes import ZipCodes


@claim
def never_worse_than_the_best():
    """Whatever is scored, the greedy soup scores no worse than every single state; the uniform soup may."""
    torch.manual_seed(0)
    worse = 0
    for _ in range(30):
        states = [{"w": torch.randn(3, 5, dtype=torch.float64)} for _ in range(6)]
        ripple, push = torch.randn(2, 3, 5, dtype=torch.float64)
        score = lambda s, r=ripple, p=push: ((3 * s["w"] * r).sin() + 0.1 * (s["w"] - p).square()).sum().item()
        best = min(map(score, states))
        assert score(soup(states, score)) <= best + 1e-12
        worse += score(uniform(states)) > best
    assert worse > 0


@claim
def a_soup_of_linear_models_is_their_ensemble():
    """Where outputs are linear in the weights, the soup's outputs and their gradients are the mean of the models'."""
    torch.manual_seed(0)
    models = [nn.Linear(5, 3).double() for _ in range(4)]
    mixed = nn.Linear(5, 3).double()
    mixed.load_state_dict(uniform([m.state_dict() for m in models]))
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    pair = mixed(x), torch.stack([m(x) for m in models]).mean(0)
    torch.testing.assert_close(*pair)
    push = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((y * push).sum(), x)[0] for y in pair))


@claim
def of_one_it_is_that_one():
    """A soup of one state, or of one state and others that make it worse, is that state, to the bit."""
    torch.manual_seed(0)
    states = [{"w": torch.randn(4), "seen": torch.tensor(3)}, {"w": torch.randn(4) + 9, "seen": torch.tensor(5)}]
    score = lambda state: (state["w"] - states[0]["w"]).abs().sum().item()
    for mixed in (uniform(states[:1]), soup(states, score), soup(states[::-1], score)):
        assert torch.equal(mixed["w"], states[0]["w"]) and mixed["seen"] == 3


@claim.parity(peer="torch.optim.swa_utils.AveragedModel")
def equals_torch():
    """The uniform soup of models is torch's running average of them."""
    from torch.optim.swa_utils import AveragedModel

    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)) for _ in range(5)]
    for tensor in (t for m in models for t in m.state_dict().values() if t.is_floating_point()):
        nn.init.uniform_(tensor, 0.5, 2.0)
    averaged = AveragedModel(models[0], use_buffers=True)
    for model in models:
        averaged.update_parameters(model)
    ours, theirs = uniform([m.state_dict() for m in models]), averaged.module.state_dict()
    for name in ours:
        if ours[name].is_floating_point():
            torch.testing.assert_close(ours[name], theirs[name], msg=name)


@claim.measured(paper="greedy soup 81.03 against 80.38 % for the best of 72 fine-tuned CLIP ViT-B/32 (Table 3)")
def better_than_the_best(lab):
    """Of eight networks fine-tuned from one start, at four rates and two seeds each, the greedy soup reads new digits
    better than the one that would be picked.

    Pre-trained on upright digits and fine-tuned on 100 turned by 40 degrees; one half of the held-out digits picks and
    fills the soup, the other half scores. A first version had the rates 0.3, 1, 2 and 4, and asked only that less than
    1 % more digits be misread.
    """
    gains, table = [], []
    for seed in lab.seeds(5):
        states, picking, scoring = _fine_tuned(lab, seed, from_one_start=True)
        best = min(states, key=picking)
        row = {
            "mean of eight": sum(map(scoring, states)) / len(states),
            "picked": scoring(best),
            "uniform soup": scoring(uniform(states)),
            "greedy soup": scoring(soup(states, picking)),
        }
        table.append(row)
        gains.append(row["picked"] - row["greedy soup"])
    return lab.at_least(gains, 0.0, unit="% error", numbers={"error, %": table})


@claim.measured(paper="runs that do not share a start are not linearly connected; soups are of one pre-trained model")
def different_starts_do_not_mix(lab):
    """The uniform soup of eight networks that were each trained from a start of their own reads at least 20 % of the
    digits less than they do on average."""
    losses = []
    for seed in lab.seeds(5):
        states, _, scoring = _fine_tuned(lab, seed, from_one_start=False)
        losses.append(scoring(uniform(states)) - sum(map(scoring, states)) / len(states))
    return lab.at_least(losses, 20.0, unit="% error")


def _fine_tuned(lab, seed: int, *, from_one_start: bool):
    """Eight states, the score that picks among them and the score that counts, each the error in percent."""
    network = part(Perceptron, widths=(128, 128))
    upright = classifier(network, part(ZipCodes), batch=30, steps=300) + dropout(p=0.2)
    turned = upright.put("task", part(ZipCodes, images=100, turn=40.0)).put("loop.steps", 150)
    start = lab.train(upright, seed=seed).model.state_dict() if from_one_start else None
    runs = [
        lab.train(turned, seed=seed + 100 * copy, lr_scale=lr_scale, weights=start)
        for lr_scale in (1.0, 2.0, 3.0, 4.0)
        for copy in (1, 2)
    ]
    model, held_out = runs[0].model, lab.task(turned).all()
    halves = [Batch(*(tensor[side::2] for tensor in held_out)) for side in (0, 1)]
    picking, scoring = (lambda state, half=half: _error(model, state, half) for half in halves)
    return [run.model.state_dict() for run in runs], picking, scoring


@torch.no_grad()
def _error(model: nn.Module, state: State, batch: Batch) -> float:
    said = torch.func.functional_call(model, state, (batch.images,)).argmax(-1)
    return 100 * (said != batch.labels).double().mean().item()
