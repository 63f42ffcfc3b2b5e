"""One line of a list of papers, whatever its house style:

    [decorations] [date] [venue] title [(year)] [authors, venue, year] [labelled links] [summary]

A link whose words only say what kind of page it leads to ("paper", "pdf", "code", "Link to the paper") is a label: it
is never a title. What is neither title nor label nor authors nor venue is kept as the line's summary.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urlsplit

from deltax.library import days, names
from deltax.library.identifiers import from_text, from_url
from deltax.library.markdown import Inline, Part
from deltax.library.model import Link

_LABEL_WORDS = """
paper papers pdf pdfs arxiv preprint html abs abstract doi bib bibtex bibliography openreview acl anthology ps
link links here url uri website web webpage page pages homepage home site project code codes github gitlab
bitbucket repo repository implementation implementations impl official unofficial pytorch tensorflow tf jax
keras theano mxnet caffe torch matlab colab notebook model models weights checkpoint checkpoints data dataset
datasets benchmark blog blogpost post posts article medium video videos youtube talk talks slides slide poster
presentation demo demos tweet tweets twitter thread x reddit hn linkedin podcast note notes summary review
reviews discussion supp suppl supplementary supplement supplemental appendix material materials full text
version extended short long original source sources author authors' hf huggingface spaces space pwc
paperswithcode semantic scholar google alphaxiv ar5iv scihub download annotated publication publisher journal
conference proceedings proc nature science ieee xplore acm springer elsevier sciencedirect researchgate wiley
mlr pmlr cvf openaccess neurips nips icml iclr cvpr iccv eccv emnlp naacl aaai ijcai read more view details docs
doc documentation wiki zotero playground app press news explainer tutorial walkthrough report tech technical
release announcement live interactive readme slideslive bilibili zhihu companion archive mirror backup cached
file online free access chinese english translation website's interview workshop oral spotlight bibtex's 论文 代码
主页 项目 链接 视频 数据集 解读 原文 论文链接 代码链接 论文下载链接 项目主页 中文解读 论文解读 github链接 无 笔记
博客 开源代码 dataset's
"""
_LABELS = frozenset(_LABEL_WORDS.split())
"""Words that say what a link leads to."""

_SMALL = {
    "the",
    "a",
    "to",
    "of",
    "on",
    "in",
    "and",
    "for",
    "with",
    "my",
    "at",
    "by",
    "is",
    "their",
    "our",
    "this",
    "from",
}
_PAPER_LABELS = {
    *(
        "paper",
        "papers",
        "pdf",
        "arxiv",
        "preprint",
        "abs",
        "abstract",
        "openreview",
        "doi",
        "publication",
        "ieee",
        "acm",
    ),
    *("springer", "proceedings", "nature", "science", "acl", "anthology", "cvf", "pmlr", "mlr", "elsevier", "journal"),
}
_VENUES = re.compile(
    r"(?<![\w-])(?:CVPR|ICCV|ECCV|WACV|BMVC|ACCV|3DV|NeurIPS|NIPS|ICML|ICLR|AISTATS|UAI|COLT|COLM|ALT|ACL|"
    r"EMNLP|NAACL|EACL|"
    r"AACL|COLING|CoNLL|TACL|AAAI|IJCAI|AAMAS|ECAI|KDD|SIGKDD|WWW|TheWebConf|SIGIR|WSDM|CIKM|RecSys|ICDM|"
    r"SDM|ICDE|VLDB|PVLDB|"
    r"SIGMOD|PODS|SIGGRAPH(?: Asia)?|TOG|TVCG|TPAMI|T-PAMI|PAMI|IJCV|TIP|TMM|TNNLS|JMLR|TMLR|JAIR|CoRL|RSS|"
    r"ICRA|IROS|IJRR|"
    r"RA-L|RAL|T-RO|TRO|Interspeech|INTERSPEECH|ICASSP|TASLP|ISMIR|MICCAI|MIDL|IPMI|ISBI|MedIA|TMI|STOC|"
    r"FOCS|SODA|OSDI|SOSP|NSDI|"
    r"MLSys|SysML|ASPLOS|ISCA|HPCA|MICRO|SC|PPoPP|EuroSys|ATC|USENIX|FAST|CCS|S&P|NDSS|CHI|UIST|CSCW|IUI|"
    r"ICSE|FSE|ASE|ISSTA|PLDI|"
    r"POPL|ACM ?MM|ACM|IEEE|MM|PNAS|PLoS|eLife|CoRR|arXiv|ArXiv|ARXIV|bioRxiv|medRxiv|OpenReview|Preprint|Findings|"
    r"Nature(?: \w+){0,2}|Science(?: \w+){0,2}|Cell(?: \w+)?|Neuron|Neural Computation|Machine Learning|"
    r"Distill|Workshop)"
    r"(?![\w-])"
)
_YEAR = re.compile(r"(?<![\w./-])(?:19[4-9]\d|20[0-4]\d)(?![\w/-])")
_SHORT_YEAR = re.compile(r"['’](\d{2})\b")
_NUMBER = re.compile(r"(?:\d{1,3}[.)]|\[\d{1,3}\]|\(\d{1,3}\)|#\d{1,4}[.:)]?)\s+")
_SHORTCODE = re.compile(r":[a-z0-9_+-]{2,40}:\s*")
_DATE_HEAD = re.compile(
    r"(?:(?P<iso>\d{4}[-./]\d{1,2}(?:[-./]\d{1,2})?)|(?P<month>\d{1,2}/(?:19|20)\d{2})|"
    r"(?P<words>(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)[a-z]*\.?\s+(?:\d{1,2},?\s+)?(?:19|20)\d{2})|"
    r"(?P<year>(?:19[4-9]|20[0-4])\d))(?:\s*[:|,.–—-]\s*|\s+(?=[A-Z\[(*\"“]|$)|$)"
)
_BRACKETED = re.compile(r"(?P<open>[\[(【（<])(?P<inner>[^\[\]()【】（）<>]{1,60})[\])】）>]\s*[:.,–—-]?\s*")
_SEPARATOR = re.compile(r"\s+(?:[-–—|•·]|--|//|::|=>|->|→|⇒)\s+|(?<=\w)\s*—\s*|(?<=[\w)])\s*:\s+(?=$)")
_LEAD_SEPARATOR = re.compile(r"\s*(?:[-–—:|,;.•·]|--|//)+(?:\s+|$)")
_QUOTED = re.compile(r"[\"“]([^\"“”]{8,300}?)[.,]?[\"”]")
_INITIAL = re.compile(r"(?:[A-Z]\.[ -]?)+|[A-Z]{1,3}")
_FAMILY = re.compile(
    r"(?:(?:van|von|de|der|den|del|della|di|da|dos|du|la|le|el|al|bin|ibn|ter)\s+)*[A-ZÀ-ÖØ-ÞŁŚŽŠČ][\w'’\-]+"
)
_ET_AL = re.compile(r"\bet\.?\s+al\b\.?", re.I)
_LABEL_WORD = re.compile(
    r"(?i)^(title|paper|name|authors?|link|pdf|url|arxiv|venue|year|code|tl;?dr|summary|abstract)\s*:\s*$"
)
_PAPER_HOST = re.compile(
    r"arxiv|openreview|(?:^|\.)doi\.|proceedings|^papers?\.|aclanthology|aclweb|ieeexplore|dl\.acm|"
    r"springer|sciencedirect|jmlr|"
    r"neurips\.cc|nips\.cc|openaccess|thecvf|semanticscholar|researchgate|biorxiv|medrxiv|ssrn|(?:^|"
    r"\.)cell\.com|pnas|plos|"
    r"mdpi\.|wiley|frontiersin|aaai|ijcai|usenix|mlr\.press|hal\.|iclr\.cc|icml\.cc|pubmed|ncbi\.nlm|"
    r"tandfonline|sagepub|"
    r"academic\.oup|jstor|isca-speech|transformer-circuits|distill\.pub|citeseer|eprint\.iacr|"
    r"elifesciences|science\.org|"
    r"paperswithcode|bmva|ecva|roboticsproceedings|jair\.org|dblp|sciencemag|royalsociety|aps\.org|"
    r"iop\.org|projecteuclid"
)
_PAPER_PATH = re.compile(r"\.pdf\b|\.ps(?:\.gz)?$|/pdf/|/papers?/|/articles/|/pubs?/|/publications?/|/abs/|/doi/")
_ARCHIVE = re.compile(r"arxiv|corr|openreview|ieee|acm|preprint|biorxiv|medrxiv")
_NO_PAPER = re.compile(
    r"github\.com|gitlab\.|youtube\.|youtu\.be|twitter\.com|^x\.com|reddit\.|wikipedia|medium\.com|linkedin"
)


@dataclass
class Head:
    """What a line says. `style` is how the title stands: link, bold, quote, labels (plain words before labelled links)
    or plain; `papers` whether a link of the line leads to a paper, or the line names one."""

    title: str = ""
    name: str = ""
    authors: tuple[names.Name, ...] = ()
    year: int | None = None
    venue: str = ""
    noted: str = ""
    links: list[Link] = field(default_factory=list)
    mentions: list[Link] = field(default_factory=list)
    summary: str = ""
    style: str = "plain"
    papers: bool = False


@lru_cache(maxsize=8192)
def is_label(text: str) -> bool:
    """Whether a link's words only say what it leads to."""
    text = text.strip().strip("[](){}<>📄📃📑💻🔗🌐🎥📺🐦🤗▶️📝 ").strip()
    if not text:
        return True
    if len(text) > 60:
        return False
    if re.fullmatch(r"\d{1,3}|\^?\d+|[\W_]+", text) or re.fullmatch(
        r"(?i)(?:arxiv\s*:?\s*)?\d{4}\.\d{4,5}(?:v\d+)?", text
    ):
        return True
    bare = _SHORT_YEAR.sub(" ", _YEAR.sub(" ", _VENUES.sub(" venue ", text)))
    words = [word for word in re.split(r"[^\w']+", bare.casefold()) if word]
    said = [word for word in words if word not in _SMALL and not word.isdigit()]
    if not words:
        return True
    return bool(said) and all(word in _LABELS or word == "venue" for word in said) and (len(said) < 5)


@lru_cache(maxsize=8192)
def leads_to_paper(url: str, label: str = "") -> bool:
    """Whether a link leads to a paper: by an identifier, by its host or path, or by its label."""
    if from_url(url):
        return True
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    host = (parts.hostname or "").removeprefix("www.")
    if not host and re.search(r"\.pdf$", parts.path.lower()):
        return True
    if host and not _NO_PAPER.search(host) and (_PAPER_HOST.search(host) or _PAPER_PATH.search(parts.path.lower())):
        return True
    if host and _NO_PAPER.search(host):
        return bool(re.search(r"\.pdf$", parts.path.lower()))
    words = set(re.split(r"[^\w]+", label.casefold()))
    return is_label(label) and bool(words & _PAPER_LABELS or (_VENUES.search(label) and _any_year(label)))


@lru_cache(maxsize=4096)
def are_people(text: str) -> bool:
    """Whether a text is only names of people: `J. Doe et al.`, `Jane Doe, Max Moe and Ann Roe`."""
    text = text.strip().strip('.,;:*_()"“” ').strip()
    more = bool(_ET_AL.search(text))
    text = _ET_AL.sub("", text).strip(" ,;.&")
    if not text or len(text) > 600 or re.search(r"[?!:\"“”/\\\[\]{}<>=+]|\d", text):
        return False
    pieces = [p.strip() for p in re.split(r"\s*(?:,|;|&|\band\b|·|•)\s*", text) if p.strip()]
    if not pieces:
        return False
    if names.reversed_first(pieces, more):
        pieces[:2] = [f"{pieces[1]} {pieces[0]}"]
        if len(pieces) == 1:
            return more
    if more and len(pieces) == 1:
        return len(pieces[0].split()) <= 3 and pieces[0][0].isupper()
    good = initials = 0
    for n, piece in enumerate(pieces):
        words = piece.replace(".", ". ").split()
        if all(_INITIAL.fullmatch(w) for w in words) and n:  # `Doe, J., Moe, M.`
            good, initials = good + 2, initials + 1
            continue
        if names._SUFFIX.fullmatch(piece) and n:
            good += 1
            continue
        rest = [w for w in words if not _INITIAL.fullmatch(w)]
        if not 1 <= len(rest) <= 4 or len(words) > 5 or not _FAMILY.fullmatch(" ".join(rest[-1:])):
            return False
        if not all(
            _FAMILY.fullmatch(w) or w.lower() in ("van", "von", "de", "der", "den", "la", "le", "di", "da")
            for w in rest
        ):
            return False
        if any(w.lower() in _COMMON for w in rest):
            return False
        good += len(words) > 1 or more
        initials += len(rest) < len(words)
    return good >= max(1, len(pieces) - (1 if initials or more else 0)) and (len(pieces) > 1 or initials > 0 or more)


_COMMON_WORDS = """
learning networks network neural deep model models language attention transformer transformers vision image
video the a an of for with towards toward and in on to from by via using beyond survey review adaptive efficient
fast large scale generative diffusion training representation representations graph data robust self supervised
reinforcement optimization inference generation detection segmentation classification recognition policy world
convolutional recurrent adversarial gradient stochastic variational bayesian probabilistic sequence speech text
"""
_COMMON = frozenset(_COMMON_WORDS.split())
"""Words of titles that no name of a person is."""


_ONE_PERSON = re.compile(r"[A-Z][\w'-]+, [A-Z][\w'-]*\.?(?: [A-Z]\.)*")
"""`Coe, Carl`: a name the other way round, which words alone do not tell from two."""
_PERSON = re.compile(r"[A-Z][\w'’-]+(?: [A-Z]\.| (?:van|von|de|der|den))* [A-Z][\w'’-]+")


def parse(shown: Inline) -> Head:
    """A line taken apart."""
    head = Head()
    parts = _decorations(list(shown.parts), head)
    parts = _title(parts, head)
    _rest(parts, head)
    head.title = _clean(head.title, "" if head.style == "plain" and not head.links and not head.summary else ":")
    if not head.title and not head.links:
        head.title, head.summary = " ".join(shown.text.split()), ""
    if not head.title and head.name:
        head.title, head.name = head.name, ""
    text = shown.text
    head.papers = any(leads_to_paper(link.url, link.label) for link in head.links) or bool(
        from_text(text) if "arxiv" in text.lower() or "doi" in text.lower() or "10." in text else ()
    )
    return head


def informal(head: Head, shown: Inline) -> Head:
    """A line of a person's own list of things to read, where a few words around a link are one phrase: `[levine](..)
    has takes`. What reads as the title of a paper stays one."""
    words = shown.text.split()
    if not shown.parts or len(words) > 14 or is_title(head.title) or head.authors or head.venue:
        return head
    first = shown.parts[0]
    phrase = (
        head.style == "link"
        and head.summary
        and not _SEPARATOR.search(shown.text)
        and not _LEAD_SEPARATOR.match(shown.after)
    )
    label = first.kind == "link" and is_label(first.text) and re.match(r"\W*[a-z]", head.title)
    quoted = head.style == "quote" and head.summary[:1].islower() and not head.links
    if phrase or label or quoted:
        head.title, head.summary = " ".join(shown.text.split()), ""
    return head


def _decorations(parts: list[Part], head: Head) -> list[Part]:
    """Less what stands before the title: marks, numbers, dates, venues, badges, links that are labels."""
    while parts:
        part = parts[0]
        if part.kind == "text":
            text = part.text.lstrip(" \t\u00a0.,;|")
            if part.bold and len(parts) > 1 and re.fullmatch(r"\W*\d{1,4}\W*", text) and not _any_year(text):
                parts = parts[1:]
                continue
            if (
                part.bold
                and len(parts) > 1
                and (short := re.fullmatch(r"\[([^\[\]]{1,30})\]\W*", text))
                and not _badge(text, head)
            ):
                head.name, parts = head.name or short[1].strip(), parts[1:]
                continue
            if part.bold and not _badge(text, head):
                parts[0] = Part(part.kind, text, part.url, True, part.slanted)
                return parts
            left = _peel_text(text, head, last=len(parts) == 1)
            if part.bold and _badge(text, head):
                _take(text, head)
                left = ""
            if left:
                following = parts[1] if len(parts) > 1 else None
                link = following is not None and following.kind == "link"
                if link and re.fullmatch(r"[\[(\s]*", left) and (is_label(following.text) or left.count("[") > 1):
                    parts = parts[1:]
                    continue
                parts[0] = Part(part.kind, left, part.url, part.bold, part.slanted)
                return parts
        elif part.kind == "code" and (_badge(part.text, head) or len(parts) > 1):
            _take(part.text, head)
        elif part.kind == "image":
            pass
        elif part.kind == "link" and is_label(part.text) and not _last_link(parts):
            head.links.append(Link(part.url, part.text.strip().strip("[]")))
            parts = _closed(parts)
            continue
        else:
            return parts
        parts = parts[1:]
    return parts


def _last_link(parts: list[Part]) -> bool:
    """Whether nothing but this link stands in the line."""
    return not any(p.text.strip(" .,;()[]") for p in parts[1:])


def _closed(parts: list[Part]) -> list[Part]:
    """The parts after a link, less the bracket that closes around it."""
    rest = parts[1:]
    if rest and rest[0].kind == "text":
        text = re.sub(r"^\s*[\])]+\s*[,|/]?|^\s*[,|/]\s*", "", rest[0].text)
        rest = ([Part("text", text, "", rest[0].bold, rest[0].slanted)] if text.strip() else []) + rest[1:]
    return rest


def _peel_text(text: str, head: Head, last: bool) -> str:
    """A text less marks, numbers, dates and bracketed venues at its start."""
    for _ in range(12):
        before = text
        text = text.lstrip(" \t\u00a0*_~")
        while text and _mark(text[0]):
            text = text[1:].lstrip(" \t\u00a0")
        if match := _SHORTCODE.match(text):
            text = text[match.end() :]
        if match := _NUMBER.match(text):
            text = text[match.end() :]
        if (match := _DATE_HEAD.match(text)) and (match.end() < len(text) or not last):
            _take(match[0], head)
            text = text[match.end() :]
        if (match := _BRACKETED.match(text)) and _badge(match["inner"], head) and (match.end() < len(text) or not last):
            _take(match["inner"], head)
            text = text[match.end() :]
        if text == before:
            break
    return text


def _mark(char: str) -> bool:
    return unicodedata.category(char) in ("So", "Sk", "Cf", "Mn") or char in "★☆✓✔✗•→▶*‣▪◦·►\ufe0f\u200d"


_HONOURS = re.compile(
    r"(?i)\b(?:oral|spotlight|poster|workshops?|best paper|award|highlight|findings|main|long|short|"
    r"survey|track|in|on|at|"
    r"under review|submitted|accepted|preprint|demo|w|datasets?|and|benchmarks?|trans|proc)\b"
)


def _badge(text: str, head: Head) -> bool:
    """Whether a text is only a venue, a date or a kind of paper."""
    text = text.strip().strip("[](){}【】:.,-– ").strip()
    if not text or len(text) > 60:
        return False
    if _DATE_HEAD.fullmatch(text) or re.fullmatch(r"(?:19|20)?\d{2}[./-]\d{1,2}(?:[./-]\d{1,2})?|['’]\d\d", text):
        return True
    left = _SHORT_YEAR.sub("", _YEAR.sub("", _VENUES.sub("", text)))
    left = _HONOURS.sub("", left)
    return left != text and not re.sub(r"[\W\d_]+", "", left)


def _take(text: str, head: Head) -> None:
    """Year, day and venue of a badge."""
    text = text.strip().strip("[](){}【】:.,-–—| ").strip()
    day = days.written(text)
    if day and len(day) > 4:
        head.noted = head.noted or day
    year = _any_year(text)
    head.year = head.year or year
    if venue := _VENUES.search(text):
        words = _SHORT_YEAR.sub("", _YEAR.sub("", text)).strip(" ,.:;-–()[]\"“”'")
        head.venue = head.venue or (words if len(words) < 40 else venue[0])


def _any_year(text: str) -> int | None:
    if match := _YEAR.search(text):
        return int(match[0])
    if match := re.search(r"(?<!\d)((?:19|20)\d{2})[./-]\d{1,2}|/((?:19|20)\d{2})(?!\d)", text):
        return int(match[1] or match[2])
    if match := _SHORT_YEAR.search(text):
        return 2000 + int(match[1]) if int(match[1]) < 50 else 1900 + int(match[1])
    if (venue := _VENUES.search(text)) and (match := re.match(r"[ -]?(\d{2})(?!\d)", text[venue.end() :])):
        return 2000 + int(match[1]) if int(match[1]) < 50 else 1900 + int(match[1])
    return None


def _title(parts: list[Part], head: Head) -> list[Part]:
    """The title into `head`; what follows it is returned."""
    if not parts:
        return []
    part = parts[0]
    if part.kind == "link" and not part.bold and part.text.strip():
        return _linked(parts, head)
    if part.bold:
        return _bold(parts, head)
    if part.kind == "text" and part.slanted and len(part.text.split()) > 2:
        head.title, head.style = part.text, "quote"
        return parts[1:]
    if part.kind in ("wiki", "embed") or (part.kind == "link" and part.text.strip()):
        return _linked(parts, head)
    return _plain(parts, head)


def _linked(parts: list[Part], head: Head) -> list[Part]:
    part = parts[0]
    title = part.text.strip().strip("[]").strip() if part.text.strip().startswith("[") else part.text.strip()
    head.style = "link" if part.kind == "link" else part.kind
    if part.kind == "link":
        head.links.insert(0, Link(part.url, "" if part.text == part.url else title))
    inner = _peel_text(title, head, last=True) if part.kind == "link" else title
    _trailing_year(inner or title, head)
    head.title = inner or title
    if _NUMBER.match(part.text) is None and head.title != title and not head.title:
        head.title = title
    return parts[1:]


def _bold(parts: list[Part], head: Head) -> list[Part]:
    """A bold run: the title, or a label or short name before it."""
    run = [parts[0]]
    while len(run) < len(parts) and parts[len(run)].bold:
        run.append(parts[len(run)])
    rest = parts[len(run) :]
    text = "".join(p.text for p in run)
    if _LABEL_WORD.match(text) or (_LABEL_WORD.match(text.rstrip() + ":") and rest and rest[0].text.startswith(":")):
        if rest and rest[0].kind == "text":
            rest = [Part("text", rest[0].text.lstrip(" :")), *rest[1:]]
        return (
            _title([p for p in rest if p.text.strip()] and rest, head)
            if text.lower().startswith(("title", "paper"))
            else rest
        )
    for p in run:
        if p.kind == "link":
            label = is_label(p.text) and len(run) > 1
            head.links.append(Link(p.url, p.text.strip() if label else _strip_title(text)))
            if label:
                text = text.replace(p.text, "", 1)
    head.style = "link" if any(p.kind == "link" for p in run) else "bold"
    peeled = _peel_text(text.strip(), head, last=True)
    if year := re.match(r"((?:19|20)\d{2})[ :,.-]+(?=\S)", peeled):
        head.year, peeled = head.year or int(year[1]), peeled[year.end() :]
    head.title = _trailing_year(peeled or text, head)
    after = rest[0].text if rest and rest[0].kind == "text" else ""
    colon = text.rstrip().endswith(":") or after.lstrip().startswith(":")
    if colon and len(head.title.split()) <= 2:
        follow = after.lstrip(" :")
        whole = [Part("text", follow, "", False, rest[0].slanted), *rest[1:]] if after else rest
        trial = Head()
        left = _title([p for p in whole if p.text] or [], trial) if whole and (follow or not after) else []
        if trial.title and is_title(trial.title) and (trial.style != "plain" or trial.links or _links(left)):
            short = head.title.rstrip(": ")
            head.name = short
            head.title = trial.title if trial.style == "link" else f"{short}: {trial.title}"
            head.links += trial.links
            head.authors, head.year = head.authors or trial.authors, head.year or trial.year
            head.venue = head.venue or trial.venue
            head.style = trial.style if trial.style == "link" else "bold"
            return left
    return rest


def _links(parts: list[Part]) -> bool:
    return any(p.kind == "link" for p in parts)


def is_title(text: str) -> bool:
    """Whether words read as a title: at least three, most of the long ones with a capital, and no sentence."""
    words = [w for w in re.findall(r"[^\W\d_][\w'’-]*", text)]
    long = [w for w in words if len(w) > 3]
    if len(words) < 3 or len(text) > 250 or re.search(r"[.!]\s+[A-Z]", text):
        return False
    return sum(w[0].isupper() for w in long) >= 0.6 * max(len(long), 1)


def _plain(parts: list[Part], head: Head) -> list[Part]:
    """A title in plain words: up to labelled links, a year in brackets, a separator, or the authors."""
    run: list[Part] = []
    rest = list(parts)
    while rest:
        part = rest[0]
        if part.kind == "image":
            rest.pop(0)
            continue
        if part.kind == "link":
            before = "".join(p.text for p in run)
            bracketed = before.rstrip().endswith(("[", "("))
            if is_label(part.text) or part.text == part.url or are_people(_less_year(part.text)):
                break
            if bracketed and "]" in "".join(p.text for p in rest[1:2])[:2]:
                break
            whole = before.strip(" .,;:|-–—")
            if (
                are_people(_less_year(whole))
                or _badge(whole, head)
                or (before.rstrip().endswith(":") and len(before.split()) < 4)
            ):
                _take_rest(whole, head)
                return _linked(rest, head)
        if part.kind == "code" and run and _badge(part.text, head):
            break
        if part.bold and run:
            before = "".join(p.text for p in run).strip(' "“”')
            if are_people(_less_year(before)) or _ONE_PERSON.fullmatch(_less_year(before).strip(" .")):
                _take_rest(before, head)
                return _bold(rest, head)
            if _badge(part.text, head) or not is_title(part.text):
                break
        if part.slanted and part.kind == "text" and run:
            before = "".join(p.text for p in run).strip(" .,;:")
            if len(part.text.split()) > 2 and are_people(_less_year(before)):
                _take_rest(before, head)
                head.title, head.style = part.text.strip(" .,"), "quote"
                return rest[1:]
            if _badge(part.text, head) or are_people(part.text) or re.search(r"[,.(]\s*$", run[-1].text):
                break
        run.append(part)
        rest.pop(0)
    text = "".join(p.text for p in run)
    tail_links = _links(rest)
    head.style = "labels" if tail_links else "plain"
    if match := _QUOTED.search(text):
        before = text[: match.start()].strip(" ,.:;-–")
        if not before or are_people(_less_year(before)) or _badge(before, head):
            _take_rest(before, head)
            head.title, head.style = match[1], "quote"
            return [Part("text", text[match.end() :]), *rest]
    title, left = _cut(text, head, tail_links)
    links = [p for p in run if p.kind in ("link", "wiki")]
    for p in links:
        if p.kind == "link":
            head.links.append(Link(p.url, "" if p.text == p.url else p.text.strip()))
    head.title = title
    if not title and rest and rest[0].kind == "link":
        if is_label(rest[0].text) and rest[0].text != rest[0].url:
            return rest
        return _linked(rest, head)
    return ([Part("text", left)] if left.strip() else []) + rest


def _less_year(text: str) -> str:
    return re.sub(r"[,.]?\s*\(?(?:19|20)\d{2}[a-z]?\)?[.,:]?\s*$", "", text.strip())


def _take_rest(text: str, head: Head) -> None:
    """Authors and year that stand before a title."""
    year = _any_year(text)
    head.year = head.year or year
    people = _less_year(text)
    if are_people(people) or _ONE_PERSON.fullmatch(people.strip(' ."“')):
        head.authors = head.authors or names.people(people.strip(' ."“'))
    elif _badge(text, head):
        _take(text, head)


def _cut(text: str, head: Head, tail_links: bool) -> tuple[str, str]:
    """A plain run as title and the rest."""
    bare = text.rstrip(" [(")
    title, left = _split_title(bare, head, tail_links)
    return title, left + text[len(bare) :]


def _split_title(text: str, head: Head, tail_links: bool) -> tuple[str, str]:
    sentences = _sentences(text)
    if len(sentences) > 1 and are_people(_less_year(sentences[0])):  # Authors (2017). Title. Venue.
        _take_rest(sentences[0], head)
        return sentences[1].rstrip("."), " ".join(sentences[2:])
    if (
        match := re.match(
            r"(?P<who>[^()]{3,200}?)[,.]?\s*\((?P<year>(?:19|20)\d{2})[a-z]?\)[.,:]?\s+(?P<title>[^.]{8,})", text
        )
    ) and are_people(match["who"]):
        _take_rest(match["who"], head)
        head.year = int(match["year"])
        title, _, left = match["title"].partition(". ")
        return title.rstrip("."), left + text[match.end() :]
    cuts = [len(text)]
    for match in re.finditer(r"[,;:]?\s*[(\[【]([^()\[\]【】]{2,60})[)\]】]", text):
        if (_badge(match[1], head) or are_people(match[1])) and match.start() > 3:
            cuts.append(match.start())
            break
    if match := _SEPARATOR.search(text):
        left, right = text[: match.start()], text[match.end() :]
        whole = is_title(right) and not are_people(right) and not _VENUES.match(right)
        if not (whole and (len(left.split()) == 1 or tail_links)):
            cuts.append(match.start())
    if match := re.search(r"[,;:.]?\s*[(\[]?\s*\b(?:doi|arxiv)\s*:\s*\d", text, re.I):
        cuts.append(match.start() or len(text))
    if (match := re.search(r"(?<=\w)\s{2,}(?=[A-Z])", text)) and len(text) - match.end() > 60:
        cuts.append(match.start())
    if "\n" in text:
        cuts.append(text.index("\n"))
    end = min(cuts)
    for match in re.finditer(r"(?:,|;|\.|\s[-–—]|\sby)\s+", text[:end]):
        said = text[match.end() :]
        upto = re.split(r"\s*[(\[]|\.\s+(?=[A-Z])|\s[-–—]\s", said)[0]
        said_by = re.sub(r"[,.]?\s*(?:19|20)\d{2}.*$", "", _VENUES.split(upto)[0]).strip(" ,.;")
        if match.start() > 3 and (are_people(said_by) or (not said_by and _badge(upto, head))):
            end = match.start()
            break
    if len(sentences) > 1 and len(sentences[0]) < end and len(sentences[0]) > 3:
        end = min(end, len(sentences[0].rstrip()))
    return text[:end], text[end:]


def _sentences(text: str) -> list[str]:
    """Sentences; a full stop behind an initial, a number or "et al" ends none."""
    found, start = [], 0
    for match in re.finditer(r"\.\s+(?=[A-Z\"“(])", text):
        before = text[start : match.start()]
        if re.search(r"(?:^|[\s.,-])[A-Z]$", before) or re.search(
            r"\b(?:vs|cf|al|e\.g|i\.e|No|Vol|pp|Jr|Sr|St|Dr)$", before
        ):
            continue
        found.append(text[start : match.start() + 1])
        start = match.end()
    return [*found, text[start:]]


def _rest(parts: list[Part], head: Head) -> None:
    """What follows the title: labelled links, authors, venue, year, and else the summary."""
    words: list[str] = []
    separated = False
    for part in parts:
        if part.kind == "link":
            label = part.text.strip().strip("[]").strip()
            here = Link(part.url, "" if part.text == part.url else label)
            so_far = "".join(words)
            bracketed = so_far.rstrip().endswith(("[", "("))
            people = _less_year(part.text)
            if is_label(part.text) or part.text == part.url or (bracketed and not separated) or are_people(people):
                head.links.append(here)
                if are_people(people):
                    head.authors = head.authors or names.people(people)
                    head.year = head.year or _any_year(part.text)
                elif not _ARCHIVE.fullmatch(label.casefold()) and not from_text(label) and _badge(label, head):
                    _take(label, head)
                words.append("\x00")
            else:
                (head.mentions if separated or head.links else head.links).append(here)
                words.append(part.text)
        elif part.kind == "image":
            continue
        else:
            if part.kind == "text" and re.search(r"[.!?]\s+\w|\s[-–—:]\s|\n", part.text) and part.text.strip():
                separated = True
            if (part.kind == "code" or part.slanted) and _badge(part.text, head):
                _take(part.text, head)
                continue
            if part.kind == "code" and _any_year(part.text) and len(part.text.split()) < 6:
                head.year = head.year or _any_year(part.text)
                head.venue = head.venue or _less_year(part.text).strip(" ,.")
                continue
            if part.slanted and not head.authors and _PERSON.fullmatch(part.text.strip(" .,*_")):
                head.authors = (names.shown(part.text.strip(" .,*_")),)
                continue
            if part.slanted and are_people(_less_year(part.text)):
                head.authors = head.authors or names.people(_less_year(part.text))
                head.year = head.year or _any_year(part.text)
                continue
            if part.slanted and _VENUES.search(part.text) and len(part.text.split()) < 9:
                head.year = head.year or _any_year(part.text)
                head.venue = head.venue or _less_year(part.text).strip(" ,.")
                continue
            words.append(f"`{part.text}`" if part.kind == "code" else part.text)
    text = "".join(words)
    text = re.sub(r"[\[(]*\s*\x00\s*(?:[\])]+)?", "\x00", text)
    text = re.sub(r"(?:\s*[,|/·•;&]?\s*\x00)+", "\x00", text)
    pieces = [_facts(piece, head) for piece in text.split("\x00")]
    head.summary = " ".join(piece for piece in pieces if piece)
    if head.year is None and (len(head.summary) < 80 or head.authors):
        head.year = _any_year(head.summary[:240])


def _facts(text: str, head: Head) -> str:
    """A stretch behind the title less the authors, venue and year it names; what is left is the summary."""
    text = text.strip()
    for _ in range(6):
        text = _LEAD_SEPARATOR.sub("", text, count=1) if _LEAD_SEPARATOR.match(text) else text
        if match := re.match(r"[(\[【]([^()\[\]【】]{2,200})[)\]】]\s*[,.;:]?\s*", text):
            inner = match[1].strip()
            if _badge(inner, head):
                _take(inner, head)
                text = text[match.end() :]
                continue
            people = _less_year(_VENUES.split(inner)[0]).strip(" ,.;")
            if are_people(people):
                head.authors = head.authors or names.people(people)
                _take(inner, head)
                text = text[match.end() :]
                continue
        break
    if not text.strip(" .,;:|-–—()[]"):
        return ""
    if match := re.match(r"[Bb]y ([A-Z][\w'-]+)(?= *$|[,.]\s)", text):
        head.authors = head.authors or (names.shown(match[1]),)
        return text[match.end() :].strip(" ,.")
    by = re.sub(r"^(?:by|By|authors?:|Authors?:)\s+", "", text)
    pieces = [
        by,
        *(
            by[: m.start()]
            for m in re.finditer(
                r"(?<![\s.-][A-Z])(?<!^[A-Z])[.;]\s+|\s[-–—|]\s|,\s+(?=[*_]?(?:In\s|\d{4}))|\s*\n\s*|\s*[(\[]", by
            )
        ),
    ]
    for piece in sorted(set(pieces), key=len, reverse=True):
        left = by[len(piece) :]
        who = _less_year(_VENUES.split(piece)[0]).strip(" ,.;*_([")
        whole = piece.strip(" .,;*_")
        if are_people(who) and not re.search(r"\w", _less_badge(piece[len(who) :])):
            head.authors = head.authors or names.people(who)
            _take(piece[len(who) :] or "", head)
            return _facts(left, head) if len(left) < len(text) else left.strip()
        if _badge(whole, head):
            _take(whole, head)
            return _facts(left, head) if len(left) < len(text) else left.strip()
    return text.strip(" \t|")


def _less_badge(text: str) -> str:
    text = _ET_AL.sub("", _SHORT_YEAR.sub("", _YEAR.sub("", _VENUES.sub("", text))))
    return re.sub(r"\b(?:et al|In|in|and|others)\b|\d", "", text)


def _trailing_year(title: str, head: Head) -> str:
    """A title less the year or venue in brackets at its end."""
    match = re.search(r"\s*[(\[]([^()\[\]]{2,40})[)\]]\s*$", title)
    if match and _badge(match[1], head) and match.start() > 3:
        _take(match[1], head)
        return title[: match.start()]
    return title


def _strip_title(text: str) -> str:
    return text.strip().strip("*").strip()


def _clean(title: str, ends: str = ":") -> str:
    title = " ".join(title.replace("\x00", " ").split()).strip()
    if title.startswith("[") and title.endswith("]") and title.count("[") == 1:
        title = title[1:-1]
    title = title.strip(" \t|–—").rstrip(" ,;-" + ends).lstrip(" ,;:")
    if title.count('"') == 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    if title.endswith(".") and not re.search(r"(?:\.\.\.|\b[A-Z]\.|\bal\.)$", title):
        title = title[:-1]
    return title
