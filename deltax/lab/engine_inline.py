"""Placeholder until the engines land: one run after the other in this process."""

import numpy as np

from deltax import __version__
from deltax.lab.store import Result
from deltax.train import checkpoint
from deltax.train.loop import train
from deltax.train.machine import Machine


def run(jobs, store, on_event, keep_weights):
    from deltax.lab.engine import Event

    jobs = {job.id: job for job in jobs}
    results = {}
    for id, job in jobs.items():
        found = store.get(job)
        if found and (found.weights_file or found.diverged or not keep_weights):
            results[id] = found
            on_event(Event("reused", job, len(results), len(jobs), result=found))
            continue
        on_event(Event("started", job, len(results), len(jobs)))
        outcome = train(job, save_to=store.checkpoint_of(job))
        ev, p, none = outcome.evaluation, outcome.progress, np.empty(0)
        if ev and keep_weights:
            checkpoint.save(store.weights_of(job), outcome.model.state_dict(), {})
        store.put(
            Result(job, ev and ev.score, ev.values if ev else none, ev.weights if ev else none,
                   ev.clusters if ev else none, ev.metrics if ev else {}, p.losses, p.tokens, p.seconds,
                   outcome.diverged, {**Machine.here().describe(), "deltax": __version__})
        )
        results[id] = store.get(job)
        on_event(Event("finished", job, len(results), len(jobs), result=results[id]))
    return results
