"""Settings of all tests."""

import os

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Every call is checked against the shapes in its signature; a whole number will do for a float (PEP 484). The option
# --jaxtyping-packages, which does the same, cannot take a configured checker beside several packages.
SHAPED = ["deltax.parts", "deltax.papers", "deltax.kernels"]
jaxtyping.install_import_hook(SHAPED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# A shared machine may take longer over one example than Hypothesis allows.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture
def unchecked():
    """For tests of what is said of arguments that the signature rules out."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
