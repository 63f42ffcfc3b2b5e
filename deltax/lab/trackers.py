"""Training curves in the tracker people already use: `--log tensorboard`, `wandb`, `trackio` or `mlflow`.

A tracker is an `on_event` of `deltax.lab.engine.execute`; a run's name in it is its job's id.
"""

import importlib
from pathlib import Path
from typing import Any

from deltax.errors import UserError, nearest
from deltax.lab.engine import Event

PROJECT = "deltax"


class Tracker:
    """What every tracker does; one that writes elsewhere defines `begin` and `log`."""

    module: str
    extra: str

    def __init__(self, folder: Path):
        """Raises UserError when the tracker is not installed. folder: for those that write files."""
        self.folder = folder
        try:
            self.library = importlib.import_module(self.module)
        except ImportError:
            raise UserError(f"{self.extra} is not installed: pip install 'deltax-ml[{self.extra}]'") from None
        self.runs: dict[str, Any] = {}

    def __call__(self, event: Any) -> None:
        if not isinstance(event, Event):  # a comparison's plan
            return
        run_id = event.job.id
        if run_id not in self.runs:
            facts = {"recipe": event.job.recipe.title, "seed": event.job.seed, "lr_scale": event.job.lr_scale}
            self.runs[run_id] = self.begin(run_id, {**facts, "steps": event.job.steps})
        for step, nats in event.losses:
            self.log(run_id, step, {"train/nats": nats})
        if event.tokens_per_second:
            self.log(run_id, event.step, {"train/tokens_per_second": event.tokens_per_second})
        if event.result and event.result.score is not None:
            self.log(run_id, event.job.steps, {"held_out/score": event.result.score, **event.result.metrics})

    def begin(self, run_id: str, facts: dict[str, Any]) -> Any:
        """Open a run, of which `facts` are known."""
        raise NotImplementedError

    def log(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a run at a step."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is still to be written."""
        for run in self.runs.values():
            run.finish()


class TensorBoard(Tracker):
    module, extra = "torch.utils.tensorboard", "tensorboard"

    def begin(self, run_id: str, facts: dict[str, Any]) -> Any:
        writer = self.library.SummaryWriter(str(self.folder / run_id))
        writer.add_text("job", ", ".join(f"{word} {value}" for word, value in facts.items()))
        return writer

    def log(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.runs[run_id].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.runs.values():
            writer.close()


class WandB(Tracker):
    module, extra = "wandb", "wandb"

    def begin(self, run_id: str, facts: dict[str, Any]) -> Any:
        name = f"{facts['recipe']} {run_id[:6]}"
        options = {"reinit": "create_new", "resume": "allow", "dir": str(self.folder)}
        return self.library.init(project=PROJECT, id=run_id, name=name, config=facts, **options)

    def log(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        self.runs[run_id].log(metrics, step=step)


class Trackio(Tracker):
    module, extra = "trackio", "trackio"

    def begin(self, run_id: str, facts: dict[str, Any]) -> Any:
        return self.library.init(project=PROJECT, name=run_id, config=facts, resume="allow", embed=False)

    def log(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        self.runs[run_id].log(metrics, step=step)


class MLflow(Tracker):
    module, extra = "mlflow", "mlflow"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.client = self.library.MlflowClient()
        found = self.client.get_experiment_by_name(PROJECT)
        self.experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)

    def begin(self, run_id: str, facts: dict[str, Any]) -> str:
        run = self.client.create_run(self.experiment, run_name=f"{facts['recipe']} {run_id[:6]}")
        for word, value in {**facts, "deltax": run_id}.items():
            self.client.log_param(run.info.run_id, word, value)
        return run.info.run_id

    def log(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.client.log_metric(self.runs[run_id], name, value, step=step)

    def close(self) -> None:
        for run in self.runs.values():
            self.client.set_terminated(run)


TRACKERS = {kind.extra: kind for kind in (TensorBoard, WandB, Trackio, MLflow)}


def tracker(name: str, folder: Path) -> Tracker:
    """The tracker of that name. Raises UserError for an unknown one, and one that is not installed."""
    if name not in TRACKERS:
        raise UserError(f"there is no tracker {name!r}{nearest(name, TRACKERS) or ': ' + ', '.join(TRACKERS)}")
    return TRACKERS[name](folder)
