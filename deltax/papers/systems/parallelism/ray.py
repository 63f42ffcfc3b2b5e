"""Ray: A Distributed Framework for Emerging AI Applications.
Moritz, Nishihara, Wang, Tumanov, Liaw, Liang, Elibol, Yang, Paul, Jordan, Stoica, 2017. arXiv:1712.05889

One graph of tasks that grows as it runs, but some of its tasks share state, and what is lost is computed again.

A call returns a future at once; a call on a future is an edge. The graph of who made what is kept, so an object that a
dead node held is made again from what made it, and only that. A class whose calls are a chain of edges is an actor, and
comes back by replaying the chain from its last checkpoint. `dx compare --engine ray` sends runs to Ray itself; the
lab's tests ask that its figures are the local engine's and that a killed worker loses nothing. Here is the graph.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from deltax import paper


@dataclass(frozen=True)
class Ref:
    """A future: the object that a task will have made."""

    id: int


@dataclass
class Task:
    """What made an object: a function and its arguments, futures among them; for an actor's call, the call before."""

    function: Callable[..., Any]
    given: tuple[Any, ...]
    before: Ref | None = None


@dataclass
class Graph:
    """The control store, the lineage of all objects, and the object store, which may lose any of them.

    `runs` counts how often each task ran; `saved` are the actors' checkpoints, which are not lost.
    """

    lineage: dict[Ref, Task] = field(default_factory=dict)
    objects: dict[Ref, Any] = field(default_factory=dict)
    saved: dict[Ref, Any] = field(default_factory=dict)
    runs: dict[Ref, int] = field(default_factory=dict)

    def remote(self, function: Callable[..., Any], *given: Any) -> Ref:
        """Call a function later; its arguments may be futures."""
        return self._add(Task(function, given))

    def actor(self, make: Callable[..., Any], *given: Any) -> "Actor":
        """An object with state, whose calls happen one after the other."""
        return Actor(self, self._add(Task(lambda *g: (make(*g), None), given)))

    def get(self, ref: Ref) -> Any:
        """The object, made now, and whatever it needs with it, if it is nowhere."""
        if ref not in self.objects:
            task = self.lineage[ref]
            given = [self.get(g) if isinstance(g, Ref) else g for g in task.given]
            if task.before is not None:
                state = self.saved[task.before] if task.before in self.saved else self.get(task.before)[0]
                given.insert(0, deepcopy(state))
            self.runs[ref] = self.runs.get(ref, 0) + 1
            self.objects[ref] = task.function(*given)
        return self.objects[ref]

    def lose(self, *refs: Ref) -> None:
        """A node dies with these objects."""
        for ref in refs:
            self.objects.pop(ref, None)

    def _add(self, task: Task) -> Ref:
        ref = Ref(len(self.lineage))
        self.lineage[ref] = task
        return ref


class Actor:
    """State behind futures. Every call is a task after the one before it: a stateful edge."""

    def __init__(self, graph: Graph, last: Ref):
        self.graph, self.last = graph, last

    def call(self, name: str, *given: Any) -> Ref:
        """A future of what the method returns."""

        def step(state: Any, *late: Any) -> tuple[Any, Any]:
            returned = getattr(state, name)(*late)
            return state, returned

        self.last = self.graph._add(Task(step, given, before=self.last))
        return self.graph.remote(_second, self.last)

    def checkpoint(self) -> None:
        """Keep the state as it is now where no node's death reaches it."""
        self.graph.saved[self.last] = deepcopy(self.graph.get(self.last)[0])


def _second(pair: tuple[Any, Any]) -> Any:
    return pair[1]


@paper(year=2017, arxiv="1712.05889")
def ray() -> Graph:
    """A new graph of tasks and actors."""
    return Graph()


@dataclass(frozen=True)
class Node:
    """How many tasks wait on a node, and which objects it has."""

    queue: int
    holds: frozenset[Ref] = frozenset()


def schedule(here: int, needs: Sequence[tuple[Ref, float]], nodes: Sequence[Node], *, longest: int, wait: float) -> int:
    """Bottom up (section 4.2.2): the node that asks keeps a task unless its queue is longer than `longest`; then the
    one with the least time to begin takes it, `wait` seconds a queued task and each missing object's transfer."""
    if nodes[here].queue <= longest:
        return here
    begins = [n.queue * wait + sum(seconds for ref, seconds in needs if ref not in n.holds) for n in nodes]
    return begins.index(min(begins))
