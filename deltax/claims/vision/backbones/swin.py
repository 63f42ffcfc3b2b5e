"""Claims of swin: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from torch import nn

from deltax import claim, part
from deltax.claims.checking import assert_equal, gradients, randomise, same_gradients
from deltax.paper import paper_of
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.vision.backbones.swin import RelativeBias, Windows, swin
from deltax.papers.vision.backbones.vit import vit
from deltax.parts.attention.context import Context
from deltax.shapes import Stream
from deltax.tasks.images.borders import Borders
from deltax.weights.vision.backbones.swin import from_hf


@claim
def a_masked_cyclic_shift_is_windows_cut_at_the_border():
    """Rolling, masking and rolling back gives, with its gradients, what attention gives in each window of the shifted
    partition alone, those at the border cut by it."""
    torch.manual_seed(0)
    rows, columns, window, shift = 6, 9, 3, 1
    tree = part(Windows, inner=part(Attention, heads=2, score=part(RelativeBias, window=window)))
    mixer = randomise(part(tree, window=window, shift=shift)(8))
    x = torch.randn(2, rows * columns, 8, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    bounds = lambda n: [0, *range(shift, n, window), n]
    strips = []
    for top, bottom in zip(bounds(rows), bounds(rows)[1:]):
        pieces = []
        for left, right in zip(bounds(columns), bounds(columns)[1:]):
            piece = other.unflatten(1, (rows, columns))[:, top:bottom, left:right]
            at = torch.arange(bottom - top)[:, None] * window + torch.arange(right - left)
            seen = mixer.inner(piece.flatten(1, 2), Context(positions=at.flatten()))
            pieces.append(seen.unflatten(1, (bottom - top, right - left)))
        strips.append(torch.cat(pieces, 2))
    same_gradients(mixer(x, Context(grid=(rows, columns))), torch.cat(strips, 1).flatten(1, 2))
    torch.testing.assert_close(x.grad, other.grad)


@claim
def a_window_as_large_as_the_image_is_attention():
    """Where one window holds the whole grid, and biases are zero, Windows is the attention inside it, shifted or not,
    to the bit."""
    torch.manual_seed(0)
    inner = part(Attention, heads=2, score=part(RelativeBias, window=5))
    for shift in (0, 2):
        mixer = part(Windows, inner=inner, window=5, shift=shift)(8).double()
        nn.init.zeros_(mixer.inner.score.table)
        plain = Attention(8, heads=2).double()
        plain.load_state_dict({k: v for k, v in mixer.inner.state_dict().items() if not k.startswith("score.")})
        x = torch.randn(2, 15, 8, dtype=torch.float64)
        assert torch.equal(mixer(x[:, :9], Context(grid=(3, 3))), plain(x[:, :9], Context()))
        torch.testing.assert_close(mixer(x, Context(grid=(5, 3))), _in_threes(plain, x))


@claim
def shifting_connects_windows():
    """One block sees its own window only; a second, shifted, sees into the windows around it, and without the shift
    does not."""
    for shift, connected in ((2, True), (0, False)):
        recipe = paper_of(vit)(dim=8, heads=2, patch=1) + swin(window=4, depths=(2,))
        trunk = randomise(recipe.set(Windows, shift=0)["model.trunk"](1, 12))
        trunk.stack.stages[0].blocks[1].mixer.shift = shift
        images = torch.randn(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
        seen = torch.autograd.grad(trunk(images)[0, 5 * 12 + 5].sum(), images)[0][0, 0].abs() > 0
        own = torch.zeros(12, 12, dtype=torch.bool)
        own[4:8, 4:8] = True
        assert (seen & own).any() and (seen & ~own).any() == connected


@claim
def cost_is_linear_in_the_number_of_windows():
    """Four times as many patches cost four times the FLOPs in windows, shifted or not, and sixteen times the FLOPs of
    scores in attention everywhere."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(mixer: nn.Module, side: int) -> int:
        with FlopCounterMode(display=False) as counter:
            mixer(torch.randn(1, side**2, 8), Context(grid=(side, side)))
        return counter.get_total_flops()

    attention = Attention(8, heads=2)
    for shift in (0, 2):
        windows = Windows(8, inner=part(Attention, heads=2), window=4, shift=shift)
        assert flops(windows, 16) == 4 * flops(windows, 8)
    scores = lambda side: flops(attention, side) - side**2 * 4 * 2 * 8 * 8
    assert scores(16) == 16 * scores(8)


@claim.parity(peer="transformers SwinModel")
def equals_transformers():
    """The same random weights give transformers' stream and gradients where grids fill neither their windows nor the
    merging, where one window holds a whole stage, and on images that are not square."""
    from transformers import SwinConfig, SwinModel

    for size, window in (((18, 18), 4), ((12, 12), 3), ((14, 22), 4)):
        config = SwinConfig(
            image_size=size, patch_size=2, num_channels=2, embed_dim=6, depths=[2, 2], num_heads=[1, 2],
            window_size=window, drop_path_rate=0.0,
        )  # fmt: skip
        theirs = randomise(SwinModel(config, add_pooling_layer=False))
        recipe = paper_of(vit)(dim=12, heads=2) + swin(window=window)
        ours = recipe.set(LayerNorm, eps=1e-5)["model.trunk"](2, size).double()
        ours.load_state_dict(from_hf(theirs.state_dict()))
        images = torch.randn(2, 2, *size, dtype=torch.float64)
        same_gradients(ours(images), theirs(images).last_hidden_state)
        assert_equal(gradients(ours), from_hf(gradients(theirs)))


@claim.measured(paper="Swin-T 80.2 without shifting, 81.3 with it, ImageNet top-1 (Table 4)")
def windows_that_never_meet_cannot_compare(lab):
    """Asked whether two marks on either side of a window's border are alike, two blocks in windows that shift are right
    in at least 95 % of cases; without the shift, nothing merged, their loss stays within 0.02 nats of a guess's.

    The fact sheet asks that those without be at chance. This is asked of their loss and not of their accuracy, as the
    sign of a guess may be right three times in four by luck; the bound of 0.02 nats is ours, and what was tried before
    it is not recorded.
    """
    shifted = (paper_of(vit)(patch=1, dim=32, heads=2) + swin(window=4, depths=(2,))).put("task", part(Borders))
    seeds, numbers = lab.seeds(3), {}
    for name, recipe in {"shifted": shifted, "not shifted": shifted.set(Windows, shift=0)}.items():
        runs = [lab.train(recipe, seed=seed, steps=300) for seed in seeds]
        numbers[f"{name}: accuracy"] = [run.evaluation.metrics["accuracy"] for run in runs]
        numbers[f"{name}: nats below a guess"] = [math.log(2) - run.score for run in runs]
    apart = lab.at_most(numbers["not shifted: nats below a guess"], 0.02, unit="nats below a guess", numbers=numbers)
    found = lab.at_least(numbers["shifted: accuracy"], 0.95, unit="accuracy", numbers=numbers)
    return found if apart.outcome == "supported at this scale" else apart


def _in_threes(attention: Attention, x: Stream) -> Stream:
    """Attention in the windows of 3 x 3 of a grid of 5 x 3, the last filled up with a row of zeros."""
    maps = nn.functional.pad(x.unflatten(1, (5, 3)), (0, 0, 0, 0, 0, 1))
    halves = [attention(half.flatten(1, 2), Context()) for half in maps.split(3, 1)]
    return torch.cat(halves, 1)[:, :15]
