"""Ray: A Distributed Framework for Emerging AI Applications.
Moritz, Nishihara, Wang, Tumanov, Liaw, Liang, Elibol, Yang, Paul, Jordan, Stoica, 2017. arXiv:1712.05889

A dynamic task graph, but tasks can share an actor's state, and lost objects are recomputed from their lineage.

A call returns a future at once; a future as an argument is an edge. The lineage of every object is kept, so an object
lost with a node is recomputed, and nothing else. An actor's calls form a chain of edges, and an actor is restored by
replaying the chain from its last checkpoint. `dx compare --engine ray` runs on Ray itself; here is the graph.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from deltax import paper


@dataclass(frozen=True)
class Ref:
    """A future: the object that a task returns."""

    id: int


@dataclass
class Task:
    """An object's lineage: function, arguments (also futures), and for an actor's call the call before."""

    function: Callable[..., Any]
    given: tuple[Any, ...]
    before: Ref | None = None


@dataclass
class Graph:
    """The control store with the lineage of all objects, and the object store, which may lose objects.

    `runs` counts the runs of each task; `saved` holds the actors' checkpoints, which are not lost.
    """

    lineage: dict[Ref, Task] = field(default_factory=dict)
    objects: dict[Ref, Any] = field(default_factory=dict)
    saved: dict[Ref, Any] = field(default_factory=dict)
    runs: dict[Ref, int] = field(default_factory=dict)

    def remote(self, function: Callable[..., Any], *given: Any) -> Ref:
        """Schedules a call and returns its future; arguments may be futures."""
        return self._add(Task(function, given))

    def actor(self, make: Callable[..., Any], *given: Any) -> "Actor":
        """A stateful object whose calls run one after the other."""
        return Actor(self, self._add(Task(lambda *g: (make(*g), None), given)))

    def get(self, ref: Ref) -> Any:
        """The object; if it is not stored, it is computed with all that it needs."""
        if ref not in self.objects:
            # recompute from the lineage; lost arguments are recomputed first
            task = self.lineage[ref]
            given = [self.get(g) if isinstance(g, Ref) else g for g in task.given]
            if task.before is not None:
                state = self.saved[task.before] if task.before in self.saved else self.get(task.before)[0]
                # a copy: replaying must not change the state before
                given.insert(0, deepcopy(state))
            self.runs[ref] = self.runs.get(ref, 0) + 1
            self.objects[ref] = task.function(*given)
        return self.objects[ref]

    def lose(self, *refs: Ref) -> None:
        """Removes these objects, as when their node dies."""
        for ref in refs:
            self.objects.pop(ref, None)

    def _add(self, task: Task) -> Ref:
        ref = Ref(len(self.lineage))
        self.lineage[ref] = task
        return ref


@paper(year=2017, arxiv="1712.05889")
def ray() -> Graph:
    """A new graph of tasks and actors."""
    return Graph()


class Actor:
    """State behind futures. Each call is a task after the call before: a stateful edge."""

    def __init__(self, graph: Graph, last: Ref):
        self.graph, self.last = graph, last

    def call(self, name: str, *given: Any) -> Ref:
        """A future of the method's return value."""

        def step(state: Any, *late: Any) -> tuple[Any, Any]:
            returned = getattr(state, name)(*late)
            return state, returned  # the next call's edge, and the caller's value

        # stateful edge: this call runs after the one before
        self.last = self.graph._add(Task(step, given, before=self.last))
        return self.graph.remote(_second, self.last)

    def checkpoint(self) -> None:
        """Stores the current state where no node failure reaches it."""
        self.graph.saved[self.last] = deepcopy(self.graph.get(self.last)[0])


def _second(pair: tuple[Any, Any]) -> Any:
    return pair[1]


@dataclass(frozen=True)
class Node:
    """A node: number of queued tasks, and stored objects."""

    queue: int
    holds: frozenset[Ref] = frozenset()


def schedule(here: int, needs: Sequence[tuple[Ref, float]], nodes: Sequence[Node], *, longest: int, wait: float) -> int:
    """Bottom-up scheduling (section 4.2.2): the node to run a task on.

    The local node keeps a task unless its queue is longer than `longest`. Otherwise the node with the earliest start
    takes it: `wait` seconds a queued task, plus the transfer seconds of missing inputs.
    """
    if nodes[here].queue <= longest:
        return here
    # queueing time plus transfer time of inputs that the node lacks
    begins = [n.queue * wait + sum(seconds for ref, seconds in needs if ref not in n.holds) for n in nodes]
    return begins.index(min(begins))
