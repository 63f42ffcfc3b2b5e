"""Training the default gpt: against transformers' GPT-2, and against a GPT written by hand, in equally plain loops."""

import os

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import timing
from benchmarks.minimal_gpt import MinimalGPT
from deltax import kernels
from deltax.papers.language.gpt import gpt
from deltax.train.job import loop_of, task_of
from deltax.train.loop import build
from deltax.train.machine import Machine


def main() -> None:
    machine = Machine.here(threads=os.cpu_count() or 1)
    torch.set_num_threads(machine.threads)
    run, task, loop = kernels.fastest(gpt, machine.device)(), task_of(gpt), loop_of(gpt)
    dim, depth, heads = (gpt[f"model.{path}"] for path in ("dim", "stack.depth", "stack.block.mixer.heads"))
    facts = task.facts
    config = GPT2Config(
        vocab_size=facts["vocab"],
        n_positions=facts["context"],
        n_embd=dim,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation="sdpa",
    )
    ours = build(run, task, 0)
    peers = {
        "transformers GPT2LMHeadModel": GPT2LMHeadModel(config).train(),
        "a GPT written by hand": MinimalGPT(facts["vocab"], facts["context"], dim, depth, heads),
    }
    logits = {
        "transformers GPT2LMHeadModel": lambda model, tokens: model(tokens, use_cache=False).logits,
        "a GPT written by hand": lambda model, tokens: model(tokens),
    }

    def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, loss):
        def step(count: int = 4) -> None:
            for i in range(count):
                batch = task.batch(i, size=loop.batch, seed=0)
                with machine.autocast():
                    value = loss(model, batch)
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step

    calls = {"deltax gpt": stepper(ours, run.optimizer(ours), lambda m, b: run.objective(m, b).mean())}
    for name, model in peers.items():
        forward = logits[name]
        plain = lambda m, b, f=forward: cross_entropy(f(m, b.inputs).flatten(0, 1), b.targets.flatten())
        calls[name] = stepper(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), plain)
    seconds = timing.interleave(calls, rounds=75)
    tokens = 4 * task.tokens(loop.batch)
    rows = {}
    for name in peers:
        found = timing.ratio(seconds["deltax gpt"], seconds[name])
        rows[f"training gpt against {name}"] = {**found, "tokens_per_second": tokens / found["ours_seconds"]}
    timing.store("training", rows)
