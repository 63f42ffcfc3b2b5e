"""A decoder's memory in pages: many requests of unlike lengths in one pool, nothing moved when one of them grows."""

import math

import torch
from torch import Tensor, nn

from deltax.errors import UserError
from deltax.parts.attention.context import DecodingState


class Pages:
    """What requests keep, keys (S, G, K) and values (S, G, W) say, in `count` pages of `size` positions.

    tables   the pages of each request, in order
    lengths  how many positions each request has written

    A request forked off another shares its pages until one of them writes on the last, and that one gets a copy. Raises
    UserError where no page is left, for a request that there is not, and for tensors that want a gradient.
    """

    def __init__(self, count: int, size: int):
        if min(count, size) < 1:
            raise UserError(f"a cache has at least 1 page of at least 1 position, not {count} of {size}")
        self.size = size
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self._held = [0] * count  # by how many requests
        self._free = list(reversed(range(count)))
        self._stores: tuple[Tensor, ...] = ()

    def append(self, request: int, *new: Tensor) -> None:
        """Write the next positions of a request, known or new, each tensor (S, ...)."""
        if any(x.requires_grad for x in new):
            raise UserError("a paged cache keeps no gradients: decode under torch.no_grad()")
        table, start = self.tables.get(request, []), self.lengths.get(request, 0)
        stop = start + len(new[0])
        copied = bool(start % self.size and stop > start and self._held[table[-1]] > 1)
        needed = math.ceil(stop / self.size) - len(table) + copied
        if needed > len(self._free):
            raise UserError(
                f"request {request} needs {needed} more pages and {len(self._free)} of {len(self._held)} are free: "
                "close a request, or give the cache more pages"
            )
        self._stores = self._stores or tuple(x.new_empty(len(self._held), self.size, *x.shape[1:]) for x in new)
        fresh = [self._free.pop() for _ in range(needed)]
        for page in fresh:
            self._held[page] = 1
        if copied:
            self._held[table[-1]] -= 1
            for store in self._stores:
                store[fresh[0]] = store[table[-1]]
            table = table[:-1]
        self.tables[request], self.lengths[request] = [*table, *fresh], stop
        at = torch.arange(start, stop)
        page = torch.tensor(self.tables[request], dtype=torch.int64)[at // self.size]
        for store, x in zip(self._stores, new, strict=True):
            store[page.to(x.device), at.to(x.device) % self.size] = x

    def read(self, request: int, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Positions `start` to `stop` of a request, all that it has by default, side by side: each tensor (S, ...)."""
        stop = self.length(request) if stop is None else stop
        first, last = start // self.size, math.ceil(stop / self.size)
        within = slice(start - first * self.size, stop - first * self.size)
        return [store[self.tables[request][first:last]].flatten(0, 1)[within] for store in self._stores]

    def fork(self, request: int, new: int) -> None:
        """A new request that has seen what `request` has."""
        if new in self.tables:
            raise UserError(f"there is a request {new} already: give the new one another number, or close that one")
        self.lengths[new] = self.length(request)
        self.tables[new] = list(self.tables[request])
        for page in self.tables[new]:
            self._held[page] += 1

    def close(self, request: int) -> None:
        """Forget a request; pages that nobody else has are free again."""
        del self.lengths[self._known(request)]
        for page in self.tables.pop(request):
            self._held[page] -= 1
            if not self._held[page]:
                self._free.append(page)

    def length(self, request: int) -> int:
        return self.lengths[self._known(request)]

    @property
    def taken(self) -> int:
        """How many pages are in use."""
        return len(self._held) - len(self._free)

    def bytes(self) -> int:
        """The size of all pages, free ones too."""
        return sum(store.numel() * store.element_size() for store in self._stores)

    def _known(self, request: int) -> int:
        if request not in self.lengths:
            raise UserError(f"there is no request {request}: the cache has {sorted(self.lengths)}")
        return request


class PagedState(DecodingState):
    """A decoding state whose mixers keep what has a batch, then time, in `count` pages each: every example a request.

    Raises UserError once the pages of a mixer are full.
    """

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self._new = lambda: Pages(count, size)
        self._pages: dict[nn.Module, Pages] = {}

    def append(self, module: nn.Module, new: tuple[Tensor, ...], axes: tuple[int, ...]) -> tuple[Tensor, ...]:
        pages = self._pages[module] = self._pages.get(module) or self._new()
        for example, rows in enumerate(zip(*(x for x, axis in zip(new, axes) if axis == 1), strict=True)):
            pages.append(example, *rows)
        paged = (torch.stack(rows) for rows in zip(*map(pages.read, pages.tables), strict=True))
        others = iter(
            super().append(module, *zip(*((x, axis) for x, axis in zip(new, axes) if axis != 1), strict=True))
        )
        return tuple(next(paged if axis == 1 else others) for axis in axes)

    def bytes(self) -> int:
        return super().bytes() + sum(pages.bytes() for pages in self._pages.values())
