"""FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness.
Dao, Fu, Ermon, Rudra, Ré, 2022. arXiv:2205.14135

Memory-efficient attention, but its tiles fit in fast memory, a finished output is kept in the slow one, and the
backward pass is written out: it makes each tile of weights again from what was seen of its rows.

Attention waits for memory, not for arithmetic: its T x T matrix is written and read again for every step from scores to
output. Fold over tiles and the matrix never exists. Keys and values are the outer loop, each loaded once; the output of
a tile of queries goes to slow memory and back, divided, at every visit. Written as loops over tiles in Python this
shows that it is exact and how much it moves and keeps; the speed belongs to the fused kernels.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltax import Part, claim, paper, part
from deltax.papers.language.softmax_attention import attend, softmax_attention
from deltax.papers.systems import online_softmax
from deltax.papers.systems.memory_efficient_attention import (
    Tile,
    attend_tile,
    finish,
    kept_bytes,
    memory_efficient,
)
from deltax.papers.systems.online_softmax import relative
from deltax.parts.agreement import is_attention
from deltax.parts.scores import Rules, causal, everywhere, window
from deltax.parts.tiles import as_autocast, over_heads, spread, tile_scores, tiles, wide
from deltax.shapes import Heads, Keys, Queries, Scores, Values


def take_in(held: Tile, new: Tile) -> Tile:
    """What was held, its output divided, and what is new: scaled, added, divided again (Algorithm 1, line 12)."""
    seen = online_softmax.merge(held.seen, new.seen)
    total = seen.sum.masked_fill(seen.sum == 0, 1.0)
    share = lambda tile, sum_: over_heads(relative(tile.seen.max, seen.max) * sum_ / total)
    return Tile(seen, held.out * share(held, held.seen.sum) + new.out * share(new, 1.0))


def fold(q: Queries, k: Keys, v: Values, rules: Rules, done: MutableMapping, sizes: tuple[int, int]) -> None:
    """Every tile into `done`, one entry with a divided output for each tile of queries (Algorithm 1, lines 5 to 15).

    `sizes` are those of a tile, in queries and in keys. A tile in which no query may look is never loaded.
    """
    for columns in tiles(k.shape[1], sizes[1]):
        keys, values = k[:, columns], v[:, columns]
        for i, rows in enumerate(tiles(q.shape[1], sizes[0])):
            if rules.allowed(q, k, rows, columns).any():
                new = attend_tile(q[:, rows], keys, values, rules, rows, columns)
                done[i] = take_in(done[i], new) if i in done else Tile(new.seen, finish(new))


class Scheme(NamedTuple):
    """How a kernel goes over the tiles, and what of the rows it keeps to make their weights again.

    forward(q, k, v, rules, tile) -> the output (B, T, H, K), then statistics, each (B, H, T)
    weights(scores, *statistics) -> the softmax of scores (B, H, T, S), given those of its rows
    """

    forward: Callable[..., Sequence[Tensor]]
    weights: Callable[..., Tensor]


def recompute(q: Queries, k: Keys, v: Values, rules: Rules | None, tile: int, scheme: Scheme) -> Heads:
    """Attention by a scheme: its arguments, output and statistics are kept for the backward pass, and no weights."""
    rules = rules or Rules()
    q, k, v = as_autocast(q, k, v)
    return _Recompute.apply(q, k, v, rules, tile, scheme, *rules.learned.values())


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rules: Rules, tile: int, scheme: Scheme, *learned: Tensor
    ) -> Tensor:
        out, *statistics = scheme.forward(q, k, v, rules, tile)
        ctx.save_for_backward(q, k, v, out, *statistics)
        ctx.rules, ctx.tile, ctx.scheme = rules, tile, scheme
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *statistics = ctx.saved_tensors
        weights = lambda scores, rows: ctx.scheme.weights(scores, *(s[..., rows] for s in statistics))
        d_q, d_k, d_v, *learned = gradients(q, k, v, ctx.rules, ctx.tile, weights, d_out, reached(d_out, out))
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, *learned


def reached(d_out: Heads, out: Heads) -> Tensor:
    """rowsum(dO O), what the softmax takes from every gradient of its row. -> (B, H, T), in float32 at least."""
    return (d_out.to(wide(out)) * out).sum(-1).transpose(1, 2)


def gradients(
    q: Queries,
    k: Keys,
    v: Values,
    rules: Rules,
    tile: int,
    weights: Callable[[Scores, slice], Tensor],
    d_out: Heads,
    reached: Tensor,
) -> list[Tensor]:
    """Algorithm 4: P is made again, dV = P' dO, dS = P (dO V' - rowsum(dO O)); autograd takes dS on.

    weights(scores, rows) are those of some rows; the keys given need not be all that the rows have seen. Gives dQ, dK
    and dV in float32 at least, then the gradients of what the score has learned.
    """
    learned = list(rules.learned.values())
    d_q, d_k, d_v, *d_learned = (torch.zeros_like(t, dtype=wide(t)) for t in (q, k, v, *learned))
    for columns in tiles(k.shape[1], tile):
        values = spread(v[:, columns], q.shape[2])
        for rows in tiles(q.shape[1], tile):
            if not rules.allowed(q, k, rows, columns).any():
                continue
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (q[:, rows], k[:, columns])]
                scores = tile_scores(*leaves, rules, rows, columns)
            p = weights(scores.detach(), rows)
            d_p = torch.einsum("bthk,bshk->bhts", d_out[:, rows], values)
            d_values = torch.einsum("bhts,bthk->bshk", p.to(v.dtype), d_out[:, rows])
            d_v[:, columns] += d_values.unflatten(2, (v.shape[2], -1)).sum(3)
            found = torch.autograd.grad(
                scores,
                [*leaves, *learned],
                p * (d_p - reached[..., rows, None]),
                allow_unused=True,
                materialize_grads=True,
            )
            sums = (d_q[:, rows], d_k[:, columns], *d_learned)
            for sum_, new in zip(sums, found, strict=True):
                sum_ += new
    return [d_q, d_k, d_v, *d_learned]


def _folded(q: Queries, k: Keys, v: Values, rules: Rules, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    done: dict[int, Tile] = {}
    fold(q, k, v, rules, done, (tile, tile))
    out = torch.zeros_like(q)
    largest = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q))
    total = torch.zeros_like(largest)
    for i, rows in enumerate(tiles(q.shape[1], tile)):
        if i in done:
            out[:, rows], largest[..., rows], total[..., rows] = done[i].out, *done[i].seen
    return out, largest, total


def _weights(scores: Scores, largest: Tensor, total: Tensor) -> Tensor:
    return relative(scores, largest[..., None]) / total.masked_fill(total == 0, 1.0)[..., None]


def flash_attention(q: Queries, k: Keys, v: Values, rules: Rules | None = None, *, tile: int = 64) -> Heads:
    """`attend`, tile by tile: keeps for the backward pass its arguments, its output and two numbers a row of scores.

    Queries (B, T, H, K), keys and values (B, S, G, K) with G dividing H -> (B, T, H, K). Gradients reach q, k, v and
    the parameters of a score that is a module; second derivatives are left to `attend`. Raises UserError for a tile
    below 1.
    """
    return recompute(q, k, v, rules, tile, Scheme(_folded, _weights))


flash_attention.reference = attend  # the same function of its arguments: what FLOPs are counted on


@paper(on=(memory_efficient, softmax_attention), arxiv="2205.14135", year=2022)
def flash(recipe: Part, *, tile: int = 64) -> Part:
    tiles(0, tile)  # refuses a tile below 1 where it is written
    return recipe.fill("kernel", flash_attention, tile=tile)


@claim
def it_is_attention():
    """Whatever the tile and whoever sees whom, output and gradients are attention's, at any length (Theorem 1)."""
    is_attention(lambda tile: part(flash_attention, tile=tile), attend)


@claim
def tiles_nobody_looks_at_are_skipped():
    """Of n x n tiles the causal mask visits n (n + 1) / 2, and a window visits a band."""
    q = torch.randn(1, 64, 1, 2)
    for mask, visited in ((causal, 36), (everywhere, 64), (part(window, width=8), 15)):
        visits = _Transfers()
        fold(*(visits.slow(t) for t in (q, q, q)), Rules(mask=mask), visits, (8, 8))
        assert visits.tiles == visited


@claim
def what_is_kept_for_the_backward_pass_grows_with_length():
    """Twice the length keeps twice the bytes for the backward pass; attention keeps four times as many."""

    def kept(kernel: Any, time: int) -> int:
        q, k, v = (torch.randn(1, time, 1, 4, requires_grad=True) for _ in range(3))
        return kept_bytes(lambda: kernel(q, k, v, Rules(mask=part(causal))))

    assert kept(part(flash_attention, tile=512), 2048) == 2 * kept(part(flash_attention, tile=512), 1024)
    assert 3.9 < kept(attend, 2048) / kept(attend, 1024) <= 4


@claim
def fewer_numbers_move():
    """At T = 1024, K = 64 and a fast memory of 32,768, a quarter of attention's numbers move if causal, else 1 in 2.4.

    Attention moves 4 T^2 + 4 T K (Algorithm 0). Of what the tiles move, all but the one pass over keys, values and
    output falls as 1/M (Theorem 2). The row statistics are counted as moved, but not as part of M.
    """
    time, width = 1024, 64
    attention = 4 * time**2 + 4 * time * width
    assert attention > 4 * _moved(time, width, 32_768, causal)
    assert attention > 2.4 * _moved(time, width, 32_768, everywhere)
    once = time * (width - 2)  # keys and values, less the output and two numbers a row that a first visit need not read
    passes = [_moved(time, width, fast, everywhere) - once for fast in (32_768, 65_536, 131_072)]
    assert passes[0] == 2 * passes[1] == 4 * passes[2]


@claim.parity(peer="torch.nn.functional.scaled_dot_product_attention (the flash kernel for CPUs)")
def equals_torch():
    """Output and gradients equal those of torch's fused flash kernel, causal and not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    for mask in (causal, everywhere):
        q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 61, 4, 16, dtype=torch.float64))
        weight = torch.randn_like(q)
        ours = flash_attention(q, k, v, Rules(mask=part(mask)), tile=16)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            theirs = nn.functional.scaled_dot_product_attention(*heads_first, is_causal=mask is causal).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@claim.measured(paper="the same perplexity, 18.2, 3.5 times sooner (GPT-2 small, Table 2)")
def it_learns_the_same(lab):
    """Tuned alike, gpt and gpt + flash-attention end within 2 % of each other's compute."""
    return lab.compare("gpt", "gpt+flash-attention").equivalent


@claim.measured(paper="up to 20 times less memory than exact attention, linear in length (section 4.3, Figure 3)")
def memory_grows_with_length(lab):
    """The exponent by which peak memory grows, to 32,768 positions, is at least 0.5 lower than attention's to 8192."""
    import numpy as np
    from matplotlib.figure import Figure

    times = {"attend": (1024, 2048, 4096, 8192), "flash_attention": (2048, 8192, 32_768)}
    peak = lambda name, time: lab.peak_memory(_forward_and_backward, name, time, warm=(name, 64))
    peaks = {name: np.array([[peak(name, time) for time in at] for _ in range(2)]) for name, at in times.items()}
    exponent = lambda name, run: float(np.polyfit(np.log(times[name]), np.log(run), 1)[0])
    exponents = {name: [exponent(name, run) for run in runs] for name, runs in peaks.items()}
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, runs in peaks.items():
        axes.loglog(times[name], runs.mean(0) / 2**20, marker="o", label=name.replace("_", " "))
    axes.set(xlabel="positions", ylabel="peak memory, MiB")
    axes.legend(frameon=False)
    gaps = [a - b for a, b in zip(*exponents.values(), strict=True)]
    numbers = {
        "exponents": exponents,
        "positions": times,
        "bytes": {name: runs.tolist() for name, runs in peaks.items()},
    }
    caption = "Memory of one forward and backward pass (1 example, 1 head of 64, causal), above the process's own"
    drawn = {caption: lab.figure(figure)}
    return lab.at_least(gaps, 0.5, unit="in the exponent", numbers=numbers, figures=drawn)


def _forward_and_backward(kernel: str, time: int) -> None:
    q, k, v = (torch.randn(1, time, 1, 64, requires_grad=True) for _ in range(3))
    kernels = {"attend": attend, "flash_attention": part(flash_attention, tile=512)}
    kernels[kernel](q, k, v, Rules(mask=part(causal))).sum().backward()


class _Transfers(dict):
    """A slow memory that counts: it holds the tiles of `fold`, and hands out slices of tensors, number by number."""

    def __init__(self) -> None:
        self.moved, self.tiles = 0, 0

    def slow(self, x: Tensor) -> Tensor:
        x = x.as_subclass(_Slow)
        x.memory = self
        return x

    def __getitem__(self, i: int) -> Tile:
        return self._count(super().__getitem__(i))

    def __setitem__(self, i: int, tile: Tile) -> None:
        self.tiles += 1
        super().__setitem__(i, self._count(tile))

    def _count(self, tile: Tile) -> Tile:
        self.moved += tile.out.numel() + tile.seen.max.numel() + tile.seen.sum.numel()
        return tile


class _Slow(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # what is handed out is a plain tensor
    memory: _Transfers

    def __getitem__(self, place: Sequence[slice]) -> Tensor:
        piece = super().__getitem__(place)
        self.memory.moved += piece.numel()
        return piece


def _moved(time: int, width: int, fast: int, mask: Any) -> int:
    """The numbers that `fold` moves with the paper's tile sizes (Algorithm 1, line 1) to give attention."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, time, 1, width, dtype=torch.float64)
    columns = -(-fast // (4 * width))
    rows = min(columns, width)
    resident = 2 * columns * width + 2 * rows * width + rows * columns  # keys and values, queries and output, scores
    assert resident <= fast
    memory, rules = _Transfers(), Rules(mask=part(mask))
    fold(memory.slow(q), memory.slow(k), memory.slow(v), rules, memory, (rows, columns))
    out = torch.cat([tile.out for _, tile in sorted(memory.items())], 1)
    torch.testing.assert_close(out, attend(q, k, v, rules), rtol=1e-12, atol=1e-12)
    return memory.moved
