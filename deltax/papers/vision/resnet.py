"""Deep Residual Learning for Image Recognition. He, Zhang, Ren, Sun, 2015. arXiv:1512.03385

A deep convolutional network, but each unit learns only what to add to its input.

Stack more plain layers and training itself gets worse, though the deeper net could copy the shallower one. A unit
that has only to learn a difference copies by learning nothing. Networks for ImageNet begin with a stem that cuts the
image down by four; the one built here is of the kind of section 4.2, 6n + 2 layers for small images. The stride of a
bottleneck sits on its 3 x 3 convolution, as in every released set of weights, not on the first 1 x 1 as printed.
"""

import re
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.contract import IMAGES_TO_LOGITS
from deltax.paper import paper_of
from deltax.papers.optimization.batch_norm import BatchNorm
from deltax.papers.vision.lenet_1989 import lenet_1989
from deltax.parts.convolution import ConvNorm, SmallStem, Stem
from deltax.parts.linear import Linear
from deltax.parts.objectives import classify
from deltax.parts.optimizers import sgd
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.shapes import Images, Maps
from deltax.tasks.pictures import Pictures


class Convolutions(nn.ModuleList):
    """Normed convolutions, one after the other, with a relu between. Images (B, C, Y, X) -> (B, D, Y', X')."""

    def forward(self, x: Images) -> Maps:
        *inner, last = self
        for layer in inner:
            x = torch.relu(layer(x))
        return last(x)


class Basic(Convolutions):
    """Two 3 x 3 convolutions, the first with the stride (Figure 5, left)."""

    def __init__(self, channels: int, out: int, stride: int, *, map_norm: Part = part(BatchNorm)):
        super().__init__(
            [ConvNorm(channels, out, stride=stride, map_norm=map_norm), ConvNorm(out, out, map_norm=map_norm)]
        )


class Bottleneck(Convolutions):
    """1 x 1 down to a `squeeze`-th of the channels, 3 x 3 with the stride, 1 x 1 up again (Figure 5, right)."""

    def __init__(self, channels: int, out: int, stride: int, *, squeeze: int = 4, map_norm: Part = part(BatchNorm)):
        inner = out // squeeze
        super().__init__(
            [
                ConvNorm(channels, inner, size=1, map_norm=map_norm),
                ConvNorm(inner, inner, stride=stride, map_norm=map_norm),
                ConvNorm(inner, out, size=1, map_norm=map_norm),
            ]
        )


class Plain(nn.Module):
    """relu(branch(x)): a unit of the networks that ResNet is compared with."""

    def __init__(self, channels: int, out: int, stride: int, *, branch: Part = part(Basic)):
        super().__init__()
        self.branch = branch(channels, out, stride)

    def forward(self, x: Images) -> Maps:
        return torch.relu(self.branch(x))


class Residual(nn.Module):
    """relu(branch(x) + x), or, where the shapes differ, a normed 1 x 1 convolution of x (Eq. 1 and 2, option B)."""

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int,
        *,
        branch: Part = part(Basic),
        map_norm: Part = part(BatchNorm),
    ):
        super().__init__()
        self.branch = branch(channels, out, stride)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(channels, out, size=1, stride=stride, map_norm=map_norm)

    def forward(self, x: Images) -> Maps:
        return torch.relu(self.branch(x) + self.shortcut(x))


class Backbone(nn.Module):
    """stem -> stages of units. Images (B, C, Y, X) -> maps (B, .width, Y', X').

    Stage i has depths[i] units of widths[i] channels; each stage after the first halves the image: `strides` gives the
    pixels that a cell of each stage's maps stands for.
    """

    def __init__(
        self,
        channels: int,
        *,
        stem: Part = part(Stem, map_norm=BatchNorm),
        stem_width: int = 64,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        unit: Part = part(Residual),
    ):
        super().__init__()
        self.stem = stem(channels, stem_width)
        self.stages = nn.ModuleList()
        before = stem_width
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            first = unit(before, width, 1 if i == 0 else 2)
            self.stages.append(nn.Sequential(first, *(unit(width, width, 1) for _ in range(depth - 1))))
            before = width
        self.width, self.widths = before, widths

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.stem.stride * 2**i for i in range(len(self.widths)))

    def each(self, images: Images) -> Iterator[Maps]:
        """The maps after every stage."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
            yield x

    def forward(self, images: Images) -> Maps:
        *_, last = self.each(images)
        return last


class ResNet(nn.Module):
    """Images (B, C, Y, X) -> logits (B, V), of the mean over the last maps. `channels`, `classes`: the task's."""

    interface = IMAGES_TO_LOGITS

    def __init__(
        self, channels: int, classes: int, *, backbone: Part = part(Backbone), classifier: Part = part(Linear)
    ):
        super().__init__()
        self.backbone = backbone(channels)
        self.classifier = classifier(self.backbone.width, classes)

    def forward(self, images: Images) -> Float[Tensor, "B V"]:
        return self.classifier(self.backbone(images).mean((-2, -1)))


@paper(on=(lenet_1989, BatchNorm), year=2015, arxiv="1512.03385")
def resnet(*, n: int = 1, width: int = 8) -> Part:
    stem = part(SmallStem, map_norm=BatchNorm)
    backbone = part(Backbone, stem=stem, stem_width=width, widths=(width, 2 * width, 4 * width), depths=(n, n, n))
    return part(
        Run,
        model=part(ResNet, backbone=backbone),
        task=Pictures,
        objective=classify,
        batches=from_task,
        optimizer=sgd,
        schedule=cosine,
        loop=part(Loop, batch=64, steps=300),
    )


_HF = (
    (r"embedder\.embedder\.", "stem."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.", r"stages.\1.\2.branch.\3."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.", r"stages.\1.\2.shortcut."),
)


def backbone_from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ResNetModel as that of a `Backbone`."""
    return {
        _renamed(k.replace(".convolution.", ".conv.").replace(".normalization.", ".norm.")): v for k, v in state.items()
    }


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` ResNetForImageClassification as that of a `ResNet`."""
    inside = {k.removeprefix("resnet."): v for k, v in state.items() if k.startswith("resnet.")}
    last = {f"classifier.{kind}": state[f"classifier.1.{kind}"] for kind in ("weight", "bias")}
    return {f"backbone.{k}": v for k, v in backbone_from_hf(inside).items()} | last


def _renamed(name: str) -> str:
    for pattern, ours in _HF:
        name = re.sub(f"^{pattern}", ours, name)
    return name


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
