"""Which entry of an edited file is which entry of before."""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from typing import Any

from rapidfuzz import fuzz

from deltax.library.identifiers import normal_title

ALIKE = 70.0
"""Ratio (0 to 100) of two titles from which an entry left over on each side counts as one that was reworded."""

_MOST = 400


def pair(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[int, int]:
    """{index in new: index in old}, over flat values in file order: the same words first, then the same identifier, the
    same title, the same text, and last the titles most alike."""
    pairs: dict[int, int] = {}
    for key in (_words, _ids, _title, _text):
        _by_key(old, new, pairs, key)
    left_old = [i for i in range(len(old)) if i not in set(pairs.values())]
    left_new = [j for j in range(len(new)) if j not in pairs]
    if len(left_old) <= _MOST and len(left_new) <= _MOST:
        scored = [(fuzz.ratio(old[i]["title"], new[j]["title"]), -abs(i - j), i, j) for i in left_old for j in left_new]
        taken: set[int] = set()
        for score, _, i, j in sorted(scored, reverse=True):
            if score >= ALIKE and i not in taken and j not in pairs:
                pairs[j] = i
                taken.add(i)
    return pairs


def _by_key(old, new, pairs: dict[int, int], key: Callable[[dict[str, Any]], Hashable]) -> None:
    taken = set(pairs.values())
    places: dict[Hashable, deque[int]] = defaultdict(deque)
    for i, values in enumerate(old):
        if i not in taken and (k := key(values)):
            places[k].append(i)
    for j, values in enumerate(new):
        if j not in pairs and (k := key(values)) and places.get(k):
            pairs[j] = places[k].popleft()


def _words(values: dict[str, Any]) -> Hashable:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _ids(values: dict[str, Any]) -> Hashable:
    return tuple(sorted((scheme, value) for scheme, value, _ in values["ids"]))


def _title(values: dict[str, Any]) -> Hashable:
    return normal_title(values["title"])


def _text(values: dict[str, Any]) -> Hashable:
    return values["text"] if len(values["text"]) > 20 else None
