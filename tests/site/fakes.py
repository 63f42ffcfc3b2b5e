"""Papers, notes, verdicts and comparisons made up for tests and benchmarks of the pages."""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deltax import catalog
from deltax.catalog import Record
from deltax.lab.lease import Worker
from deltax.lab.store import Store
from deltax.library.importing import import_paths
from deltax.library.store import Library
from deltax.site import trees
from deltax.site.notes import Notes
from deltax.site.pages import Site
from deltax.site.reports import Reports
from deltax.site.runs import Runs
from deltax.site.trees import Trees

FIELDS = ("language", "vision", "generative", "systems", "optimization", "rl", "interp", "audio")
SLOTS = {
    "language": ("norm", "mlp", "mixer", "position", "residual", "activation"),
    "optimization": ("optimizer", "schedule"),
}
"""What papers of a field fill; the others fill a slot that gpt does not have."""

PAPER = '''"""{title}. {author} et al., {year}. arXiv:{arxiv}

{parent}, but part {i} of it is measured twice.

What is measured twice is known better, <b>says</b> the paper, and `part_{i}` says so too.
"""

from torch import nn

from deltax import Part, claim, paper
{imports}


class Twice{i}(nn.Module):
    """x + x. Stream (B, T, D) -> (B, T, D)."""

    def forward(self, x):
        scale = 2.0  # {i}
        return scale * x


@paper({on}arxiv="{arxiv}", year={year})
def {name}(recipe: Part, *, scale: float = {i}.5) -> Part:
    return recipe.fill("{slot}", Twice{i})


@claim
def twice_is_twice():
    """Twice x is x + x <exactly>."""
    assert True


@claim.parity(peer="torch.nn.Twice")
def equals_torch():
    """The same as torch."""
    assert True


@claim.measured(paper="82.{i} against 82.3 (Table 1)")
def better(lab):
    """It ends better than what it changes."""
    return lab.compare("gpt", "gpt+{key}").better
'''


def catalogue(folder: Path, count: int, seed: int = 0) -> dict[str, Record]:
    """`count` papers over FIELDS and 25 years, as files in `folder`, each on one to three earlier ones."""
    draw = random.Random(seed)
    made: list[tuple[str, str]] = []
    for i in range(count):
        field = FIELDS[int(len(FIELDS) * draw.random() ** 1.7)]
        year = 2000 + round(25 * (i / max(1, count - 1)) ** 0.6)
        name = f"{draw.choice(['linear', 'sparse', 'deep', 'flash', 'gated', 'mixed'])}_{i}"
        parents = draw.sample(made, min(len(made), draw.choice((1, 1, 2, 3))))
        imports = "\n".join(f"from deltax.papers.{f}.{n} import {n}" for f, n in parents)
        path = folder / field / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            PAPER.format(
                title=f"On Measuring Part {i} Twice",
                author="Someone",
                year=year,
                arxiv=f"{2000 + i % 400}.{i:05}",
                parent=parents[0][1].replace("_", " ").capitalize() if parents else "A sum",
                imports=imports,
                on=f"on=({', '.join(name for _, name in parents)},), " if parents else "",
                i=i,
                slot=draw.choice(SLOTS.get(field, ("unit",))),
                name=name,
                key=name.replace("_", "-"),
            )
        )
        made.append((field, name))
    records = [catalog.read(path) for path in sorted(folder.glob("*/*.py"))]
    return {r.key: r for r in sorted(records, key=lambda r: (r.year, r.key))}


def evidence(folder: Path, papers: dict[str, Record]) -> None:
    """A verdict for every third paper, and a figure for the first."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    outcomes = ["supported at this scale", "opposite at this scale", "inconclusive", "not seen at this scale"]
    for i, key in enumerate(list(papers)[::3]):
        verdict = {
            "outcome": outcomes[i % 4],
            "summary": f"{outcomes[i % 4]}: -0.01",
            "scale": "0.37M parameters, 0.8M tokens, the default text",
            "estimate": -0.0194,
            "interval": [-0.030, -0.009],
            "unit": "bits per byte",
            "could_have_seen": 0.012,
            "commit": "0123456789abcdef",
            "machine": "a machine",
            "figures": {"Loss over steps": f"figures/{key}.svg"} if i == 0 else {},
        }
        speed = {"against_torch": {"summary": "1.4 [1.3, 1.5] times as fast", "command": "python -m benchmarks"}}
        (folder / f"{key}.json").write_text(json.dumps({"measured": {"better": verdict}, "speed": speed}))
        if i == 0:
            svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="4" cx="4" cy="4"/></svg>'
            (folder / "figures" / f"{key}.svg").write_text(svg)


def lines(count: int, papers: dict[str, Record], seed: int = 0) -> Iterator[str]:
    """A reading list in Markdown: every tenth entry on a paper of the catalogue."""
    draw, known = random.Random(seed), list(papers.values())
    for i in range(count):
        if i % 40 == 0:
            yield f"## section {i // 40}"
        box = draw.choice("x  ")
        if i % 10 == 0 and known:
            paper = known[(i // 10) % len(known)]
            yield f"- [{box}] [{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        else:
            arxiv = f"https://arxiv.org/abs/{3000 + i % 900}.{i:05}"
            yield f"- [{box}] [Paper number {i}]({arxiv}) 📅 2026-01-{i % 28 + 1:02}"
        yield f"\t- it scales like $n^{i % 9}$, why?"


def library(path: Path, folder: Path, count: int, papers: dict[str, Record], public: bool | str = "true") -> Path:
    """A library with `count` notes of one published file, `folder`/list.md."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "list.md"
    source.write_text(f"---\ndg-publish: {public}\n---\n" + "\n".join(lines(count, papers)) + "\n")
    with Library(path) as opened:
        import_paths(opened, [source])
    return source


def comparison() -> dict[str, Any]:
    """As `Comparison.to_json` gives it: gpt, one change that is better and one that is not decided."""

    def row(name: str, shift: float, against: dict[str, Any] | None) -> dict[str, Any]:
        points = []
        for k in range(1, 61):
            mean = 3.3 + 2.2 * math.exp(-k / 9) + shift * min(1, k / 20)
            width = 0.03 + 0.08 * math.exp(-k / 6)
            points.append([k * 10_000, mean, mean - width, mean + width])
        return {
            "name": name, "id": "0123456789", "steps": 300, "tokens": 600_000, "flops": 1.6e12, "rate": 1.0,
            "scores": [3.3 + shift + d for d in (0.004, -0.003, 0.001, 0.002, -0.004)], "score": 3.3 + shift,
            "diverged": 0, "curve": points, "tokens_per_second": 20_000 + 1000 * shift,
            "cost": {"parameters": 372_000, "flops_per_step": 5e9, "tokens_per_step": 2048,
                     "peak_bytes": 31_000_000 + int(4e6 * (shift != 0)), "state_bytes_per_token": 768.0},
            "changes": [["model.norm", "LayerNorm()", "DyT()"]] if against else [], "against": against,
            "strip": {"factors": [0.25, 0.5, 1, 2, 4], "losses": [3.5, 3.4, 3.3, 3.4, None], "at_edge": False},
            "knob": None, "second": None,
        }  # fmt: skip

    def against(outcome: str, mean: float) -> dict[str, Any]:
        gain = {"value": 1.1, "low": 1.04, "high": 1.16, "position": "inside", "shown": "1.10 [1.04, 1.16]"}
        return {
            "mean": mean, "low": mean - 0.011, "high": mean + 0.012, "level": 0.95, "outcome": outcome,
            "sentence": outcome, "gains": {"flop": gain, "token": gain, "second": gain}, "flips": outcome != "better",
            "adjusted_p": 0.01, "detectable": 0.014, "margin": 0.01, "differences": [mean] * 5,
            "method": "paired t", "p_win": 0.9, "sign_flip_floor": 0.06, "shared": {"factor": 1, "difference": mean},
        }  # fmt: skip

    return {
        "command": "dx compare gpt gpt+dyt gpt+alibi --budget quick",
        "scale": "0.37M parameters, 0.6M tokens, the default text",
        "unit": "bits per byte",
        "plan": ["gpt against gpt+dyt and gpt+alibi", "with 5 pairs you can see a gain of ≥ 10 %"],
        "pairs": 5,
        "level": 0.95,
        "budget": {"asked": "quick", "shown": "1.6e+12 training FLOPs"},
        "seeds": {"tuning": 0, "pairs": [1, 2, 3, 4, 5]},
        "factors": [0.25, 0.5, 1, 2, 4],
        "ladder": {"budgets": [0.5, 1, 2], "losses": [[3.5, 3.3, 3.1], [3.51, 3.31, 3.12]]},
        "spent": {"scoring": {"runs": 15, "flops": 2.4e13, "seconds": 450}},
        "environment": {"cpu": "a machine"},
        "earlier": 0,
        "rows": [
            row("gpt", 0.0, None),
            row("gpt+dyt", 0.03, against("inconclusive", 0.003)),
            row("gpt+alibi", -0.12, against("better", -0.12)),
        ],
    }


def job(title: str, seed: int, steps: int = 300) -> Any:
    """What the store asks of a job while it runs."""
    value = {"recipe": {}, "seed": seed, "steps": steps, "rate": 1.0, "precision": "float32"}
    name = f"{title}-{seed}" if steps == 300 else f"{title}-{seed}-{steps}"
    made = SimpleNamespace(id=name, recipe=SimpleNamespace(title=title), steps=steps)
    made.to_json = lambda: value
    return made


def announcement(plan: str, *titles: str, steps: int = 300) -> dict[str, Any]:
    """As `Plan.announcement` gives it."""
    arms = [{"name": title, "title": title, "steps": [steps]} for title in titles]
    return {"plan": plan, "scale": "0.37M parameters", "runs": 12, "arms": arms}


def train(folder: Path, title: str, seed: int, step: int, loss: float, steps: int = 300) -> None:
    """A run of this process that has come to `step`."""
    store = Store(folder)
    work = job(title, seed, steps)
    store.claim(work, Worker.here())
    store.heartbeat(work, Worker.here(), step, loss, 18_000.0)
    store.close()


def site(folder: Path, papers: int = 40, notes: int = 60) -> Site:
    """A whole site in `folder`, with a stored comparison and without the trees of recipes."""
    records = catalogue(folder / "papers", papers)
    evidence(folder / "evidence", records)
    library(folder / "library.sqlite", folder / "notes", notes, records)
    store = Store(folder / "runs")
    store.remember("comparison", "gpt | gpt+dyt | gpt+alibi", comparison())
    store.close()
    return Site(
        papers=records,
        notes=Notes(folder / "library.sqlite", records),
        runs=Runs(folder / "runs"),
        trees=KnownTrees(folder / "cache", records),
        reports=Reports(folder / "cache"),
        evidence=folder / "evidence",
    )


def with_trees(folder: Path) -> Site:
    """The site of `site(folder)` with the real papers beside the made-up ones, and all their trees to be built."""
    records = [catalog.read(path) for path in sorted((folder / "papers").glob("*/*.py"))]
    every = {r.key: r for r in sorted([*records, *catalog.papers().values()], key=lambda r: (r.year, r.key))}
    return Site(
        papers=every,
        notes=Notes(folder / "library.sqlite", every),
        runs=Runs(folder / "runs"),
        trees=MadeTrees(folder / "cache", every),
        reports=Reports(folder / "cache"),
        evidence=folder / "evidence",
    )


class MadeTrees(Trees):
    """The trees of made-up papers in `papers` beside `folder`, and of the real ones: for measuring."""

    def _ask(self, request: Any) -> Any:
        script = Path(__file__).with_name("made_trees.py")
        return trees._ask(request, [sys.executable, str(script), str(self.folder.parent / "papers")])


class KnownTrees(Trees):
    """Answers without recipes: made-up papers cannot be imported."""

    def cached(self, key: str) -> dict[str, Any] | None:
        if key.endswith("3"):
            return {"missing": "it is no change to a recipe"}
        line = {"path": "model.norm", "a": "LayerNorm()", "b": "Twice(<b>)"}
        return {"a": "gpt", "b": f"gpt+{key}", "command": f"dx diff gpt gpt+{key}", "diff": [line]}

    def cached_compositions(self) -> dict[str, Any] | None:
        keys = list(self.papers)[:12]
        kinds = ("commutes", "commutes", "commutes", "composes", "replaces", "excludes")
        pairs = {f"{a} {b}": kinds[(i * j) % 6] for i, a in enumerate(keys) for j, b in enumerate(keys) if i < j}
        return {
            "base": "gpt",
            "keys": keys,
            "pairs": pairs,
            "orders": {pair: "forward" for pair, kind in pairs.items() if kind == "replaces"},
            "reasons": {f"{keys[0]} {keys[1]}": "one erases the other"},
        }

    def compositions(self) -> dict[str, Any]:
        return self.cached_compositions() or {}
