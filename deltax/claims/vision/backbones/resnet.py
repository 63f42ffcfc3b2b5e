"""Claims of resnet: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.paper import paper_of
from deltax.papers.vision.backbones.resnet import Backbone, Basic, Bottleneck, Plain, Residual, ResNet, resnet
from deltax.weights.vision.backbones.resnet import from_hf


@claim
def a_unit_that_has_learned_nothing_copies():
    """With a branch that gives zero, a unit on maps that are nowhere negative is the identity, to the bit, and its
    input's gradient passes whole; a plain unit loses both."""
    torch.manual_seed(0)
    x = torch.rand(2, 5, 7, 7, dtype=torch.float64).requires_grad_()
    for unit in (Residual(5, 5, 1).double(), Plain(5, 5, 1).double()):
        nn.init.zeros_(unit.branch[-1].norm.weight)
        x.grad = None
        unit(x).sum().backward()
        copies = torch.equal(unit(x), x) and torch.equal(x.grad, torch.ones_like(x))
        assert copies == isinstance(unit, Residual)


@claim
def layers_are_counted():
    """There are 6n + 2 layers: the stem, 6n convolutions in branches, and the classifier (section 4.2)."""
    for n in (1, 3):
        model = paper_of(resnet)(n=n)().build({"channels": 1, "classes": 10})
        names = [k for k, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in k]
        assert len(names) == 6 * n + 2


@claim.parity(peer="transformers ResNetForImageClassification")
def equals_transformers():
    """The same random weights and statistics give transformers' logits, gradients and new running statistics, with
    basic and with bottleneck units, training and not, at odd sizes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    for kind, branch in (("basic", Basic), ("bottleneck", Bottleneck)):
        torch.manual_seed(0)
        config = ResNetConfig(
            num_channels=2, embedding_size=6, hidden_sizes=[8, 12], depths=[2, 3], layer_type=kind, num_labels=5
        )
        theirs = _random(ResNetForImageClassification(config).double())
        backbone = part(Backbone, stem_width=6, widths=(8, 12), depths=(2, 3), unit=part(Residual, branch=branch))
        ours = ResNet(2, 5, backbone=backbone).double()
        ours.load_state_dict(from_hf(theirs.state_dict()))
        images = torch.randn(3, 2, 37, 41, dtype=torch.float64)
        for training in (False, True):
            a, b = ours.train(training)(images), theirs.train(training)(images).logits
            torch.testing.assert_close(a, b)
            for model, logits in ((ours, a), (theirs, b)):
                model.zero_grad()
                logits.square().sum().backward()
            gradients = from_hf({name: p.grad for name, p in theirs.named_parameters()})
            for name, parameter in ours.named_parameters():
                torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
        for name, value in from_hf(theirs.state_dict()).items():
            torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


@claim.measured(paper="plain-34 28.54 against plain-18 27.94 top-1 error on ImageNet (Table 2)")
def deeper_plain_networks_train_worse(lab):
    """Without shortcuts, 38 layers end at a training loss at least 0.05 nats above that of 8 layers."""
    return lab.at_least(_deeper(lab, Plain), 0.05, unit="nats")


@claim.measured(paper="ResNet-34 25.03 against ResNet-18 27.88 top-1 error on ImageNet (Table 2)")
def deeper_residual_networks_do_not(lab):
    """With shortcuts, 38 layers end at a training loss less than 0.05 nats above that of 8 layers."""
    return lab.at_most(_deeper(lab, Residual), 0.05, unit="nats")


def _deeper(lab, unit: type[nn.Module]) -> list[float]:
    """The training loss of 38 layers less that of 8, over the last tenth of the run, for each seed."""
    gaps = []
    for seed in lab.seeds(3):
        ends = []
        for n in (6, 1):
            losses = [nats for _, nats in lab.train(paper_of(resnet)(n=n).fill("unit", unit), seed=seed).losses]
            last = losses[-max(1, len(losses) // 10) :]
            ends.append(sum(last) / len(last))
        gaps.append(ends[0] - ends[1])
    return gaps


def _random(model: nn.Module) -> nn.Module:
    """Every parameter and statistic random; variances and gains positive."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            positive = name.endswith(("running_var", "normalization.weight"))
            tensor.copy_(0.5 + torch.rand_like(tensor) if positive else torch.randn_like(tensor) * 0.3)
    return model
