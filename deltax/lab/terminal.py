"""A comparison in the terminal: the plan, live progress, and the tables at the end."""

from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Task as Bar
from rich.table import Table
from rich.text import Text

from deltax.lab import report
from deltax.lab.comparison import Comparison
from deltax.lab.engine import Event
from deltax.lab.plan import TUNING_SEED, Plan
from deltax.train.job import Job

LIVE = 12  # runs shown at a time


class Live:
    """Follows a comparison; its `hear` is the `on_event` of `compare`. Use it as a context.

    On a terminal, a bar for the whole and one for each run under way; elsewhere a line for each run that ends.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            _Left(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._whole: TaskID | None = None
        self._runs: dict[str, TaskID] = {}
        self._ended: set[str] = set()
        self._steps, self._doing, self._planned = 0, dict[str, int](), 0

    def __enter__(self) -> "Live":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def hear(self, event: Plan | Event) -> None:
        if isinstance(event, Plan):
            self._plan(event)
        elif event.kind in ("restarted", "waiting") or (event.kind == "failed" and event.of > 1):
            self._say(f"{self._name(event.job)}: {event.text or event.kind}")
        if isinstance(event, Event):
            self._run(event)

    def _plan(self, plan: Plan) -> None:
        for line in plan.sentences():
            self._say(line)
        self._planned = sum(plan.runs().values())
        self._whole = self._bars.add_task("all runs", total=plan.steps, note="")

    def _run(self, event: Event) -> None:
        job, id = event.job, event.job.id
        if event.kind in ("finished", "reused", "failed"):
            self._doing.pop(id, None)
            if id in self._runs:
                self._bars.remove_task(self._runs.pop(id))
            if id not in self._ended:
                self._ended.add(id)
                self._steps += job.steps
                if event.kind == "finished" and not self.console.is_terminal:
                    whole = max(self._planned, len(self._ended))
                    self._say(f"{len(self._ended)}/{whole} {self._name(job)}: {_ended(event)}")
        else:
            self._doing[id] = event.step
            if id not in self._runs and len(self._runs) < LIVE:
                self._runs[id] = self._bars.add_task(f"  {self._name(job)}", total=job.steps, note="")
            if id in self._runs:
                note = "" if event.loss is None else f"{event.loss:.3f} nats"
                self._bars.update(self._runs[id], completed=event.step, note=note)
        if self._whole is not None:
            done = self._steps + sum(self._doing.values())
            total = max(self._bars.tasks[0].total or 0, done)
            runs = max(self._planned, len(self._ended))
            self._bars.update(self._whole, completed=done, total=total, note=f"{len(self._ended)}/{runs} runs")

    def _name(self, job: Job) -> str:
        return name(job) if self._planned else alone(job)

    def _say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=not self.console.is_terminal)


def name(job: Job) -> str:
    """A comparison's run in a few words."""
    return _words(job, "tuning" if job.seed == TUNING_SEED else f"pair {job.seed}")


def alone(job: Job) -> str:
    """A run that is part of no comparison, in a few words."""
    return _words(job, f"seed {job.seed}")


def _words(job: Job, role: str) -> str:
    return f"{job.recipe.title}, {role}, rate ×{job.lr_scale:.3g}, {job.steps} steps"


def show(comparison: Comparison | dict[str, Any], console: Console | None = None) -> None:
    """The tables and the verdicts."""
    console = console or Console()
    record = comparison.to_json() if isinstance(comparison, Comparison) else comparison
    console.print()
    for rows in (report.results(record), report.costs(record)):
        console.print(table(rows))
    if below := report.legend(record):
        console.print(Text(below, style="dim"))
    colours = {"better": "green", "worse": "red", "equivalent": "cyan"}
    outcomes = [row["against"]["outcome"] for row in record["rows"][1:]]
    for line, outcome in zip(report.verdicts(record), [*outcomes, ""], strict=False):
        console.print(Text(line, style=colours.get(outcome, "")))
    total = {k: sum(phase[k] for phase in record["spent"].values()) for k in ("runs", "flops")}
    tuning = record["spent"].get("tuning", {"flops": 0})["flops"]
    share = 100 * tuning / max(total["flops"], 1)
    console.print(
        Text(f"{total['runs']:.0f} runs, {total['flops']:.2g} FLOPs, {share:.0f} % of them tuning", style="dim")
    )


def table(rows: list[list[str]]) -> Table:
    """Head and rows as a table; cells are plain text, whatever is in them."""
    head, *body = rows
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, cell in enumerate(head):
        longest = max((len(word) for word in cell.split()), default=0)
        made.add_column(Text(cell), justify="left" if i == 0 else "right", overflow="fold", min_width=longest)
    for row in body:
        made.add_row(*(Text(cell) for cell in row))
    return made


class _Left(ProgressColumn):
    """Time left at the speed so far, for the bar of the whole."""

    max_refresh = 0.5

    def render(self, task: Bar) -> Text:
        if task.id or not task.completed or not task.total or task.elapsed is None:
            return Text("")
        left = task.elapsed * (task.total / task.completed - 1)
        return Text(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left", style="dim")


def _ended(event: Event) -> str:
    result = event.result
    if result is None or result.diverged or result.score is None:
        return "diverged"
    return f"{result.score:.4f}"
