"""What a reader's sentences say: "X, but with Y", and questions left open."""

import re
from dataclasses import dataclass

from deltax.library.identifiers import from_url
from deltax.library.markdown import LONG
from deltax.library.model import Entry

_PREFIX = re.compile(
    r"^(?:it'?s|this is|that's|basically|essentially|just|simply|sort of|kind of|really|mostly|like|[-*+>]|\d+[.)]|"
    r"(?:the )?same (?:thing )?as|(?:identical|similar|equal|close) to)[\s,]+",
    re.I,
)
_BUT = re.compile(r",?\s+(?P<link>but (?:with(?!out\b)\b)?|but\b|except(?: (?:for|that))?\b)\s*", re.I)
_SAME = re.compile(r"^(?P<same>(?:the )?same (?:thing )?as|(?:identical|similar) to)\s", re.I)
_SAME_MODEL = re.compile(
    r"^(?:the )?same (?P<base>[^,;.]{1,60}?)(?: (?:model|architecture|method|idea))?,? (?:but )?with (?P<change>.+)$",
    re.I,
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|can|could|will|would|does|do|did|has|have|had|should|may|might|works?|makes?|uses?|looks?|want|"
    r"shows?|gives?|gets?|it|they|we|i|you|this|that|these)\b",
    re.I,
)
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
    """Base and change of "X, but with Y". strict: prose, where "X, but Y" alone is no such sentence; otherwise a
    cell that is likely to hold one. X has no verb and Y is no clause of its own ("but it needs a kernel")."""
    words = sentence.strip().rstrip("\\").strip()
    if len(words) > 2000:
        return None
    match = _BUT.search(words)
    if match is None:
        if strict and (same := _SAME_MODEL.match(_unlisted(words))):
            return Change(same["base"], same["change"].rstrip(". "), words)
        return None
    before, after, link = words[: match.start()], words[match.end() :], match["link"].lower().strip()
    before = _unlisted(before)
    claims_same = _stripped_same(before)
    base = _strip(before)
    if _VERB.search(base) or _CLAUSE.match(after):
        return None
    if strict:
        tied = link == "but with" or after.lower().startswith("without ") or claims_same
        if not tied or len(base.split()) > 10:
            return None
        after = _ENDS.split(after)[0]
    after = after.rstrip().rstrip(".").strip()
    return Change(base, after, words) if base and after else None


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


def _stripped_same(text: str) -> bool:
    while match := _PREFIX.match(text + " "):
        if _SAME.match(text + " "):
            return True
        text = text[match.end() :].strip()
    return False


def _strip(text: str) -> str:
    while (match := _PREFIX.match(text)) and match.end() < len(text):
        text = text[match.end() :].strip()
    return re.sub(r"\s+paper$", "", re.sub(r"^the\s+(?=.+\spaper$)", "", text, flags=re.I)).strip(" '\"")
