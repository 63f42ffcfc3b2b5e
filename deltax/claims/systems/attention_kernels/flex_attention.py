"""Claims of flex-attention: the paper's equations, parity with peers, and what it measures."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltax import claim, part
from deltax.claims.agreement import is_attention
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.position.alibi import Distance
from deltax.papers.systems.attention_kernels.flex_attention import (
    BlockMask,
    _forward,
    block_mask,
    both,
    documents,
    either,
    flex_attention,
    paged,
    prefix,
    soft_cap,
)
from deltax.parts.attention.scores import Rules, causal, window


@claim
def it_is_attention():
    """For every rule, tile and length, output and gradients equal attention's."""
    is_attention(lambda tile: part(flex_attention, tile=tile), attend)


@claim
def every_composition_of_masks_and_scores_is_exact():
    """For causal, window, prefix and document masks, and any two joined by and / or, output and gradients equal
    attention's to 1e-12.
    """
    singles = masks()
    pairs = [part(join, masks=(a, b)) for join in (both, either) for a in singles for b in singles if a is not b]
    scores = (Rules().score, part(soft_cap, cap=2.0), Distance(4))
    for n, mask in enumerate([*singles, *pairs]):
        rules = Rules(scores[n % 3], mask)
        q, k, v = drawn()
        weight = torch.randn_like(q)
        outs = [kernel(q, k, v, rules) for kernel in (attend, part(flex_attention, tile=16))]
        found = [[out, *torch.autograd.grad((out * weight).sum(), (q, k, v))] for out in outs]
        for wanted, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@claim
def the_blocks_skipped_are_those_nobody_looks_into():
    """On 64 positions in 8 x 8 tiles, full and partial tiles are those of the dense mask.
    Causal visits 36 of 64 tiles, 8 of them partial; a window of two tiles visits 21.
    """
    q = torch.empty(1, 64, 1, 1)
    counted = block_mask(q, q, Rules(mask=part(causal)), 8)
    assert counted.visited() == 36 and sum(map(len, counted.partial)) == 8
    assert block_mask(q, q, Rules(mask=part(window, width=16)), 8).visited() == 8 + 7 + 6
    for mask in masks():
        rules = Rules(mask=mask)
        dense = rules.allowed(q, q).expand(1, 1, 64, 64)[0, 0].unfold(0, 8, 8).unfold(1, 8, 8)
        found = block_mask(q, q, rules, 8)
        held = dense.sum((2, 3))
        for i in range(8):
            assert found.full[i] == tuple((held[i] == 64).nonzero()[:, 0].tolist())
            assert found.partial[i] == tuple(((held[i] > 0) & (held[i] < 64)).nonzero()[:, 0].tolist())


@claim
def what_is_not_visited_changes_no_bit():
    """NaN in the keys and values of skipped tiles changes no bit; nor does evaluating the mask in full tiles."""
    q, k, v = (x.detach() for x in drawn())
    rules = Rules(mask=part(window, width=20))
    rows = slice(48, 61)  # sees 29 to 60: tiles 1, 2 and 3 of 16
    expected = flex_attention(q, k, v, rules, tile=16)
    k[:, :16], v[:, :16] = torch.nan, torch.nan
    assert torch.equal(flex_attention(q, k, v, rules, tile=16)[:, rows], expected[:, rows])
    assert expected.isfinite().all()
    q, k, v = (x.detach() for x in drawn())
    rules = Rules(mask=part(causal))
    blocks = block_mask(q, k, rules, 16)
    asked = BlockMask(tuple(map(tuple.__add__, blocks.full, blocks.partial)), ((),) * 4)
    given = [_forward(q, k, v, rules, 16, each)[0] for each in (blocks, asked)]
    assert torch.equal(*given)


@claim
def pages_are_one_more_mask():
    """With keys and values in scattered pages, output and gradients equal attention's to 1e-12, for every mask and
    score. A request visits only its own pages, and NaN in other pages changes no bit.
    """
    size, count, tables, length = 8, 20, ((7, 2, 19, 4, 0, 11, 9, 13), (5, 3, 18, 1, 14, 6, 10, 17)), 61
    at = torch.arange(length)
    for n, mask in enumerate(masks()):
        rules = Rules((Rules().score, part(soft_cap, cap=2.0), Distance(4))[n % 3], mask)
        q, k, v = drawn()
        weight, wanted = torch.randn_like(q), attend(q, k, v, rules)
        expected = [wanted, *torch.autograd.grad((wanted * weight).sum(), (q, k, v))]
        for i, table in enumerate(tables):
            slots = torch.tensor(table)[at // size] * size + at % size
            stores = [torch.randn(1, count * size, 2, 5, dtype=torch.float64) for _ in range(2)]
            inside = [s.index_copy(1, slots, x[i : i + 1]) for s, x in zip(stores, (k, v))]
            mapped = paged(rules, [table], [length], size, count)
            out = flex_attention(q[i : i + 1], *inside, mapped, tile=size)
            found = [out, *torch.autograd.grad((out * weight[i : i + 1]).sum(), (q, k, v))]
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[-1 if len(ours) == 1 else i], theirs[i], rtol=1e-12, atol=1e-12)
            last = replace(mapped, q_at=torch.tensor([length - 1]))
            for_last, look = q[i : i + 1, -1:], [s.detach() for s in inside]
            seen = block_mask(
                for_last, look[0], replace(last, mask=paged(Rules(), [table], [length], size, count).mask), size
            )
            assert sorted(seen.partial[0] + seen.full[0]) == sorted(table)
            free = [s.clone() for s in look]
            for s in free:
                s.unflatten(1, (count, size))[:, [p for p in range(count) if p not in table]] = torch.nan
            assert torch.equal(*(flex_attention(for_last, *kv, last, tile=size) for kv in (look, free)))


@claim.parity(peer="torch.nn.attention.flex_attention")
def equals_torch():
    """Output equals torch's flex_attention to 1e-12, and the block mask lists the same blocks, for every mask, with and
    without a soft cap.

    Torch has no backward pass on a CPU; gradients are compared with attention above.
    """
    from unittest.mock import patch

    from torch.nn.attention import flex_attention as peer
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as theirs

    capped = part(soft_cap, cap=2.0)
    for mask in masks():
        mask_mod = lambda b, h, i, j, mask=mask: mask(b, h, i, j)  # torch counts arguments without a default
        for score, score_mod in ((Rules().score, None), (capped, lambda s, b, h, i, j: capped(s, b, h, i, j))):
            q, k, v = (x.detach() for x in drawn())
            rules = Rules(score, mask)
            blocks = create_block_mask(mask_mod, None, None, 61, 61, device="cpu", BLOCK_SIZE=16)
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            with patch.object(peer, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):  # eager, not traced
                wanted = theirs(*heads_first, score_mod=score_mod, block_mask=blocks, enable_gqa=True).transpose(1, 2)
            out = flex_attention(q, k, v, rules, tile=16)
            torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        full = create_block_mask(mask_mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
        x = torch.empty(1, 64, 1, 1)
        found = block_mask(x, x, rules, 16)
        assert _listed(full.kv_num_blocks, full.kv_indices) == found.partial
        assert _listed(full.full_kv_num_blocks, full.full_kv_indices) == found.full


@claim.measured(paper="5.49 to 8 times SDPA's speed for variants that no fused kernel has (section 6)")
def skipped_tiles_save_time(lab):
    """At 4096 positions with a window of 256, block-sparse attention is at least 2 times as fast as dense masked
    attention.
    """
    rules = Rules(mask=part(window, width=256))
    q, k, v = torch.randn(3, 1, 4096, 1, 64, generator=torch.Generator().manual_seed(0))
    blocks = block_mask(q, k, rules, 128)
    walk, dense = lambda: _forward(q, k, v, rules, 128, blocks), lambda: attend(q, k, v, rules)
    found = [lab.ratio(walk, dense, repeats=3).value for _ in range(5)]
    return lab.at_least(found, 2.0, unit="times as fast", numbers={"tiles": f"{blocks.visited()} of {32 * 32}"})


def masks() -> list[Any]:
    """One mask of each kind; the sizes are no multiples of a tile."""
    return [
        part(causal),
        part(window, width=9),
        part(prefix, length=21),
        part(documents, lengths=(5, 29, 30)),
    ]


def drawn() -> list[Tensor]:
    """61 positions, four query heads on two key heads, of width 5, in float64."""
    torch.manual_seed(0)
    return [torch.randn(2, 61, heads, 5, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def _listed(counts: Tensor, blocks: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(row[:n].tolist())) for n, row in zip(counts[0, 0], blocks[0, 0], strict=True))
