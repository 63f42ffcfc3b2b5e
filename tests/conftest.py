"""Settings of all tests."""

import os

import torch
from hypothesis import settings

# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine may take longer over one example than Hypothesis allows.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
