"""Names of authors: shown as one text, with the parts that bibliographies keep apart."""

import re

_PARTICLE = re.compile(
    r"(?:(?:van|von|vom|zu|zum|zur|de|del|della|di|da|dos|das|do|du|des|der|den|ter|ten|te|la|le|el|al|bin|ibn|ben|af|av|"
    r"d['’]|'t)\s+|d['’]|al-)+"
)
_SUFFIX = re.compile(r"(?:Jr|Sr)\.?|I{2,3}|IV|VI{0,3}")
_INITIALS = re.compile(r"(?:[A-Z]\.?[ -]?){1,4}")
_GROUP = re.compile(
    r"(?i)^the\b|\b(?:team|group|collaboration|consortium|project|community|authors|committee|institute|laborator(?:y|ies)"
    r"|labs?|inc\.?|company|foundation|society|university|organization|organisation|research|network|initiative)$"
)


class Name(str):
    """A person's or a group's name, as it is shown. A group has `literal` alone, a person the other parts."""

    family: str
    given: str
    particle: str
    suffix: str

    def __new__(cls, family: str, given: str = "", particle: str = "", suffix: str = "") -> "Name":
        joined = " ".join(part for part in (given, particle, family) if part).replace("' ", "'").replace("’ ", "’")
        made = super().__new__(cls, " ".join(part for part in (joined, suffix) if part))
        made.family, made.given, made.particle, made.suffix = family, given, particle, suffix
        return made

    @property
    def literal(self) -> str:
        """The whole name where it has no parts."""
        return "" if self.given or self.particle or self.suffix else self.family

    @property
    def parts(self) -> tuple[str, str, str, str]:
        return self.family, self.given, self.particle, self.suffix

    @property
    def inverted(self) -> str:
        """`van der Maaten, Jr., Laurens`, as BibTeX writes it; a literal as it is."""
        head = f"{self.particle} {self.family}".strip()
        return ", ".join(part for part in (head, self.suffix, self.given) if part)


def shown(text: str) -> Name:
    """A name as text shows it, `Laurens van der Maaten` or `The OpenAI Team`, in parts as far as words can tell."""
    if isinstance(text, Name):
        return text
    text = " ".join(text.split())
    words = text.split(" ")
    if len(words) < 2 or _GROUP.search(text):
        return Name(text)
    suffix = words.pop() if len(words) > 2 and _SUFFIX.fullmatch(words[-1]) else ""
    first = next((n for n, word in enumerate(words[:-1]) if _particle(word)), len(words) - 1)
    stop = first
    while stop < len(words) - 1 and _particle(words[stop]):
        stop += 1
    return Name(" ".join(words[stop:]), " ".join(words[:first]), " ".join(words[first:stop]), suffix.rstrip(","))


def inverted(text: str) -> Name:
    """A name as bibliographies have it: `Family, Given`, `von Family, Jr., Given`, `Family, Given, Jr.`. Without a
    comma it is taken as it is shown."""
    parts = [" ".join(part.split()) for part in text.split(",")]
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return shown(parts[0] if parts else "")
    family, given, suffix = parts[0], parts[1], " ".join(parts[2:])
    if suffix and _SUFFIX.fullmatch(given):
        given, suffix = suffix, given
    match = _PARTICLE.match(family)
    particle = match[0].strip() if match and match.end() < len(family) else ""
    return Name(family[match.end() :].strip() if particle else family, given, particle, suffix)


def people(cell: str) -> tuple[Name, ...]:
    """Names in one text: `A. B and C. D`, `A B, C D & E F`, `Family, Given; Family, Given`. "et al." is no name."""
    cell = re.sub(r"(?i)[,;]?\s*(?:\bet\.? al\b\.?|\band others\b)\s*$", "", cell.strip().strip("."))
    both = re.split(r"\s+and\s+", cell)
    if len(both) > 1 and all(re.fullmatch(r"[^\s,]+,[^,]+", name.strip()) for name in both):
        return tuple(inverted(name) for name in both)
    cell = re.sub(r"\s+(?:and|&)\s+|,\s*(?:and|&)\s+", "; " if ";" in cell else ", ", cell)
    one = cell.partition(",")[0].strip()
    reversed_ = cell.count(",") == 1 and " " not in one and bool(one)
    pieces = cell.split(";") if ";" in cell or reversed_ else [piece.strip() for piece in cell.split(",")]
    if reversed_first(pieces):
        pieces[:2] = [f"{pieces[0]}, {pieces[1]}"]
    found = []
    for piece in pieces:
        piece = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", piece).strip().strip("*_").strip()
        if found and _SUFFIX.fullmatch(piece):
            before = found.pop()
            found.append(Name(before.family, before.given, before.particle, piece))
        elif found and _INITIALS.fullmatch(piece) and not found[-1].given:
            found.append(Name(found.pop().family, piece))
        elif piece and piece.casefold() not in ("others", "et al", "et al."):
            found.append(inverted(piece))
    return tuple(found)


def reversed_first(pieces: list[str], more: bool = False) -> bool:
    """Whether a list of names opens with one the other way round: `LeCun, Yann, Yoshua Bengio and Geoffrey Hinton`."""
    if len(pieces) < 2 or any(
        " " in piece and not re.fullmatch(r"[A-Z][\w-]+ [A-Z]\.?", piece) for piece in pieces[:2]
    ):
        return False
    if " " in pieces[0] or _INITIALS.fullmatch(pieces[1]):
        return False
    rest = pieces[2:]
    return all(" " in piece or "." in piece for piece in rest) if rest else more


def structured(authors: tuple[str, ...]) -> list[list[str]]:
    """Parts of the names whose text alone would be taken apart otherwise."""
    return [list(a.parts) for a in authors if isinstance(a, Name) and shown(str(a)).parts != a.parts]


def restored(authors: tuple[str, ...], parts: list[list[str]]) -> tuple[Name, ...]:
    """Names from their texts and what `structured` kept of them."""
    known = {str(name): name for name in (Name(*each) for each in parts if len(each) == 4)}
    return tuple(known.get(text) or _same(text) for text in authors)


def _same(text: str) -> Name:
    """The name with exactly this text, in parts where these give it back."""
    guess = shown(text)
    return guess if str(guess) == text else Name(text)


def _particle(word: str) -> bool:
    return bool(_PARTICLE.fullmatch(word + " ")) and word[0].islower()
