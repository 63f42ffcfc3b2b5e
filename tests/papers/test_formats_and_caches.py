"""What the claims of FlashInfer, its pages, float formats and the roofline leave open: edges and bad input."""

import pytest
import torch

from deltax import UserError
from deltax.papers.systems.flashinfer import ASKED, Chunk, alone, drawn, flashinfer, plan, shared
from deltax.parts.pages import PagedState, Pages


def run(claims, *names):
    for name in names:
        getattr(claims, name).check()
