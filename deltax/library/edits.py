"""What a reader changes through Δx, kept apart from what the file says and laid over it."""

from typing import Any

from deltax.errors import UserError, nearest
from deltax.library.model import PRIORITIES, STATES
from deltax.library.tasks import symbol_of

FIELDS = ("title", "name", "authors", "year", "venue", "state", "priority", "dates", "text", "tags+", "tags-", "notes")
"""`dates` overrides date by date; `tags+` and `tags-` are added to and taken from the file's tags; `notes` are lines
that the reader adds below the file's text."""

WRITTEN = ("state", "priority", "dates", "text", "tags+", "tags-", "notes")
"""Those that can be written back into a file."""


def check(edits: dict[str, Any]) -> dict[str, Any]:
    """The edits, or a UserError that names the nearest field or value."""
    for key, value in edits.items():
        if key not in FIELDS:
            raise UserError(f"an entry has no field {key!r} to edit{nearest(key, FIELDS)}")
        if key == "state" and value not in STATES:
            raise UserError(f"no read state {value!r}{nearest(value, STATES)}: use one of {', '.join(STATES[1:])}")
        if key == "priority" and value not in PRIORITIES:
            raise UserError(f"no priority {value!r}{nearest(value, PRIORITIES)}: use one of {', '.join(PRIORITIES)}")
        if key == "year" and value is not None and not 1 <= value <= 9999:
            raise UserError(f"{value} is no year: write it with four digits")
    return edits


def apply(values: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    """An entry's flat values with the edits laid over them."""
    out = dict(values)
    for key in ("title", "name", "authors", "year", "venue", "priority", "text"):
        if key in edits:
            out[key] = edits[key]
    if "state" in edits:
        out["state"] = edits["state"]
        out["symbol"] = symbol_of(edits["state"]) if edits["state"] else ""
    if "dates" in edits:
        out["dates"] = {k: v for k, v in {**values["dates"], **edits["dates"]}.items() if v}
    if "tags+" in edits or "tags-" in edits:
        removed = set(edits.get("tags-", ()))
        out["tags"] = [t for t in dict.fromkeys([*values["tags"], *edits.get("tags+", ())]) if t not in removed]
    if edits.get("notes"):
        out["text"] = "\n".join([*([out["text"]] if out["text"] else []), *edits["notes"]])
    return out


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Edits after further edits."""
    out = {**old, **{k: v for k, v in new.items() if k not in ("dates", "tags+", "tags-", "notes")}}
    if "text" in new:
        out.pop("notes", None)
    if "dates" in new:
        out["dates"] = {**old.get("dates", {}), **new["dates"]}
    added = [t for t in [*old.get("tags+", ()), *new.get("tags+", ())] if t not in new.get("tags-", ())]
    removed = [t for t in [*old.get("tags-", ()), *new.get("tags-", ())] if t not in new.get("tags+", ())]
    for key, tags in (("tags+", added), ("tags-", removed)):
        if tags:
            out[key] = list(dict.fromkeys(tags))
        else:
            out.pop(key, None)
    if "notes" in new:
        out["notes"] = [*(() if "text" in new else old.get("notes", ())), *new["notes"]]
    return out


def conflicts(edits: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields that the reader edited here and that changed in the file too: the edit stays, and the reader is told."""
    found = [key for key in edits if key in old and key != "dates" and old[key] != new[key] and edits[key] != new[key]]
    dates = edits.get("dates", {})
    return found + [d for d in dates if old["dates"].get(d) != new["dates"].get(d) and new["dates"].get(d) != dates[d]]
