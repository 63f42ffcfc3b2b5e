"""What is held out whole: documents end to end, and which of them are for training, validation and the sealed end.

A document is a file, a row of a .jsonl or .parquet file, a topic of Python's manual. Loads no torch.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deltax.errors import UserError

SPLITS = ("train", "validation", "sealed")
SPAN = 4096

Document = tuple[str, bytes]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents laid end to end, and which of them are held out. Make one with `load` or `Corpus.of`.

    documents   uint8 (bytes,): the text of all documents, UTF-8, nothing between them
    offsets     int64 (n + 1,): document i is `documents[offsets[i]:offsets[i + 1]]`
    names       one name for each document: a path relative to the source, with the line or row where there are many
    keys        uint64 (n,): a hash of each document's content; it alone decides the split
    skipped     one sentence for each file that could not be read
    """

    name: str
    documents: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]
    keys: np.ndarray
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, documents: Iterable[Document], skipped: Iterable[str] = ()) -> "Corpus":
        """A corpus of (name, UTF-8 bytes) pairs. Blank documents are dropped, and NUL bytes: tasks separate with them.

        A single document, or one that holds more than nine tenths of the bytes (copies counted together), cannot be
        held out whole. Every document is then cut first, near each multiple of 4096 bytes, or of half of the longest
        one where that is less: after a paragraph if one ends in the quarter span before it, else after a line, else
        between characters; a tail under half a span joins the last. Each span counts as a document.

        Raises UserError when no text is left, or too little to hold some of it out.
        """
        whole = [(title, text.replace(b"\0", b"")) for title, text in documents]
        whole = [(title, text) for title, text in whole if text.strip()]
        if not whole:
            raise UserError(f"{name} is empty: give a file or folder with text in it")
        keys = [_key(text) for _, text in whole]
        copies = Counter()
        for key, (_, text) in zip(keys, whole, strict=True):
            copies[key] += len(text)
        if max(copies.values()) > 0.9 * copies.total():
            span = min(SPAN, -(-max(len(text) for _, text in whole) // 2))
            whole = [piece for title, text in whole for piece in _cut(title, text, span)]
            keys = [_key(text) for _, text in whole]
        if len(set(keys)) < 2:
            raise UserError(f"{name} is too small, or one passage repeated, to hold some out: give more text")
        sizes = [len(text) for _, text in whole]
        return cls(
            name=name,
            documents=np.frombuffer(b"".join(text for _, text in whole), dtype=np.uint8),
            offsets=np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))),
            names=tuple(title for title, _ in whole),
            keys=np.array(keys, dtype=np.uint64),
            skipped=tuple(skipped),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | np.integer) -> np.ndarray:
        """The bytes of one document, uint8."""
        return self.documents[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of the bytes and the boundaries between documents."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.documents)
        return digest.hexdigest()[:16]

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """The indices of the documents in train, validation and sealed, ascending, int64.

        A document's key puts it in train (90 %), validation (5 %) or sealed (5 %), so equal documents share a split
        and a new file moves no other. A corpus of few documents may need two repairs: the largest are moved to train
        until it has half of the bytes; while validation has less than 1 %, it takes the document nearest to 5 % in
        size, from sealed first. Train and validation are never empty; sealed may be.
        """
        keys, group = np.unique(self.keys, return_inverse=True)
        size = np.bincount(group, weights=np.diff(self.offsets))
        where = np.digitize(keys / 2.0**64, (0.90, 0.95))
        by_size = np.argsort(-size, kind="stable")
        for i in by_size:
            if size[where == 0].sum() >= size.sum() / 2:
                break
            where[i] = 0
        while size[where == 1].sum() < size.sum() / 100:
            spare = np.flatnonzero(where == 2)
            if not spare.size:
                spare = np.setdiff1d(np.flatnonzero(where == 0), by_size[:1])
            if not spare.size:
                break
            where[spare[np.argmin(np.abs(size[spare] - size.sum() / 20))]] = 1
        return {split: np.flatnonzero(where[group] == i) for i, split in enumerate(SPLITS)}


def _key(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def _cut(title: str, text: bytes, span: int) -> Iterator[Document]:
    start = 0
    for aim in [*range(span, len(text) - span // 2, span), len(text)]:
        end = aim
        if aim < len(text):
            floor = max(start, aim - span // 4)
            for mark in (b"\n\n", b"\n"):
                if (found := text.rfind(mark, floor, aim)) >= 0:
                    end = found + len(mark)
                    break
            else:
                while end > start and text[end] & 0xC0 == 0x80:  # not inside a character
                    end -= 1
        if end > start:
            yield f"{title}@{start}", text[start:end]
        start = end
