"""Entries about one paper are one work, however many files speak of it."""

from collections import defaultdict
from collections.abc import Iterable


def group(entries: Iterable[tuple[int, tuple[str, ...], str, bool]]) -> dict[int, int]:
    """{entry: work} for (entry, identity keys, normalised title, names several papers). A work is numbered by its
    first entry.

    Entries that share an identifier are one work. So are those of one normalised title, unless their identifiers say
    otherwise: two entries with different arXiv ids stay apart whatever they are called.
    """
    parent: dict[int, int] = {}
    keys: dict[int, set[str]] = {}
    by_key: dict[str, int] = {}
    by_title: dict[str, list[int]] = defaultdict(list)

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    def join(a: int, b: int) -> None:
        a, b = sorted((root(a), root(b)))
        if a != b:
            parent[b] = a
            keys[a] |= keys.pop(b)

    for entry, identity, title, several in entries:
        parent[entry] = entry
        keys[entry] = set(identity)
        for key in identity:
            join(entry, by_key.setdefault(key, entry))
        if len(title) > 2 and not several:
            by_title[title].append(entry)
    for members in by_title.values():
        distinct: list[int] = []
        for entry in members:
            found = next((other for other in distinct if not _apart(keys[root(entry)], keys[root(other)])), None)
            if found is None:
                distinct.append(entry)
            else:
                join(entry, found)
    return {entry: root(entry) for entry in parent}


def _apart(one: set[str], other: set[str]) -> bool:
    schemes = {key.partition(":")[0] for key in one} & {key.partition(":")[0] for key in other}
    return any(
        not {k for k in one if k.startswith(scheme + ":")} & {k for k in other if k.startswith(scheme + ":")}
        for scheme in schemes
    )
