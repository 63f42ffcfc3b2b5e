import subprocess

import numpy as np
import pytest

from deltax.lab.memory import peak_memory


def test_what_a_call_takes_is_what_its_process_grows_by():
    megabytes = peak_memory(np.full, 5 * 2**20, 1.0, warm=(10, 1.0)) / 2**20
    assert 39 < megabytes < 45


def test_a_call_that_fails_is_not_a_measurement():
    with pytest.raises(subprocess.CalledProcessError):
        peak_memory(np.full, -1, 1.0, warm=(10, 1.0))
