"""The shell's commands that train, compare, verify or read the store: what `deltax.cli` calls once torch may load."""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deltax import catalog, contract
from deltax.errors import UserError
from deltax.lab.lease import Worker
from deltax.lab.printing import print_json
from deltax.lab.store import Store
from deltax.recipe import Part


def train(recipe: Part, arguments: argparse.Namespace) -> None:
    """`dx train`: one run, kept with its weights; on a mesh, over processes that torchrun or this one starts."""
    from rich.console import Console

    from deltax.kernels import choice
    from deltax.lab.engine import execute
    from deltax.lab.terminal import Live
    from deltax.train import mesh
    from deltax.train.job import Job, loop_of
    from deltax.train.machine import Machine, cores, settle

    if arguments.report:
        from deltax.lab import report as pages

        pages.check(arguments.report, ".html")
    kernels: list[str] | None = []
    store = Store(arguments.store)
    layout = None if arguments.mesh is None else mesh.Mesh.parse(arguments.mesh)
    here = mesh.started() or (layout.size if layout else 1)
    settle()
    threads = max(1, len(cores()) // here)
    machine = Machine.here(threads=threads, compiled=arguments.compile)
    steps = arguments.steps or loop_of(recipe).steps
    job = Job(recipe, arguments.seed, steps, arguments.lr_scale, machine.precision_name)
    result = store.get(job)
    together = result is None and (here > 1 or arguments.compile)
    if result is None or result.weights_file is None:
        with _trackers(arguments.log, store) as log, Live(None if mesh.first() else Console(quiet=True)) as live:
            hear = _each(live.hear, *log)
            if not together:
                execute([job], store=store, engine="inline", threads=threads, on_event=hear, keep_weights=True)
                kernels = choice.picked()
            elif (kernels := _on_a_mesh(job, machine, layout, hear, store, arguments.patience)) is None:
                return
    result = store.get(job)
    assert result is not None
    task = job.recipe["task"]()
    unit = task.unit
    if arguments.report:
        _run_report(result, task, store, Path(arguments.report))
    if arguments.json:
        facts = {"id": job.id, "recipe": recipe.title, "score": result.score, "unit": unit, "metrics": result.metrics}
        facts |= {"tokens": result.tokens, "seconds": result.seconds, "diverged": result.diverged}
        print_json({**facts, "kernels": kernels, "looks_ahead": contract.looks_ahead(recipe)})
    elif result.diverged:
        print(f"{recipe.title} diverged at step {len(result.losses)}; try a lower --lr-scale")
    else:
        spent = f"{result.tokens:,} tokens in {result.seconds:.0f} s"
        print(f"{recipe.title}: {result.score:.4f} {unit} held out, after {spent}")
        for sentence in contract.looks_ahead(recipe):
            print(f"note: this score is of a model that reads ahead: {sentence}")
        for line in kernels or ():
            print(f"kernel on {line}")
        speaks = hasattr(task, "encode") and hasattr(task, "decode")
        if arguments.report:
            print(f"report: {arguments.report}")
        print(f"run {job.id}" + (f"; go on with: dx sample {job.id[:8]} 'Once'" if speaks else ""))


def _run_report(result: Any, task: Any, store: Store, path: Path) -> None:
    """A page of one run."""
    from dataclasses import replace

    from deltax.lab import report as pages
    from deltax.lab.lab import Trained
    from deltax.lab.pictures import pictures

    if not result.diverged:
        drawn = pictures(result.job.recipe, task, Trained(result, store).model)
        result = replace(result, pictures=drawn)
    pages.written(pages.of_run(result, task.unit), path)


def _on_a_mesh(
    job: Any, machine: Any, layout: Any, hear: Callable[[Any], None], store: Store, patience: float
) -> list[str] | None:
    """Train with the processes that torchrun started, or with some of our own.

    What kernels they picked, where this process speaks for them; else None.
    """
    from deltax.lab.engine import Event
    from deltax.train import mesh
    from deltax.train.launch import launch

    def each(told: tuple[Any, ...]) -> None:
        hear(Event("step", job, 0, 1, *told))

    hear(Event("started", job, 0, 1))
    if mesh.started() or layout is None or layout.size == 1:
        with mesh.joined(layout, patience=patience) as speaks:
            kernels = _together(job, machine, store.folder, each)
    else:
        shared = (job, machine, store.folder)
        with _claimed(job, store):  # here its recipe still has its title
            kernels = launch(layout.size, _together, *shared, layout=layout, patience=patience, hear=each)[0]
        speaks = True
    if speaks:
        hear(Event("finished", job, 1, 1, job.steps, result=store.get(job)))
    return kernels if speaks else None


@contextmanager
def _claimed(job: Any, store: Store) -> Any:
    """The lease of a run that other processes train for this one."""
    me = Worker.here()
    if not store.claim(job, me):
        raise UserError(f"another process trains run {job.id[:10]}; wait until it ends, or choose another --store")
    try:
        yield
    finally:
        store.release(job, me)


def _together(job: Any, machine: Any, folder: Path, tell: Callable[[Any], None] | None = None) -> list[str]:
    """One process's part of a run on a mesh; the first one tells of it, and stores it. What kernels this one picked."""
    from deltax.kernels import choice
    from deltax.lab.worker import result_of
    from deltax.train import checkpoint, launch, mesh
    from deltax.train.loop import train as run

    store = Store(folder)
    outcome = run(job, machine, save_to=store.checkpoint_of(job), on_step=_paced(job, tell or launch.tell))
    if not outcome.diverged:
        checkpoint.save(store.weights_of(job), outcome.model.state_dict(), {"id": job.id})
    if mesh.rank() == 0:
        store.put(result_of(job, outcome, machine))
    return choice.picked()


def _paced(job: Any, tell: Callable[[Any], None]) -> Callable[[Any], None]:
    """The first process's step, loss, tokens a second and new losses, (step, nats), told twice a second at most."""
    from deltax.lab.worker import TELL_EVERY
    from deltax.train import mesh

    told, at = 0, 0.0

    def each(progress: Any) -> None:
        nonlocal told, at
        now = time.monotonic()
        if mesh.rank() > 0 or (now - at < TELL_EVERY and progress.step < job.steps):
            return
        new = tuple(progress.losses[told:])
        told, at = len(progress.losses), now
        tell((progress.step, new[-1][1], progress.tokens / max(progress.seconds, 1e-9), new))

    return each


def sample(arguments: argparse.Namespace) -> None:
    """`dx sample`: text from a finished run."""
    import torch

    from deltax.lab.lab import Trained
    from deltax.parts.training.generate import generate

    store = Store(arguments.store)
    result = store.find(arguments.of)
    trained = Trained(result, store)
    if not hasattr(trained.task, "encode"):
        [title] = [line.title for line in store.runs() if line.id == result.job.id]
        raise UserError(f"{title} is no language model; it has no text to go on with")
    prompt = trained.task.encode(arguments.prompt or "\n")[None]
    draws = torch.Generator().manual_seed(arguments.seed)
    tokens = generate(
        trained.model, prompt, length=arguments.length, temperature=arguments.temperature, generator=draws
    )
    text = trained.task.decode(tokens[0])
    if arguments.json:
        print_json({"run": result.job.id, "prompt": arguments.prompt, "text": text})
    else:
        print(text)


def runs(arguments: argparse.Namespace) -> None:
    """`dx runs`: what the store holds, the latest first."""
    kept = Store(arguments.store).runs()
    lines = [line for line in kept if all(word in line.title for word in arguments.words)]
    if arguments.json:
        print_json([vars(line) for line in lines])
        return
    width = max((len(line.title) for line in lines), default=0)
    for line in lines:
        score = "" if line.score is None else f"{line.score:.4f}"
        detail = f"seed {line.seed}, {line.steps} steps, rate ×{line.lr_scale:.3g}"
        print(f"{line.id[:10]}  {line.title:{width}}  {line.state:11}  {score:>8}  {detail}")
    if not lines:
        none = f"none of {len(kept)} runs has all of these words; 'dx runs' lists them"
        print(none if kept else "no runs yet; 'dx train gpt' makes one")


def compare(recipes: Sequence[Part], arguments: argparse.Namespace) -> None:
    """`dx compare`: the plan, the experiment, the table and the report."""
    from deltax.lab import report, terminal
    from deltax.lab.compare import compare as run
    from deltax.lab.plan import make_plan

    settings: dict[str, Any] = {
        "budget": arguments.budget,
        "pairs": "until-clear" if arguments.until_clear else arguments.pairs,
        "ladder": arguments.ladder,
    }
    store = Store(arguments.store)
    if arguments.plan:
        plan = make_plan(recipes, store, workers=_workers(arguments), **settings)
        if arguments.json:
            facts = {"runs": plan.runs(), "seconds": plan.seconds, "resolution": plan.resolution(plan.pairs)}
            print_json({"said": plan.sentences(), "budget": vars(plan.budget), "pairs": plan.pairs, **facts})
        else:
            print("\n".join(plan.sentences()))
        return
    report.check(arguments.report)
    with _trackers(arguments.log, store) as log, terminal.Live() as live:
        settings |= {"engine": arguments.engine, "workers": arguments.workers, "on_event": _each(live.hear, *log)}
        comparison = run(*recipes, store=store, **settings)
    saved = report.save(comparison, arguments.report)
    if arguments.json:
        print(report.as_json(comparison))
    else:
        terminal.show(comparison)
        print(f"report: {saved}")


def interact(x: Part, a: Any, b: Any, arguments: argparse.Namespace) -> None:
    """`dx interact`: whether two changes together give more or less than their product."""
    from deltax.lab import terminal
    from deltax.lab.interact import interact as run

    store = Store(arguments.store)
    with _trackers(arguments.log, store) as log, terminal.Live() as live:
        found = run(
            x,
            a,
            b,
            budget=arguments.budget,
            pairs=arguments.pairs,
            store=store,
            engine=arguments.engine,
            workers=arguments.workers,
            on_event=_each(live.hear, *log),
        )
    if arguments.json:
        print_json(found.to_json())
    else:
        terminal.show(found.comparison)
        print(found)


def verify(records: Sequence[catalog.Record], arguments: argparse.Namespace) -> int:
    """`dx verify`: claims run, verdicts printed and stored. 1 when an exact or parity claim fails."""
    from deltax.lab import terminal
    from deltax.lab.lab import Lab
    from deltax.lab.verify import verify as run

    store, failed, found = Store(arguments.store), False, {}
    with _trackers(arguments.log, store) as log, terminal.Live() as live:
        settings = {"engine": arguments.engine, "workers": _workers(arguments)}
        lab = Lab(store, **settings, on_event=_each(live.hear, *log))
        for record in records:
            for claim in record.claims:
                if claim.is_asked(arguments.claim):
                    stored = run(record.key, lab=lab, only=claim.name)
                    found[record.key] = stored
                    entry = stored[claim.kind][claim.name]
                    failed |= entry.get("passed") is False
                    if not arguments.json:
                        live.console.print(_verdict(record.key, claim, entry), markup=False, soft_wrap=True)
    if arguments.claim and not found:
        run(records[0].key, lab=lab, only=arguments.claim)  # raises, with the nearest name
    if arguments.json:
        print_json(found)
    return 1 if failed else 0


def rehearse(records: Sequence[catalog.Record], arguments: argparse.Namespace) -> int:
    """`dx verify --rehearse`: measured claims run cut short, nothing stored. 1 when one of them does not run."""
    from deltax.lab import rehearsal, terminal

    found: dict[str, dict[str, str | None]] = {}
    with terminal.Live() as live:
        settings = {"engine": arguments.engine, "workers": _workers(arguments), "on_event": live.hear}
        for record in records:
            found[record.key] = {}
            for name, fault in rehearsal.rehearse(record.key, only=arguments.claim, **settings):
                found[record.key][name] = fault
                if not arguments.json:
                    said = f"{record.key}: {name} {f'does not run: {fault}' if fault else 'runs'}"
                    live.console.print(said, markup=False, soft_wrap=True)
    if not any(found.values()):
        asked = f"measured claim {arguments.claim!r}" if arguments.claim else "measured claim"
        raise UserError(f"no {asked} to rehearse in {', '.join(found)}: see dx show {next(iter(found))}")
    if arguments.json:
        print_json(found)
    return 1 if any(fault for faults in found.values() for fault in faults.values()) else 0


def report(arguments: argparse.Namespace) -> None:
    """`dx report`: a stored comparison, written again."""
    from deltax.lab import report as pages

    kept = list(Store(arguments.store).records("comparison").values())
    chosen = [c for c in kept if arguments.which in (None, c["id"]) or c["id"].startswith(arguments.which or "")]
    if not kept:
        raise UserError("the store has no comparison yet; 'dx compare gpt gpt+dyt' makes one")
    if not chosen:
        known = ", ".join(c["id"] for c in kept[-5:])
        raise UserError(f"there is no comparison {arguments.which!r} in the store; the newest are {known}")
    if arguments.json:
        print_json(chosen[-1])
    else:
        print(f"report: {pages.save(chosen[-1], arguments.to)}")


def _verdict(key: str, claim: catalog.ClaimRecord, entry: dict[str, Any]) -> str:
    if claim.kind == "measured":
        return f"{key}: {claim.says}\n    paper: {claim.paper}\n    here:  {entry['summary']}"
    said = {True: "holds", False: f"FAILS: {entry.get('why')}", None: f"not run: {entry.get('why')}"}
    return f"{key}: {claim.says}\n    {claim.kind}: {said[entry['passed']]}"


def _workers(arguments: argparse.Namespace) -> int:
    from deltax.train.machine import cores

    return arguments.workers or len(cores())


def _each(*listeners: Callable[[Any], Any]) -> Callable[[Any], None]:
    """One listener that tells all."""

    def tell(event: Any) -> None:
        for listener in listeners:
            listener(event)

    return tell


@contextmanager
def _trackers(names: Sequence[str], store: Store) -> Any:
    from deltax.lab.trackers import tracker

    with ExitStack() as closing:
        found = [tracker(name, store.folder / "trackers" / name) for name in names]
        for each in found:
            closing.callback(each.close)
        yield found
