"""What a reader's sentences say: "X, but with Y", and questions left open."""

import re
from dataclasses import dataclass

from deltax.library.identifiers import from_url
from deltax.library.markdown import LONG
from deltax.library.model import Entry

_PREFIX = re.compile(
    r"^(?:it'?s|it is|this is|that's|basically|essentially|just|simply|sort of|kind of|really|mostly|like|"
    r"[-*+>]|\d+[.)]|"
    r"tl;?dr\s*:?|in short\s*:|idea\s*:|summary\s*:|(?:the|their|this) (?:model|method|network|"
    r"architecture|paper|approach) is|"
    r"(?:the )?(?:exact )?same (?:thing |idea |model |architecture |method |setup )?as|an? (?:variant|"
    r"version|extension) of|"
    r"(?:identical|similar|equal|close|equivalent)(?: idea| model| architecture| method)? to)[\s,]+",
    re.I,
)
_BUT = re.compile(
    r",?\s+(?P<link>but (?:with(?!out\b)\b)?|but\b|except(?: (?:for|that))?\b|\+(?=\s)|plus\b|minus\b|"
    r"without\b|with\b|whose\b|"
    r"in which\b|where\b|by\b|and\b|adds?\b|;)\s*",
    re.I,
)
_SAME = re.compile(
    r"^(?P<same>(?:the )?(?:exact )?same (?:thing |idea |model |architecture |method |setup )?as|"
    r"(?:identical|similar)(?: idea| model| architecture| method)? to)\s",
    re.I,
)
_SAME_MODEL = re.compile(
    r"^(?:the )?same (?P<base>[^,;.]{1,60}?)(?: (?:model|architecture|method|idea))?,? (?:but )?with (?P<change>.+)$",
    re.I,
)
_INSTEAD = re.compile(
    r"^instead of (?P<old>[^,()]{1,80}?)\s*(?:\((?P<base>[^()]{1,60})\))?,\s*(?:it )?(?:uses?|with|"
    r"takes?)?\s*(?P<new>.+)$",
    re.I,
)
_TAKES = re.compile(
    r"^(?:it |they |this )?(?:takes?|extends?|modif(?:y|ies)|starts? (?:with|from)|builds? (?:up)?on|is "
    r"built on|built on(?: top of)?|"
    r"based on|generali[sz]es?|improves?(?: up)?on)\s+(?P<base>[^,;:]{1,60}?)(?:,|;)?\s+(?:(?:and|by|but|to)\s+)?"
    r"(?P<change>(?:by |and |but |to )?(?:adds?|adding|swaps?|swapping|replac\w+|us(?:es|ing)|remov\w+|"
    r"drop\w*|chang\w+|"
    r"with(?:out)?|trains?|training|mak(?:es|ing)|lets?|lett?ing|combin\w+|insert\w*|merg\w+|condition\w*|scal\w+)\b.+)$",
    re.I,
)
_NAMED = re.compile(r"^(?P<name>[\w.\- ]{1,40}?)\s*(?:=|:|≈|~)\s+(?P<rest>.+)$")
_HEAD_NOUN = re.compile(r"^(?:an?|the)\s+", re.I)
_VERB = re.compile(
    r"\b(?:is|are|was|were|can|could|will|would|does|do|did|has|have|had|should|may|might|works?|makes?|uses?|looks?|want|"
    r"shows?|gives?|gets?|it|they|we|i|you|this|that|these|train(?:s|ed)?|tried|try|like)\b",
    re.I,
)
_NO_BASE = re.compile(
    r"(?i)^(?:not|all|any|every|nothing|everything|anything|some|both|only|loss|training|before|after|concurrent|compared|"
    r"results?|code|a survey|survey|the paper|paper|authors?|very|nice|good|great|cool|interesting|simple|"
    r"fast|slow|hard|"
    r"easy|works?|inference|evaluation|experiments?|pairs?|together|along|dealing|starting|combined|consistent|deals?)\b"
)
_NO_CHANGE = re.compile(
    r"(?i)^(?:takes?|needs?|requires?|works?|fails?|costs?|lacks?|seems?|looks?|remains?|cannot|nothing|"
    r"not|also|still|no(?:thing)? new|it\b|hard|easy|slow|fast|rare|worth|the (?:same|weights))"
)
_NAME = re.compile(r"[A-Z0-9][\w.+/\-]*|[a-z]+[\w.\-]*\d[\w.]*|\w+-\w*[A-Z\d]\w*")
_CLAUSE = re.compile(r"(?:it|they|we|i|you|this|that|these|there|he|she)(?:['’]\w+)?\s", re.I)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*\)")
_URL = re.compile(r"https?://\S+")
_MARKS = re.compile(r"\?+[)\]\"'”’*_]*")
_ASKS = re.compile(
    r"^\W*(?:but |and |so |also )?(?:why|what|how|where|when|which|who|is|are|do|does|did|can|could|should|would)\b",
    re.I,
)
_ENDS = re.compile(r"(?<=[.!?])[)\]\"'”’*_]*\s+")
_BREAKS = re.compile(r"(?<=[.!?])[)\]\"'”’*_]*\s+|;\s+")
_ANSWER = re.compile(r"^\W*(?:because|a:|answer|ans:|yes\b|no\b[,.]|if we believe)", re.I)
_LABEL = re.compile(r"^(?:open )?questions?\s*:\s*", re.I)
_ITEM = re.compile(r"^(?P<indent>[ \t]*)(?:(?:[-*+]|\d+[.)])[ \t]+)?(?P<text>.*)$")


@dataclass(frozen=True)
class Change:
    """`base`, but `change`. `words` is the whole clause as written."""

    base: str
    change: str
    words: str


@dataclass(frozen=True)
class Question:
    """A question in the reader's own words, at a line of the entry's text (from 1)."""

    text: str
    line: int
    answered: bool = False


def change(sentence: str, strict: bool = True) -> Change | None:
    """Base and change of "X, but with Y" and its kin. strict: prose, where "X, but Y" is such a sentence only when X
    reads as the name of a model; otherwise a cell that is likely to hold one. X has no verb and Y is no clause of its
    own ("but it needs a kernel")."""
    words = sentence.strip().rstrip("\\").strip()
    if len(words) > 2000:
        return None
    text = _unlisted(_LINK.sub(lambda m: m[1], words))
    text = re.sub(r"^tl;?dr\s*[:;]?\s*", "", text, flags=re.I)
    if match := _INSTEAD.match(text):
        base = match["base"] or match["old"]
        if match["base"] or not strict:
            return Change(base, f"{match['new'].rstrip('. ')} instead of {match['old']}", words)
        return None
    if (match := _TAKES.match(_strip(text))) and _is_base(match["base"], False, strict):
        changed = re.sub(r"^(?:and|by|but|to)\s+", "", match["change"])
        return Change(_strip(match["base"]), changed.rstrip(". "), words)
    if strict and (same := _SAME_MODEL.match(text)) and not re.search(r"(?i)\bas\b|\b(?:but|except)\b", same["base"]):
        return Change(same["base"], same["change"].rstrip(". "), words)
    named = _NAMED.match(text)
    for told in [named["rest"], text] if named and len(named["name"].split()) < 5 else [text]:
        if found := _but(told, words, strict):
            return found
    return None


_ALWAYS = ("but", "except")
_BETWEEN_NAMES = ("+", "plus", "minus", "without", "with", "whose", "in which", "where", ";")


def _but(text: str, words: str, strict: bool) -> Change | None:
    claims = bool(_PREFIX.match(text + " "))
    links = list(_BUT.finditer(text))
    first = next((m for m in links if m["link"].lower().strip().startswith(_ALWAYS)), None)
    for match in ([first] if first else []) + links:
        link = match["link"].lower().strip()
        before, after = text[: match.start()].strip(" ,"), text[match.end() :].strip()
        if link.startswith(_ALWAYS):
            if before.count("(") > before.count(")"):
                continue
            base = _strip(before)
            if (
                strict
                and not claims
                and (_NO_NAME.search(base) or re.search(r"(?i)[,;]|\b(?:in|from|to|for|than)\b", base))
            ):
                return None
            if _VERB.search(base) or _CLAUSE.match(after) or not after:
                return None
            explicit = link.startswith(("but with", "except"))
            part = re.match(r"(?i)(?:for|with|without|in|on|no|using|trained|applied)\b", after)
            named = bool(part) and base[:1].isupper() and len(base.split()) < 5 and not _NO_BASE.match(base)
            if strict and not explicit and not (claims or named or _is_base(base, claims, True)):
                return None
            if strict and not claims and (_NO_BASE.match(base) or _NO_CHANGE.match(after)):
                return None
            if strict and explicit and not claims and not _is_base(base, claims, True):
                return None
            return _made(base, after, words, link)
        if link in _BETWEEN_NAMES:
            variant = link in ("whose", "in which", "where")
            base = _strip(before)
            sure = claims or _HEAD_NOUN.match(before) or variant
            if _NO_NAME.search(base) or re.match(r"[\d(]", after) or (before != text[: match.start()] and link != ";"):
                continue
            if variant and not (claims or _HEAD_NOUN.match(before)):
                continue
            if link in ("+", "plus") and not (claims or all(_MODEL.fullmatch(word) for word in base.split())):
                continue
            if link == "minus" and not (claims or _only_name(base)):
                continue
            if link == "with" and match[0].startswith(",") and not claims:
                continue
            if not _is_base(base, bool(sure), True) or _VERB.search(base) or _CLAUSE.match(after) or not after:
                continue
            if link in ("with", "without") and not claims and not (_MODEL.fullmatch(base) and _describes(after, link)):
                continue
            if link == ";" and not (claims and _CHANGES.match(after)):
                continue
            kept = {"with": "with ", "without": "without ", "minus": "minus "}.get(link, "")
            return _made(base, kept + after, words, "")
    return None


_NO_NAME = re.compile(r"[|`*\"=<>{}\[\]$√]|^\W*\d+\b|\(.*\).*\(")
_MODEL = re.compile(r"(?=\w*[A-Z]\w*[A-Z\d])[A-Za-z][\w.]*(?:-[\w.]+)?|[A-Z]\w*-[A-Z\d][\w.-]*")
"""A word with two capitals or a digit, as models are called: LSTM, wav2vec, GPT-2. A word that opens a "
"sentence has one."""

_CHANGES = re.compile(r"(?i)(?:adds?|replac\w+|us(?:es|ing)|with(?:out)?|swaps?|drops?|removes?|trained)\b")


def _made(base: str, after: str, words: str, link: str) -> Change | None:
    base = re.sub(r"\s*\((?:v\d|[^()]{0,4})\)$", "", base).strip(" ,;:")
    after = re.sub(r"\s*\((?:[A-Z][\w.\- ]{1,30})\)[. ]*$", "", after) if link.startswith("but") else after
    after = after.rstrip(". ").strip()
    return Change(base, after, words) if base and after and len(base) <= 120 else None


def _only_name(base: str) -> bool:
    return bool(base) and all(_NAME.fullmatch(word) for word in base.split()) and len(base.split()) <= 4


def _describes(after: str, link: str) -> bool:
    """Whether what stands behind "with" is parts of a model, not a resource that it was trained on."""
    if re.search(r"(?i)\b(?:is|are|was|were|can|will|we|they)\b", after.split(";")[0]):
        return False
    if after[:1].isupper():
        return False
    return link == "without" or not re.match(
        r"(?i)(?:\d+|the|this|that|our|their|care|ease|time|two|three|many|several|respect|regard)\b", after
    )


def _is_base(base: str, claims: bool, strict: bool) -> bool:
    """Whether a text reads as the name of a model or method."""
    base = _strip(base)
    words = base.split()
    if not words or len(words) > 8 or _NO_BASE.match(base) or _VERB.search(base):
        return False
    if claims and len(words) <= 6:
        return True
    if len(words) > 6:
        return False
    opens = words[0].isalpha() and words[0][1:].islower() and len(words) > 1 and not _NAME.fullmatch(words[1])
    rest = words[1:] if opens else words  # a capital that opens the sentence makes no name
    return any(_NAME.fullmatch(word.strip("()'\"")) for word in rest)


def change_of(entry: Entry) -> Change | None:
    """The "X but with Y" of an entry: its summary in a table, else the first sentence of its text that is one."""
    if entry.origin.shape == "table" or entry.reference.name:
        first = entry.text.split("\n", 1)[0]
        if found := change(first, strict=False):
            return found
    for line in entry.text.split("\n"):
        if len(line) <= LONG:
            for sentence in _ENDS.split(line):
                if found := change(sentence):
                    return found
    return None


def questions(text: str) -> tuple[Question, ...]:
    """Questions in an entry's text: what stands under or after "questions:", and sentences that end in a question mark.
    One whose answer follows in the same line is answered."""
    found: list[Question] = []
    label_indent: int | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or len(line) > LONG:
            continue
        item = _ITEM.match(line)
        indent, words = len(item["indent"].expandtabs(4)), _plain(item["text"])
        if label_indent is not None and indent > label_indent:
            found += [Question(words, number)] if words else []
            continue
        label_indent = None
        if label := _LABEL.match(words):
            rest = words[label.end() :].strip()
            if rest:
                found.append(Question(rest, number))
            else:
                label_indent = indent
            continue
        found += _in_line(words, number)
    return tuple(found)


def _in_line(words: str, number: int) -> list[Question]:
    found, start = [], 0
    for match in _MARKS.finditer(words) if "?" in words else ():
        after = words[match.end() :]
        if after and not after[0].isspace() and after[0] not in "-–—":
            continue
        breaks = [m.end() for m in _BREAKS.finditer(words, start, match.start())]
        begin = breaks[-1] if breaks else start
        text = words[begin : match.end()].strip().lstrip("-–—>").strip()
        after = after.lstrip()
        doubled = match[0].startswith("??")
        if after and not after[0].isupper() and not doubled and not (_ASKS.match(text) and len(text.split()) > 2):
            continue
        if len(text) > 1:
            found.append(Question(text, number, bool(_ANSWER.match(after))))
        start = match.end()
    return found


def _plain(line: str) -> str:
    """Without marks of links; a line that is only a paper's link is a title, and asks nothing."""
    if "](" in line:
        whole = _LINK.fullmatch(line.strip().rstrip("\\").strip())
        if whole and from_url(whole[0][whole.end(1) + 2 : -1]):
            return ""
        line = _LINK.sub(lambda m: m[1], line)
    return _URL.sub("", line).strip().rstrip("\\").strip() if "://" in line else line.strip().rstrip("\\").strip()


def _unlisted(text: str) -> str:
    return re.sub(r"^(?:[-*+>]|\d+[.)])\s+", "", text.strip())


def _strip(text: str) -> str:
    while (match := _PREFIX.match(text)) and match.end() < len(text):
        text = text[match.end() :].strip()
    text = re.sub(r"^(?:an?|the)\s+(?=\S)", "", text, flags=re.I) if _HEAD_NOUN.match(text) else text
    return re.sub(r"\s+(?:paper|model|architecture|idea)$", "", text).strip(" '\"")
