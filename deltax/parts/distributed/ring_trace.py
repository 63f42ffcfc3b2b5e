"""When each transfer of a ring was under way, and when this process computed.

A profiler cannot tell: it draws a transfer of gloo until somebody waits for it, however early it arrived. Here a thread
looks at the room that the tensors are to fill.
"""

import threading
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltax.parts.distributed.ring import Arrival, Held, Processes

LOOK = 2e-4  # seconds from one look to the next


class Transfer(NamedTuple):
    """Seconds on the clock that the processes of a machine share.

    began    handed to the network, both ways; from here on this process computes
    wanted   asked for: it has nothing more to compute without
    arrived  the last number was there
    """

    began: float
    wanted: float
    arrived: float

    @property
    def hidden(self) -> bool:
        """Whether nobody waited."""
        return self.arrived <= self.wanted


class Traced(Processes):
    """The processes of a group over gloo, one of which keeps its `transfers` in the order in which they were wanted.

    Of a transfer whose numbers are not floating-point, or end in NaN, `arrived` is when it was handed over.
    """

    def __init__(self, *given: Any, **settings: Any):
        super().__init__(*given, **settings)
        self.transfers: list[Transfer] = []
        self._rooms: list[Tensor] = []

    def pass_on(self, held: Held) -> Arrival:
        self._rooms = []
        began, arrival = perf_counter(), super().pass_on(held)
        over, seen = threading.Event(), list[float]()
        watch = threading.Thread(target=_look, args=(self._rooms, over, seen), daemon=True)
        watch.start()

        def wait() -> Held:
            wanted = perf_counter()
            try:
                arrived = arrival()
                handed = perf_counter()
            finally:
                over.set()
                watch.join()
            self.transfers.append(Transfer(began, wanted, min([*seen, handed])))
            return arrived

        return wait

    def _room(self, tensor: Tensor) -> Tensor:
        room = super()._room(tensor)
        if room.is_floating_point() and room.numel():
            self._rooms.append(room.fill_(torch.nan))
        return room


def _look(rooms: Sequence[Tensor], over: threading.Event, seen: list[float]) -> None:
    ends = [room.view(-1)[-1] for room in rooms]
    while ends and not over.is_set():
        if not any(bool(end.isnan()) for end in ends):
            seen.append(perf_counter())
            return
        over.wait(LOOK)


def drawn(members: Sequence[Sequence[Transfer]]) -> Any:
    """A matplotlib figure: for each process, above when it computed, below what was on its way to it meanwhile."""
    from matplotlib.figure import Figure

    zero = min(t.began for transfers in members for t in transfers)
    spans = lambda ends: [(1e3 * (a - zero), 1e3 * (b - a)) for a, b in ends]
    figure = Figure(figsize=(7, 0.8 + 0.8 * len(members)), layout="constrained")
    axes = figure.subplots()
    for rank, transfers in enumerate(members):
        said = {"label": None} if rank else {}
        axes.broken_barh(
            spans((t.began, t.wanted) for t in transfers), (-rank, 0.35), color="0.75", **{"label": "computes", **said}
        )
        axes.broken_barh(
            spans((t.began, t.arrived) for t in transfers), (-rank - 0.3, 0.25), **{"label": "arrives", **said}
        )
    axes.set(xlabel="milliseconds", yticks=[-r for r in range(len(members))])
    axes.set_yticklabels([f"process {r}" for r in range(len(members))])
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
