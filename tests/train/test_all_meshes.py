"""A sample of the recipes that train, another at each commit, loses on dp=2 and fsdp=2 as in one process."""

import pytest
from all_meshes import compared, job, sample, trained


@pytest.mark.parametrize("axes", ["dp=2", "fsdp=2"])
def test_a_mesh_loses_as_one_process(axes):
    assert compared({each: job(each) for each in sample(trained(), 8)}, axes) == {}
