"""What each page shows, as plain dicts that JSON can hold."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from deltax import catalog
from deltax.catalog import ClaimRecord, Record
from deltax.errors import UserError, nearest
from deltax.home import home
from deltax.site import notes as notes_
from deltax.site.layout import ancestors, place
from deltax.site.notes import Notes
from deltax.site.reports import Reports, has_report
from deltax.site.runs import Runs
from deltax.site.trees import Trees

OUTCOMES = {
    "supported at this scale": "supported",
    "not seen at this scale": "unseen",
    "opposite at this scale": "opposite",
    "inconclusive": "unclear",
    "not testable here": "untestable",
}
STANDINGS = {
    "supported": "a measured claim is supported",
    "mixed": "measured claims disagree",
    "opposite": "a measured claim came out opposite",
    "unclear": "measured, not decided",
    "checked": "identities checked, nothing measured",
    "none": "no claim yet",
}


@dataclass(frozen=True)
class Site:
    """Where the pages get what they show. `evidence` is the folder of measured verdicts and figures."""

    papers: Mapping[str, Record] = field(default_factory=catalog.papers)
    notes: Notes = field(default_factory=lambda: Notes(home() / "library.sqlite", catalog.papers()))
    runs: Runs = field(default_factory=lambda: Runs(home() / "runs"))
    trees: Trees = field(default_factory=lambda: Trees(home() / "site"))
    reports: Reports = field(default_factory=lambda: Reports(home() / "site"))
    evidence: Path = field(default_factory=catalog.evidence_folder)

    @cached_property
    def parents(self) -> dict[str, list[str]]:
        """X's that have a file here."""
        return {key: [p for p in r.on if p in self.papers] for key, r in self.papers.items()}

    @cached_property
    def children(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {key: [] for key in self.papers}
        for key, parents in self.parents.items():
            for parent in parents:
                found[parent].append(key)
        return found

    def record(self, key: str) -> Record:
        if key not in self.papers:
            raise UserError(f"there is no paper {key!r}{nearest(key, self.papers)}")
        return self.papers[key]

    def stored(self, key: str) -> dict[str, Any]:
        """What `evidence/` holds of a paper."""
        path = self.evidence / f"{key}.json"
        return catalog.evidence(key) if not path.exists() else _json(path)


def genealogy(site: Site) -> dict[str, Any]:
    """The front page: every paper with its place, its X's and how well it stands."""
    laid, states = place(site.papers), site.notes.states()
    nodes = []
    for key, record in site.papers.items():
        stored = site.stored(key)
        x, y = laid.at[key]
        nodes.append(
            {
                "key": key,
                "title": record.title,
                "sentence": record.sentence,
                "year": record.year,
                "field": record.field,
                "kind": record.kind,
                "x": round(x, 3),
                "y": round(y, 3),
                "parents": site.parents[key],
                "standing": standing(record, stored),
                "marks": marks(record, stored),
                "read": states.get(key),
            }
        )
    return {
        "papers": nodes,
        "years": [list(year) for year in laid.years],
        "lanes": [list(lane) for lane in laid.lanes],
        "standings": STANDINGS,
        "states": notes_.STATES,
        "edges": sum(len(p) for p in site.parents.values()),
    }


def paper(site: Site, key: str) -> dict[str, Any]:
    """One paper: what it says, what it changes, what stands of it. Raises UserError for an unknown key."""
    record, stored = site.record(key), site.stored(key)
    brief = lambda k: {"key": k, "year": site.papers[k].year, "sentence": site.papers[k].sentence}
    older = ancestors(key, site.parents)
    items = [notes_.full(item, key) for item in site.notes.of(key)]
    return {
        "key": key,
        "title": record.title,
        "authors": record.authors,
        "year": record.year,
        "field": record.field,
        "kind": record.kind,
        "sentence": record.sentence,
        "prose": [p for p in record.prose.split("\n\n") if p],
        "link": record.link,
        "arxiv": record.arxiv,
        "module": record.module,
        "function": record.function,
        "use": use(record, site.papers),
        "file": f"{record.module.replace('.', '/')}.py",
        "code": code(record.change()),
        "diff": site.trees.cached(key),
        "claims": [_claim(record, c, stored) for c in record.claims],
        "speed": [_speed(name, found) for name, found in stored.get("speed", {}).items()],
        "figures": figures(site, key, stored),
        "parents": [brief(k) for k in site.parents[key]],
        "children": [brief(k) for k in site.children[key]],
        "ancestors": len(older),
        "descendants": len(ancestors(key, site.children)),
        "standing": standing(record, stored),
        "notes": items,
        "read": site.notes.states().get(key),
    }


def comparisons(site: Site) -> dict[str, Any]:
    """Every finished comparison in a line, and what runs now."""
    return {
        "comparisons": [_comparison_line(name, found) for name, found in site.runs.comparisons().items()],
        "live": site.runs.live(),
    }


def comparison(site: Site, name: str) -> dict[str, Any]:
    """A comparison as it was stored, with the axes that its curves may be drawn on."""
    found = site.runs.comparison(name)
    rows = []
    for row in found["rows"]:
        cost = row.get("cost") or {}
        speed, tokens, flops = row.get("tokens_per_second"), row.get("tokens"), row.get("flops")
        scale = {
            "tokens": 1.0,
            "seconds": 1 / speed if speed else None,
            "FLOPs": flops / tokens if flops and tokens else None,
        }
        rows.append({**row, "cost": cost, "scale": scale, "bytes": cost.get("peak_bytes")})
    title = " · ".join(row["name"] for row in rows)
    gains = [g["shown"] for row in rows if row.get("against") for g in row["against"]["gains"].values()]
    reasons = [why for why in dict.fromkeys(gains) if "(" in why]
    more = {"rows": rows, "name": name, "title": title, "reasons": reasons, "report": has_report(found)}
    return {**found, **more}


def report(site: Site, name: str) -> str:
    """A comparison's report, a page by itself. Raises UserError where there is none."""
    found = site.reports.of(site.runs.comparison(name))
    if found is None:
        raise UserError(f"comparison {name!r} was stored by an early deltax: compare again for a report")
    return found


def compositions(site: Site) -> dict[str, Any]:
    """The table of which deltas compose; `table` is None while nobody has worked it out."""
    return {"table": site.trees.cached_compositions()}


def library(site: Site) -> dict[str, Any]:
    """The reading list, a line for each note."""
    rows = [notes_.row(item, site.notes.paper(item)) for item in site.notes.items()]
    sections = list(dict.fromkeys(r["section"] for r in rows if r["section"]))
    counts = {state: sum(r["state"] == state for r in rows) for state in notes_.STATES}
    return {"rows": rows, "sections": sections, "states": notes_.STATES, "counts": counts}


def note(site: Site, number: int) -> dict[str, Any]:
    """One note. Raises UserError when there is none of this number."""
    item = site.notes.item(number)
    return {"note": notes_.full(item, site.notes.paper(item), _Wiki(site)), "states": notes_.STATES}


class _Wiki(Mapping[str, str]):
    """Where the targets of wiki links are, seen from a note's page: notes by title, papers by key."""

    def __init__(self, site: Site):
        self.site, self.named = site, site.notes.named()

    def __getitem__(self, name: str) -> str:
        if name in self.named:
            return f"../note/{self.named[name]}.html"
        return f"../paper/{self.site.papers[name].key}.html"

    def __iter__(self) -> Iterator[str]:
        return iter({**self.named, **self.site.papers})

    def __len__(self) -> int:
        return len({**self.named, **self.site.papers})


def standing(record: Record, stored: dict[str, Any]) -> str:
    """One of STANDINGS."""
    outcomes = {OUTCOMES.get(v.get("outcome", ""), "unclear") for v in stored.get("measured", {}).values()}
    if "supported" in outcomes:
        return "mixed" if "opposite" in outcomes else "supported"
    if outcomes - {"untestable"}:
        return "opposite" if "opposite" in outcomes else "unclear"
    return "checked" if any(c.kind != "measured" for c in record.claims) else "none"


def marks(record: Record, stored: dict[str, Any]) -> list[str]:
    """The kinds of evidence that stand: exact, parity, measured, speed."""
    kinds = {c.kind for c in record.claims} - {"measured"}
    kinds |= {kind for kind in ("measured", "speed") if stored.get(kind)}
    return [kind for kind in ("exact", "parity", "measured", "speed") if kind in kinds]


def use(record: Record, papers: Mapping[str, Record]) -> str:
    """The line that a reader would type next."""
    return catalog.use(record, papers)


def code(source: str) -> str:
    """Python with its words classed for the style sheet."""
    return highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))


def figures(site: Site, key: str, stored: dict[str, Any]) -> list[dict[str, str]]:
    """A paper's SVG figures: {"caption", "file"}, the file's path inside the evidence folder."""
    found: dict[str, str] = {}
    for verdict in [*stored.get("measured", {}).values(), *stored.get("speed", {}).values()]:
        for caption, file in (verdict.get("figures") or {}).items():
            if not str(file).lstrip().startswith("<") and figure(site, str(file)):
                found[str(file)] = caption
    for path in sorted((site.evidence / "figures").glob("*.svg")):
        if re.fullmatch(rf"{re.escape(key)}([._].*|--.*)?", path.stem):
            found.setdefault(f"figures/{path.name}", path.stem.removeprefix(key).strip("._-").replace("_", " "))
    return [{"caption": caption, "file": file} for file, caption in found.items()]


def figure(site: Site, file: str) -> Path | None:
    """A figure's path, if it is an SVG inside the evidence folder."""
    path = (site.evidence / file).resolve()
    inside = path.is_relative_to(site.evidence.resolve())
    return path if inside and path.suffix == ".svg" and path.is_file() else None


def _claim(record: Record, claim: ClaimRecord, stored: dict[str, Any]) -> dict[str, Any]:
    found = stored.get("measured", {}).get(claim.name, {}) if claim.kind == "measured" else {}
    interval = found.get("interval") or [None, None]
    command = f"dx verify {record.key} --claim {claim.name}"
    return {
        "name": claim.name,
        "kind": claim.kind,
        "says": claim.says,
        "paper": claim.paper,
        "peer": claim.peer,
        "outcome": found.get("outcome", ""),
        "mark": OUTCOMES.get(found.get("outcome", ""), "unmeasured"),
        "summary": found.get("summary", ""),
        "scale": found.get("scale", ""),
        "estimate": found.get("estimate"),
        "low": interval[0],
        "high": interval[1],
        "unit": found.get("unit", ""),
        "could_have_seen": found.get("could_have_seen"),
        "where": _where(found) or _where(stored),
        "command": found.get("command") or command,
    }


def _speed(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"name": name.replace("_", " "), "where": _where(found), **{k: found.get(k) for k in ("summary", "command")}}


def _where(found: dict[str, Any]) -> str:
    """Machine and commit of a measurement, as far as they were stored."""
    machine = found.get("machine") or ""
    if isinstance(machine, dict):
        named = {"device": "", "precision": "", "torch": "torch "}
        machine = ", ".join(f"{before}{machine[k]}" for k, before in named.items() if machine.get(k))
    commit = str(found.get("commit") or "")[:10]
    return ", ".join(part for part in (machine, commit and f"commit {commit}") if part)


def _comparison_line(name: str, found: dict[str, Any]) -> dict[str, Any]:
    first, *others = found["rows"]
    return {
        "name": name,
        "x": first["name"],
        "scale": found.get("scale", ""),
        "unit": found.get("unit", ""),
        "pairs": found.get("pairs"),
        "command": found.get("command", ""),
        "others": [
            {
                "name": row["name"],
                "outcome": row["against"]["outcome"],
                "sentence": row["against"]["sentence"],
                **{k: row["against"][k] for k in ("mean", "low", "high")},
                "gain": (row["against"]["gains"].get("flop") or row["against"]["gains"].get("token") or {}).get(
                    "shown"
                ),
            }
            for row in others
            if row.get("against")
        ],
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path.name} under evidence/ is not JSON ({error}); run 'dx verify {path.stem}' again"
        ) from None
