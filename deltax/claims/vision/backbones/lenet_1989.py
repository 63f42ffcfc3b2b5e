"""Claims of lenet-1989: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim
from deltax.papers.vision.backbones.lenet_1989 import GROUPS, PAPER, Detectors, LeNet, Units, squared_error
from deltax.tasks.images.digits import Batch


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
