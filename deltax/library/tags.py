"""Headings as tags."""

import re
import unicodedata


def slug(heading: str) -> str:
    """A heading as an Obsidian tag: "sys/inference optimization" is sys/inference-optimization."""
    text = unicodedata.normalize("NFKC", heading).casefold()
    text = "".join(c if c.isalnum() or c in "/_-" else "-" for c in text)
    return re.sub(r"/+", "/", re.sub(r"-+", "-", text).replace("-/", "/").replace("/-", "/")).strip("-/")
