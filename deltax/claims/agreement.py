"""Whether a kernel is attention: the one check that every kernel's claim and test puts to it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deltax.parts.attention.scores import Rules, causal, everywhere, window
from deltax.recipe import part
from deltax.shapes import Heads, Scores

Kernel = Callable[..., Heads]


def every_rule(time: int, heads: int = 6) -> dict[str, Rules]:
    """What a kernel may be asked for, by name, over 2 examples of `time` positions."""
    torch.manual_seed(0)
    padded = (torch.arange(time) >= torch.tensor([[time - time // 5], [time]])).long()
    shuffled = torch.stack([torch.randperm(time), torch.randperm(time)])
    narrow, past = part(window, width=4), part(causal)
    return {
        "everywhere": Rules(mask=part(everywhere)),
        "causal": Rules(mask=past),
        "windowed": Rules(mask=narrow),
        "biased": Rules(slope, past),
        "padded": Rules(mask=past, q_segments=padded, k_segments=padded),
        "blind": Rules(q_segments=padded, k_segments=padded + 1),
        "shuffled": Rules(mask=past, q_at=shuffled, k_at=shuffled),
        "learned": Rules(Capped(heads), narrow),
    }


def agree(
    kernel: Kernel, reference: Kernel, rules: Rules, *, queries: int = 61, keys: int = 61, groups: int = 2
) -> None:
    """Output and all gradients of `kernel` are those of `reference`: 6 query heads on 2 key heads, float64, to 1e-12.

    Raises AssertionError where they differ.
    """
    torch.manual_seed(0)
    q = torch.randn(2, queries, 6, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, keys, groups, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn_like(q)
    found = []
    for each in (reference, kernel):
        out = each(q, k, v, rules)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v, *rules.learned.values()))])
    for theirs, ours in zip(*found, strict=True):
        assert ours.isfinite().all() and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def is_attention(kernel: Callable[..., Kernel], reference: Kernel, sizes: Iterable[int] = (1, 7, 31, 64)) -> None:
    """`agree` for kernel(size) at every size, under every rule, and where keys and queries differ in number.

    A size near 1 makes many tiles, so few positions are asked of it.
    """
    for size in sizes:
        time = 7 if size < 5 else 31
        for rules in every_rule(time).values():
            agree(kernel(size), reference, rules, queries=time, keys=time)
        agree(kernel(size), reference, Rules(), queries=13, keys=9, groups=6)


def slope(scores: Scores, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Scores:
    """A penalty on distance, steeper for each next head: ALiBi's form (arXiv:2108.12409)."""
    return scores - 2.0**-h * (q - k).abs()


class Capped(nn.Module):
    """A score that is neither additive nor fixed: cap_h tanh(score / cap_h) with learned caps."""

    def __init__(self, heads: int):
        super().__init__()
        self.cap = nn.Parameter(1 + torch.rand(heads, dtype=torch.float64))

    def forward(self, scores: Scores, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Scores:
        return self.cap[h] * torch.tanh(scores / self.cap[h])


def randomised(model: nn.Module) -> nn.Module:
    """A peer with every parameter and buffer of numbers drawn anew, variances above zero, its criterion as it was."""
    model.requires_grad_(True)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.startswith("criterion."):
            positive = name.endswith(("running_var", "normalization.weight"))
            tensor.copy_(0.5 + torch.rand_like(tensor) if positive else torch.randn_like(tensor) * 0.25)
    return model
