"""Training the default gpt: against transformers' GPT-2, and against a GPT written by hand, in equally plain loops.

On the cores alone. Each contender has processes of its own: in one they would spoil each other's memory.
"""

import os
from collections.abc import Callable
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import timing
from benchmarks.minimal_gpt import MinimalGPT
from deltax.papers.language.models.gpt import gpt
from deltax.train import mesh
from deltax.train.job import Job, loop_of, task_of
from deltax.train.launch import launch
from deltax.train.loop import train
from deltax.train.machine import Machine, cores, settle

STEPS = 4  # of each call
GPT2, BY_HAND = "transformers GPT2LMHeadModel", "a GPT written by hand"
KEPT = f"{GPT2} in a process that keeps its memory"
DX_TRAIN, REPLICAS = "dx train gpt", f"dx train gpt --mesh dp={len(cores())}"


def main() -> None:
    contenders: dict[str, Callable[[Connection], None]] = {
        DX_TRAIN: _ours,
        REPLICAS: _replicas,
        **{peer: partial(_plain, peer) for peer in (GPT2, KEPT, BY_HAND)},
    }
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    context, processes, calls = get_context("spawn"), [], {}
    try:
        for name, run in contenders.items():
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=run, args=(theirs,)))
            processes[-1].start()
            theirs.close()
            calls[name] = lambda pipe=ours: (pipe.send("go"), pipe.recv())
        seconds = timing.interleave(calls, rounds=60)
    finally:
        for process in processes:
            process.kill()
    tokens, rows = STEPS * task_of(gpt).tokens(loop_of(gpt).batch), {}
    for ours in (REPLICAS, DX_TRAIN):
        for peer in (GPT2, KEPT, BY_HAND):
            found = timing.ratio(seconds[ours], seconds[peer])
            rows[f"{ours} against {peer}"] = {**found, "tokens_per_second": tokens / found["ours_seconds"]}
    timing.store("training", rows)


def _ours(pipe: Connection) -> None:
    settle()
    _train(pipe, len(cores()))


def _replicas(pipe: Connection) -> None:
    launch(len(cores()), _train, pipe, 1, layout=mesh.Mesh(dp=len(cores())))


def _train(pipe: Connection, threads: int) -> None:
    machine = Machine.here(threads=threads)
    train(Job(gpt, steps=100_000, precision=machine.precision_name), machine, on_step=_when_asked(pipe))


def _plain(which: str, pipe: Connection) -> None:
    if which == KEPT:
        settle()
    machine = Machine.here(threads=len(cores()))
    torch.set_num_threads(machine.threads)
    task, loop, on_step = task_of(gpt), loop_of(gpt), _when_asked(pipe)
    model, logits = _peer(which, **task.task_spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for i in count():
        batch = task.batch(i, size=loop.batch, seed=0)
        with machine.autocast():
            loss = cross_entropy(logits(batch.inputs).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step()


def _peer(
    which: str, *, vocab: int, context: int, **_: Any
) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    dim, depth, heads = (gpt[f"model.{path}"] for path in ("dim", "stack.depth", "stack.block.mixer.heads"))
    if which == BY_HAND:
        model = MinimalGPT(vocab, context, dim, depth, heads)
        return model, model
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=context,
        n_embd=dim,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    return model, lambda tokens: model(tokens, use_cache=False).logits


def _when_asked(pipe: Connection) -> Callable[..., None]:
    """To be told of every step: after the first, and after every few, it waits until the next few are asked for."""
    steps = count()

    def each(*_: Any) -> None:
        step = next(steps)
        if step % STEPS:
            return
        if mesh.rank() == 0:
            if step:
                pipe.send("done")
            pipe.recv()
        if mesh.size() > 1:
            distributed.barrier()  # of gloo: who waits there does not compute meanwhile

    return each
