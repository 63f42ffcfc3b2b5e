"""Depth: residual branches, blocks of two branches, stacks of blocks."""

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from deltax.parts.attention.context import Context, takes_context
from deltax.parts.model.identity import Identity
from deltax.parts.model.linear import depth_scaled_init
from deltax.recipe import Part, part
from deltax.shapes import OtherStream, Stream


class PreNorm(nn.Module):
    """x + branch(norm(x)). Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, *, norm: Part):
        super().__init__()
        self.norm = norm(dim)

    def forward(self, x: Stream, branch: Callable[[Stream], Stream]) -> Stream:
        return x + branch(self.norm(x))


class PostNorm(nn.Module):
    """norm(x + branch(x)). Stream (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, *, norm: Part):
        super().__init__()
        self.norm = norm(dim)

    def forward(self, x: Stream, branch: Callable[[Stream], Stream]) -> Stream:
        return self.norm(x + branch(x))


def sequential_branches(block: "Block", x: Stream, ctx: Context) -> Stream:
    """One branch after the other, each for the whole stream."""
    x = block.mixer_residual(x, lambda x: block.mixer(x, ctx))
    return block.mlp_branch(x, ctx)


class Block(nn.Module):
    """One branch that mixes positions and one that does not, each joined to the stream by a `residual`."""

    def __init__(self, dim: int, *, mixer: Part, mlp: Part, residual: Part, branches: Part = part(sequential_branches)):
        super().__init__()
        self.mixer_residual = residual(dim)
        self.mixer = mixer(dim)
        self.mlp_residual = residual(dim)
        self.mlp = mlp(dim)
        self.branches = branches
        self._mlp_takes_context = takes_context(self.mlp)

    def mlp_branch(self, x: Stream, ctx: Context) -> Stream:
        """The second branch, joined to the stream."""
        return self.mlp_residual(x, (lambda x: self.mlp(x, ctx)) if self._mlp_takes_context else self.mlp)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return self.branches(self, x, ctx)


def sequential(blocks: Iterable[nn.Module], x: Stream, ctx: Context) -> Stream:
    """Through all blocks, one after the other."""
    for block in blocks:
        x = block(x, ctx)
    return x


class Stack(nn.Module):
    """`depth` blocks, one after the other; `entry` is what the stream passes before the first.

    `width` is that of the stream that leaves.
    """

    can_be_zero = ("depth",)

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 4,
        block: Callable[[int], nn.Module],
        entry: Part = part(Identity),
        passage: Part = part(sequential),
    ):
        super().__init__()
        self.width = dim
        self.passage = passage
        self.entry = entry(dim)
        self.blocks = nn.ModuleList(block(dim) for _ in range(depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        depth_scaled_init(self, len(self.blocks))

    def each(self, x: Stream, ctx: Context) -> Iterator[Stream]:
        """The stream after every block."""
        x = self.entry(x)
        for block in self.blocks:
            x = block(x, ctx)
            yield x

    def forward(self, x: Stream, ctx: Context) -> Stream:
        return self.passage(self.blocks, self.entry(x), ctx)


class Alternating(Stack):
    """A `Stack` whose blocks take turns: `depth` blocks, of each kind in `blocks` one after the other."""

    def __init__(self, dim: int, *, depth: int = 4, blocks: tuple[Part, ...], entry: Part = part(Identity)):
        turns = iter(range(depth))
        super().__init__(dim, depth=depth, block=lambda dim: blocks[next(turns) % len(blocks)](dim), entry=entry)


class Stages(nn.Module):
    """One stack after the other, twice as wide each time; between them a `merge` makes the stream shorter and wider.

    Stream (B, T, D) -> (B, T', .width). entry is what the stream passes first.
    """

    def __init__(self, dim: int, *, stages: tuple[Part, ...], merges: tuple[Part, ...], entry: Part = part(Identity)):
        super().__init__()
        self.width = dim * 2 ** len(merges)
        self.entry = entry(dim)
        self.stages = nn.ModuleList(stage(dim * 2**i) for i, stage in enumerate(stages))
        self.merges = nn.ModuleList(merge(dim * 2**i) for i, merge in enumerate(merges))

    def each(self, x: Stream, ctx: Context) -> Iterator[OtherStream]:
        """The stream after every stage."""
        x = self.stages[0](self.entry(x), ctx)
        yield x
        for merge, stage in zip(self.merges, self.stages[1:], strict=True):
            x, ctx = merge(x, ctx)
            x = stage(x, ctx)
            yield x

    def forward(self, x: Stream, ctx: Context) -> OtherStream:
        for after in self.each(x, ctx):
            x = after
        return x
