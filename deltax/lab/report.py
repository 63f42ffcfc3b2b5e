"""A comparison as one self-contained page, as Markdown, or as JSON, made from `Comparison.to_json()` without torch."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deltax import contract
from deltax.errors import UserError
from deltax.lab.numerals import millions
from deltax.whole import whole

if TYPE_CHECKING:
    from deltax.lab.comparison import Comparison
    from deltax.lab.store import Result

Record = dict[str, Any]
MINUS = "\u2212"
UNITS = {"token": "token", "flop": "FLOP", "second": "second"}


def save(comparison: "Comparison | Record", path: Path | str) -> Path:
    """Write a report, .html, .md or .json, whole or not at all. Raises UserError for other endings and full disks."""
    path = Path(path)
    check(path)
    return written({".html": html, ".md": markdown, ".json": as_json}[path.suffix](_record(comparison)), path)


def written(text: str, path: Path) -> Path:
    """A file with this text, whole or not at all."""
    try:
        with whole(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place for the report") from None
    return path


def check(path: Path | str, *endings: str) -> None:
    """Find out before an experiment, not after it. Raises UserError for other endings and closed folders.

    endings  of this report; by default those of a comparison's
    """
    path, known = Path(path), endings or (".html", ".md", ".json")
    if path.suffix not in known:
        raise UserError(f"this report ends in {' or '.join(known)}, unlike {path.name!r}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}; choose another place for the report")


def html(comparison: "Comparison | Record") -> str:
    """One page with its pictures inside; it asks nothing of the network, and suits light and dark."""
    from deltax.lab import figures  # loads matplotlib

    record = _record(comparison)
    drawn = {
        "Training loss: the mean over pairs, in a band from the lowest to the highest": figures.curves(record),
        "Each pair's difference, and the mean with its interval": figures.pairs(record),
        "Tuning, one seed that is never scored: dotted lines at each optimum, crosses diverged": figures.strips(record),
        "The ladder: how much more compute buys": figures.ladder(record),
    }
    environment = Environment(loader=PackageLoader("deltax.lab"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(
        record=record,
        results=results(record),
        legend=legend(record),
        costs=costs(record),
        verdicts=verdicts(record),
        checklist=checklist(record),
        colours=figures.COLOURS,
        figures=_inline(drawn),
        pictures={name: _inline(drawn) for name, drawn in record.get("pictures", {}).items()},
    )


def of_run(result: "Result", unit: str) -> str:
    """One run's page: its score, its training loss, and what it makes of held-out pictures."""
    from deltax.lab import figures

    job = result.job
    environment = Environment(loader=PackageLoader("deltax.lab"), autoescape=True, undefined=StrictUndefined)
    facts = [("held out", f"{_number(result.score, '.4f', 'diverged')} {unit}" if not result.diverged else "diverged")]
    facts += [("reads ahead", sentence) for sentence in contract.looks_ahead(job.recipe)]
    facts += [(name, _number(value, ".4g")) for name, value in result.metrics.items()]
    facts += [("run", f"{job.id}, seed {job.seed}, {len(result.losses)} steps, rate ×{job.rate:g}")]
    facts += [("spent", f"{result.tokens:,} tokens in {result.seconds:.0f} s")]
    facts += [(what, str(value)) for what, value in result.environment.items()]
    drawn = {"Training loss": figures.loss(result.losses), **result.pictures}
    return environment.get_template("run.html").render(title=job.recipe.title, facts=facts, figures=_inline(drawn))


def markdown(comparison: "Comparison | Record") -> str:
    """The table, the verdicts and the checklist, for a pull request."""
    record = _record(comparison)
    lines = [f"# {_md(_title(record))}", "", *(f"- {_md(line)}" for line in verdicts(record)), ""]
    for (head, *rows), below in ((results(record), legend(record)), (costs(record), "")):
        lines += [_line(head), _line(["---"] + ["---:"] * (len(head) - 1)), *map(_line, rows), ""]
        lines += [_md(below), ""] if below else []
    for row in record["rows"][1:]:
        lines += [f"**{_md(row['name'])}** changes", ""]
        lines += [f"- `{path}`: {_md(a)} → {_md(b)}" for path, a, b in row["changes"]] + [""]
    lines += ["## Checklist", "", *(f"- **{what}**: {_md(answer)}" for what, answer in checklist(record)), ""]
    return "\n".join([*lines, "```sh", record["command"], "```", ""])


def as_json(comparison: "Comparison | Record") -> str:
    return json.dumps(_record(comparison), indent=1, allow_nan=False) + "\n"


def verdicts(record: Record) -> list[str]:
    """One sentence for each Y, always with its scale."""
    said = []
    for row in record["rows"][1:]:
        text = f"{row['name']}: {row['against']['sentence']}, at {record['scale']}"
        if row["diverged"]:
            text += f"; {row['diverged']} of {record['pairs']} runs diverged"
        if row["against"]["flips"]:
            text += "; depends on the rate"
        text += "".join(f"; reads ahead: {sentence}" for sentence in row.get("looks_ahead", ()))
        said.append(text)
    x = record["rows"][0]
    return said + ([f"{x['name']}: {x['diverged']} of {record['pairs']} runs diverged"] if x["diverged"] else [])


def results(record: Record) -> list[list[str]]:
    """Head and rows: loss, difference with its interval, P(win) and the gains."""
    level = f"{100 * record['level']:.3g} %"
    head = ["recipe", record["unit"], f"difference [{level}]", "P(win)"]
    gains = next((list(r["against"]["gains"]) for r in record["rows"][1:] if r["against"]["gains"]), [])
    table = [[*head, *(f"gain per {UNITS[unit]}" for unit in gains)]]
    for row in record["rows"]:
        against = row["against"]
        cells = [row["name"], _number(row["score"], ".4f", "diverged")]
        if against:
            cells += [_difference(against), _number(against["p_win"], ".2f")]
            cells += [_gain(against["gains"][unit]) if unit in against["gains"] else "" for unit in gains]
        table.append(cells + [""] * (len(table[0]) - len(cells)))
    return table


def costs(record: Record) -> list[list[str]]:
    """Head and rows: what each recipe takes and holds, and the rate it was found to like."""
    head = ["recipe", "parameters", "FLOPs a token", "tokens a second", "peak memory", "state a token", "steps", "rate"]
    table = [head]
    for row in record["rows"]:
        cost = row["cost"]
        state = cost["state_bytes_per_token"]
        table.append(
            [
                row["name"],
                millions(cost["parameters"]),
                millions(cost["flops_per_step"] / cost["tokens_per_step"]),
                f"{row['tokens_per_second']:,.0f}",
                f"{cost['peak_bytes'] / 2**20:.1f} MiB",
                "none" if state is None else f"{state:,.0f} B",
                f"{row['steps']}",
                f"×{row['rate']:g}" + (" (edge)" if row["strip"]["at_edge"] else ""),
            ]
        )
    return table


def checklist(record: Record) -> list[tuple[str, str]]:
    """What the reproducibility checklists ask for, answered from the record (PROTOCOL.md D)."""
    rows = record["rows"]
    names = [row["name"] for row in rows]
    tried = sorted({factor for row in rows for factor in row["strip"]["factors"]})
    spent = record["spent"]
    total = {what: sum(phase[what] for phase in spent.values()) for what in ("runs", "flops", "seconds")}
    phases = ", ".join(f"{name} {p['runs']:.0f} runs, {p['flops']:.2g} FLOPs" for name, p in spent.items())
    first = next(row["against"] for row in rows[1:])
    pairs = record["pairs"]
    others = "no other comparison" if not record["earlier"] else f"{record['earlier']} other comparisons"
    answers = [
        ("Runs", f"{pairs} pairs; each shares data order, named init streams and evaluation sequences"),
        (
            "Seeds",
            f"{', '.join(map(str, record['seeds']['pairs']))} scored; {record['seeds']['tuning']} for tuning only",
        ),
        ("Intervals", f"{first['method']} at {100 * record['level']:.3g} %, evaluation error by document included"),
        ("Several candidates", f"verdicts by Holm's adjusted p over {len(rows) - 1}, intervals as they are"),
        ("Smallest p of a sign-flip test", f"{first['sign_flip_floor']:.2g} with {pairs} pairs"),
        ("Could have seen", "; ".join(f"{r['name']} {_seen(r['against'], record['unit'])}" for r in rows[1:])),
        ("Tuned", f"learning rates ×{', ×'.join(f'{f:g}' for f in tried)} for every recipe; the parabola's optimum"),
        (
            "Second knobs",
            "; ".join(f"{r['name']}: {r['knob']} ×{r['second']['best']:g}" for r in rows if r["knob"]) or "none",
        ),
        ("Shared rate, one seed", "; ".join(_shared(row) for row in rows[1:])),
        (
            "Budget",
            f"{record['budget']['shown']} a run ({record['budget']['asked']}); full schedules, the last loss only",
        ),
        (
            "Compute",
            f"{total['runs']:.0f} runs, {total['flops']:.3g} FLOPs, {total['seconds']:.0f} s of training: {phases}",
        ),
        (
            "Diverged",
            "; ".join(f"{r['name']} {r['diverged']}" for r in rows) if any(r["diverged"] for r in rows) else "none",
        ),
        ("Gains", _ladder(record, names[0])),
        ("Evaluation data", f"disjoint from training by document; {others} used it in this store"),
        ("Environment", ", ".join(f"{what} {value}" for what, value in record["environment"].items())),
    ]
    return answers


def _inline(drawn: dict[str, str | None]) -> dict[str, Markup]:
    """Drawings of ours by their captions, to stand in a page as they are."""
    return {caption: Markup(svg) for caption, svg in drawn.items() if svg}


def _ladder(record: Record, x: str) -> str:
    found = record["ladder"]
    if "budgets" not in found:
        return f"none, as there is no ladder: {found['missing']}"
    at = ", ".join(f"{budget:.3g}" for budget in found["budgets"])
    return f"{x} at {at} of the budget, {len(found['losses'])} seeds, own schedules; interpolated only"


def _seen(against: Record, unit: str) -> str:
    return "nothing, as a run diverged" if against["detectable"] is None else f"≥ {against['detectable']:.2g} {unit}"


def _shared(row: Record) -> str:
    shared, flips = row["against"]["shared"], row["against"]["flips"]
    tag = "; its sign depends on the rate" if flips else ""
    return f"{row['name']} {_number(shared['difference'], '+.4f', 'diverged')} at ×{shared['factor']:g}{tag}"


def _difference(against: Record) -> str:
    if against["mean"] is None or against["low"] is None or against["high"] is None:
        return "diverged"
    return f"{against['mean']:+.4f} [{against['low']:+.4f}, {against['high']:+.4f}]".replace("-", MINUS)


def legend(record: Record) -> str:
    """What the signs mean that this table of results has; empty where it has none."""
    shown = [cell[0] + cell[-2:] for row in results(record)[1:] for cell in row[4:] if cell]
    beyond = "with > or < a gain lies beyond the ladder" if any(cell[0] in "<>" for cell in shown) else ""
    open_end = "∞ is an end beyond it" if any("∞" in cell for cell in shown) else ""
    return "; ".join(filter(None, (beyond, open_end)))


def _gain(gain: Record) -> str:
    """As it is stored, short enough for a table of three; `legend` says the rest."""
    return gain["shown"].replace(" (beyond the ladder)", "").replace("inf]", "∞)")


def _number(value: float | None, form: str, missing: str = "none") -> str:
    return missing if value is None else format(value, form).replace("-", MINUS)


def _title(record: Record) -> str:
    x, *others = [row["name"] for row in record["rows"]]
    return f"{x} against {', '.join(others)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell if set(cell) <= set("-:") else _md(cell) for cell in cells) + " |"


def _md(text: str) -> str:
    """Plain words, whatever is in them: nothing of Markdown or HTML."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#~&" else c for c in text)
    return " ".join(escaped.split())


def _record(comparison: "Comparison | Record") -> Record:
    return comparison if isinstance(comparison, dict) else comparison.to_json()
