"""Query, key and value by one product."""

import torch
from torch import nn
from torch.nn.functional import linear

from deltax.papers.language.softmax_attention import Projections
from deltax.shapes import Keys, Memory, Queries, Stream, Values


class SideBySide(Projections):
    """`Projections`, with the same parameters, that multiply one x by all three matrices at once where they can.

    They can where the three are plain linear maps of the same x: a part that wraps or replaces one, a hook on one and
    a memory apart from x all go the way of `Projections`.
    """

    def split(
        self, x: Stream, memory: Memory | None = None, values: Memory | None = None
    ) -> tuple[Queries, Keys, Values]:
        maps = (self.query, self.key, self.value)
        apart = any(other is not None and other is not x for other in (memory, values))
        if apart or not all(map(is_linear, maps)) or len({m.bias is None for m in maps}) > 1:
            return super().split(x, memory, values)
        weight = torch.cat([m.weight for m in maps])
        bias = None if maps[0].bias is None else torch.cat([m.bias for m in maps])
        q, k, v = linear(x, weight, bias).split([m.out_features for m in maps], -1)
        heads = lambda y: y.unflatten(-1, (self.heads, -1))
        return heads(q), heads(k), heads(v)


def is_linear(map: nn.Module) -> bool:
    """Whether the map is a plain product that nothing listens to, so another product may do its work."""
    return type(map).forward is nn.Linear.forward and not (map._forward_hooks or map._forward_pre_hooks)
