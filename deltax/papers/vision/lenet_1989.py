"""Backpropagation Applied to Handwritten Zip Code Recognition. LeCun, Boser, Denker, Henderson, Howard, Hubbard,
Jackel, 1989.

A network trained whole by back-propagation, but its first layers look through small windows that share their weights.

A stroke means the same wherever it stands, so one set of weights looks for it everywhere, and a map says where it was
found. Weights are shared and biases are not: each unit has its own. The paper does not print which maps of the first
layer each of the second sees; here, as in Karpathy's re-run, three groups of four see eight maps each. Plain gradient
steps stand in for the paper's diagonal of the Hessian. Its output units end in a tanh; it stands in the objective.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.contract import IMAGES_TO_LOGITS, needs
from deltax.parts.nothing import Nothing
from deltax.parts.optimizers import sgd
from deltax.parts.perceptron import tanh
from deltax.parts.roles import tag
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import constant
from deltax.shapes import Images, Maps, PerExample
from deltax.tasks.digits import Batch
from deltax.tasks.zip_codes import ZipCodes

PAPER = -1.0  # the value of what has no ink, and of what lies outside
GROUPS = (tuple(range(8)), tuple(range(4, 12)), (*range(4), *range(8, 12)))  # maps of H1 that four of H2 see
PASSES, IMAGES = 23, 300


class Detectors(nn.Module):
    """Windows of 5 by 5 at every second place, over a border of -1. Images (B, C, Y, X) -> (B, D, Y/2, X/2).

    Weights are shared over places, biases are not. groups[i] names the maps that the i-th part of the D maps sees.
    """

    def __init__(self, size: int, out: int, groups: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.groups, seen = groups, len(groups[0])
        self.weight = tag(nn.Parameter(torch.empty(out, seen, 5, 5)), "matrix")
        self.bias = tag(nn.Parameter(torch.empty(out, size // 2, size // 2)), "vector")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.weight, self.weight[0].numel())
        nn.init.zeros_(self.bias)

    def forward(self, x: Images) -> Maps:
        padded = nn.functional.pad(x, (2, 2, 2, 2), value=PAPER)
        seen = torch.cat([padded[:, group] for group in self.groups], 1) if len(self.groups) > 1 else padded
        return nn.functional.conv2d(seen, self.weight, stride=2, groups=len(self.groups)) + self.bias


class Units(nn.Linear):
    """x W' + b, W uniform in +-2.4 / sqrt(fan in); b starts at `bias`. (B, D) -> (B, F)."""

    def __init__(self, dim: int, out: int, *, bias: float = 0.0):
        self.start = bias
        super().__init__(dim, out)
        tag(self.weight, "matrix")

    def reset_parameters(self) -> None:
        _uniform(self.weight, self.in_features)
        nn.init.constant_(self.bias, self.start)


class LeNet(nn.Module):
    """Images (B, 1, 16, 16) -> logits (B, V): 12 maps of 8 by 8, 12 of 4 by 4, 30 units (Figure 3)."""

    interface = IMAGES_TO_LOGITS

    def __init__(
        self,
        size: int,
        classes: int,
        *,
        activation: Part = part(tanh),
        map_norm: Part = part(Nothing),
        dropout: Part = part(Nothing),
    ):
        super().__init__()
        self.h1 = Detectors(size, 12, ((0,),))
        self.h2 = Detectors(size // 2, 12, GROUPS)
        self.h3 = Units(12 * (size // 4) ** 2, 30)
        self.output = Units(30, classes, bias=-1.0)
        self.norms = nn.ModuleList(map_norm(12) for _ in range(2))
        self.activation, self.dropout = activation, dropout()

    def features(self, images: Images) -> Float[Tensor, "B 30"]:
        """What H3 makes of an image."""
        first, second = self.norms
        maps = self.activation(first(self.h1(images)))
        maps = self.activation(second(self.h2(maps)))
        return self.activation(self.h3(self.dropout(maps.flatten(1))))

    def forward(self, images: Images) -> Float[Tensor, "B V"]:
        return self.output(self.features(images))


@needs("images", "labels", model=IMAGES_TO_LOGITS)
def squared_error(model: nn.Module, batch: Batch) -> PerExample:
    """Mean over classes of (tanh(z) - t)^2, t = 1 for the class shown and -1 for the others."""
    said = torch.tanh(model(batch.images).float())
    right = 2 * nn.functional.one_hot(batch.labels, said.shape[-1]) - 1
    return (said - right).square().mean(-1)


@paper(year=1989, url="https://doi.org/10.1162/neco.1989.1.4.541")
def lenet_1989(*, passes: int = PASSES, images: int = IMAGES) -> Part:
    return part(
        Run,
        model=LeNet,
        task=part(ZipCodes, images=images),
        objective=squared_error,
        batches=from_task,
        optimizer=part(sgd, rate=0.03, momentum=0.0),
        schedule=constant,
        loop=part(Loop, batch=1, steps=passes * images, clip=1000.0),
    )


def _uniform(weight: Tensor, fan_in: int) -> None:
    """+-2.4 / sqrt(fan in); the paper prints 2.4 / fan in, from which this network would hardly start to learn."""
    bound = 2.4 / math.sqrt(fan_in)
    nn.init.uniform_(weight, -bound, bound)


@claim
def weights_and_connections_are_those_of_the_paper():
    """The layers have 1068 + 2592 + 5790 + 310 = 9760 weights, which make 64,660 connections (section 3)."""
    model = LeNet(16, 10)
    layers = (model.h1, model.h2, model.h3, model.output)
    assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == [1068, 2592, 5790, 310]
    images = torch.randn(1, 1, 16, 16)
    connections, x = 0, images
    for layer in layers:
        x = x.flatten(1) if isinstance(layer, Units) else x
        x = layer(x)
        connections += x[0].numel() * (layer.weight[0].numel() + 1)
    assert connections == 64_660


@claim
def a_unit_sees_its_window_and_no_more():
    """A unit of H1 depends on 25 pixels, or on those of its window that lie inside; a unit of H2 on the windows of
    8 maps. Outside the image lies paper: a wider blank image changes nothing."""
    torch.manual_seed(0)
    layer = Detectors(8, 12, GROUPS).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(1, 12, 8, 8, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(layer, x)[0, :, :, :, 0] != 0  # maps, places, maps, places
    for i in range(12):
        seen = slopes[i, 1, 2].flatten(1).sum(1)
        assert seen.tolist() == [25 * (m in GROUPS[i // 4]) for m in range(12)]
        assert slopes[i, 0, 0].flatten(1).sum() == 8 * 9
    wide = Detectors(12, 12, GROUPS).double()
    wide.weight.data, wide.bias.data[:, 1:5, 1:5] = layer.weight.data, layer.bias.data
    blank = nn.functional.pad(x, (2, 2, 2, 2), value=PAPER)
    torch.testing.assert_close(wide(blank)[..., 1:5, 1:5], layer(x))


@claim.parity(peer="torch.nn.Conv2d and torch.nn.MSELoss")
def equals_torch():
    """With the pairs of maps that are not connected at zero and a bias added for each unit, two of torch's convolutions
    and two linear maps give the same logits, loss and gradients, all weights random."""
    torch.manual_seed(0)
    model = LeNet(16, 7).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images, labels = torch.randn(3, 1, 16, 16, dtype=torch.float64), torch.tensor([1, 0, 6])
    first, second = (nn.Conv2d(c, 12, 5, 2, bias=False).double() for c in (1, 12))
    first.weight.data = model.h1.weight.data.clone()
    second.weight.data.zero_()
    for i in range(12):
        second.weight.data[i, list(GROUPS[i // 4])] = model.h2.weight.data[i]
    pad = nn.ConstantPad2d(2, PAPER)
    x = torch.tanh(first(pad(images)) + model.h1.bias.detach())
    x = torch.tanh(second(pad(x)) + model.h2.bias.detach())
    x = torch.tanh(nn.functional.linear(x.flatten(1), model.h3.weight.detach(), model.h3.bias.detach()))
    theirs = nn.functional.linear(x, model.output.weight.detach(), model.output.bias.detach())
    torch.testing.assert_close(model(images), theirs)
    target = torch.full((3, 7), -1.0, dtype=torch.float64)
    target[range(3), labels] = 1
    loss = nn.MSELoss()(torch.tanh(theirs), target)
    loss.backward()
    ours = squared_error(model, Batch(images, labels)).mean()
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-6)
    ours.backward()
    torch.testing.assert_close(model.h1.weight.grad, first.weight.grad, rtol=1e-4, atol=1e-6)
    for i in range(12):
        torch.testing.assert_close(
            model.h2.weight.grad[i], second.weight.grad[i, list(GROUPS[i // 4])], rtol=1e-4, atol=1e-6
        )


@claim.measured(paper="5.0 % of 2,007 test digits wrong after 23 passes over 7,291 (section 5.1); 4.1 % in the re-run")
def learns_to_read(lab):
    """After 23 passes over 300 digits fewer than 8 % of the held-out digits are read wrongly."""
    runs = [lab.train("lenet-1989", seed=seed) for seed in lab.seeds(3)]
    numbers = {"training error, %": [run.evaluation.metrics["training error"] for run in runs]}
    figures = {"The twelve windows of H1 that one run learned": lab.figure(windows(runs[0].model))}
    return lab.at_most([run.score for run in runs], 8.0, unit="% error", numbers=numbers, figures=figures)


def windows(model: LeNet):
    """A matplotlib figure of the weights of H1, white where ink is wanted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.2), layout="constrained")
    for axes, weight in zip(figure.subplots(1, 12), model.h1.weight.detach()[:, 0], strict=True):
        axes.imshow(weight, cmap="gray", vmin=-weight.abs().max(), vmax=weight.abs().max())
        axes.set_axis_off()
    return figure
