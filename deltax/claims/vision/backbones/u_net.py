"""Claims of u-net: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.papers.vision.backbones.u_net import Conditioned, UNet, beside, cut, u_net
from deltax.parts.attention.context import Context
from deltax.parts.model.convolution import GroupNorm
from deltax.weights.vision.backbones.u_net import from_hf


@claim
def the_bottom_alone_cannot_say_where():
    """With its skips cut, and no way to pass but the bottom, two images that differ only in detail that halving loses
    come out the same, to the bit; with skips they do not."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 10, dtype=torch.float64)
    for skip in (beside, cut):
        model = _random(UNet(1, 6, 1, widths=(8, 16), skip=part(skip)))
        with torch.no_grad():  # a first convolution that copies, and a halving that sees every second pixel
            model.into.weight.zero_()
            model.into.weight[:, :, 1, 1] = 1
            model.into.bias.zero_()
            for conv in (model.down[0][0].first, model.down[0][0].second, model.shrink[0]):
                conv.weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        other = x.clone()
        other[..., 1::2, :] += 1
        same = torch.equal(model(x, Context()), model(other, Context()))
        assert same == (skip is cut)


@claim
def any_size_comes_back():
    """Images of odd sizes come back at their own, with a gradient for every pixel and every weight."""
    for size in ((16, 16), (7, 11), (4, 5)):
        model = _random(UNet(2, 16, 3, widths=(4, 8, 8), level=part(Conditioned)))
        x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
        y = model(x, Context(condition=torch.randn(2, 3, dtype=torch.float64)))
        assert y.shape == x.shape
        y.square().sum().backward()
        assert (x.grad != 0).all() and all(p.grad.abs().sum() > 0 for p in model.parameters())


@claim
def it_starts_at_zero():
    """A fresh network gives zero for any image: a denoiser that says nothing yet."""
    model = UNet(1, 8, 1)
    assert not model(torch.randn(3, 1, 8, 8), Context()).any()


@claim.parity(peer="diffusers UNet2DModel")
def equals_diffusers():
    """The same random weights give the output of diffusers' network without attention, and its gradients, for images
    that are not square."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    theirs = UNet2DModel(
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=4,
        add_attention=False,
    )
    _random(theirs)
    norm = part(GroupNorm, groups=4)
    units = part(Conditioned, map_norm=norm)
    ours = UNet(2, 8, 32, widths=(8, 16, 24), depth=2, level=units, map_norm=norm).double()
    ours.load_state_dict(from_hf(theirs.state_dict()))
    x, times = torch.randn(3, 2, 8, 12, dtype=torch.float64), torch.tensor([0, 17, 999])
    condition = theirs.time_embedding(theirs.time_proj(times).double())
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    a, b = ours(leaves[0], Context(condition=condition)), theirs(leaves[1], times).sample
    torch.testing.assert_close(a, b)
    push = torch.randn_like(a)
    for y in (a, b):
        (y * push).sum().backward(retain_graph=True)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    gradients = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


@claim.measured(paper="the skips let the network localise; 92 % IoU against 83 % of the second best (Table 2)")
def skips_restore_where_things_are(lab):
    """With its skips cut, the same network restores held-out digits from noise with at least 10 % more squared
    error."""
    worse, runs = [], {}
    for seed in lab.seeds(3):
        runs = {"with skips": lab.train("u-net", seed=seed), "cut": lab.train(u_net.fill("skip", cut), seed=seed)}
        worse.append(100 * (runs["cut"].score / runs["with skips"].score - 1))
    figures = {"Six held-out digits: as they are, spoilt, restored with skips and without": lab.figure(_shown(runs))}
    return lab.at_least(worse, 10.0, unit="% of the squared error", figures=figures)


@torch.no_grad()
def _shown(runs: dict):
    from matplotlib.figure import Figure

    images = runs["cut"].task.all().images[:6]
    torch.manual_seed(0)
    spoilt = images + 0.5 * torch.randn_like(images)
    rows = [images, spoilt, *(run.model(spoilt) for run in runs.values())]
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    for line, row in zip(figure.subplots(len(rows), 6), rows, strict=True):
        for axes, image in zip(line, row[:, 0], strict=True):
            axes.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
            axes.set_axis_off()
    return figure


def _random(model: nn.Module) -> nn.Module:
    model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model
