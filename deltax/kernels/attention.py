"""Attention through torch's fused kernels."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from deltax.kernels.short_attention import suits, weights_kept
from deltax.kernels.twins import twin
from deltax.papers.language.attention.softmax_attention import attend
from deltax.parts.attention.scores import Rules
from deltax.shapes import Heads, Keys, Queries, Values


@twin(
    "papers.softmax_attention:attend",
    why="torch's fused kernel, kept weights where few look back, attend itself where a score is no bias",
)
def sdpa(q: Queries, k: Keys, v: Values, rules: Rules | None = None) -> Heads:
    """`attend` by torch's scaled_dot_product_attention, or `attend` itself where a score is not a bias.

    Few positions that look back are trained sooner on a CPU with their weights kept: see `weights_kept`.
    """
    rules = rules or Rules()
    if not rules.is_additive:
        return attend(q, k, v, rules)
    if suits(q, k, v, rules):
        return weights_kept(q, k, v)
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    if rules.is_plain and rules.is_causal and q.shape[1] == k.shape[1]:
        out = scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=grouped)
    elif rules.is_plain and rules.is_everywhere:
        out = scaled_dot_product_attention(q_, k_, v_, enable_gqa=grouped)
    else:
        b, t, h, s = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
        bias = rules(q.new_zeros(()).expand(b if rules.is_per_example else 1, h, t, s))
        if t == s and rules.sees_itself:
            return scaled_dot_product_attention(q_, k_, v_, attn_mask=bias, enable_gqa=grouped).transpose(1, 2)
        fully_masked = bias.isneginf().all(-1, keepdim=True)
        out = scaled_dot_product_attention(
            q_, k_, v_, attn_mask=bias.masked_fill(fully_masked, 0.0), enable_gqa=grouped
        )
        out = torch.where(fully_masked, 0.0, out)
    return out.transpose(1, 2)
