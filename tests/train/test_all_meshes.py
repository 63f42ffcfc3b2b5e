"""A sample of the recipes that train, another at each commit, loses on dp=2 and fsdp=2 as in one process."""

import pytest
from all_meshes import compared, job, sample, trained


@pytest.mark.parametrize("axes", ["dp=2", "fsdp=2"])
def test_a_mesh_loses_as_one_process(axes):
    assert compared({each: job(each) for each in sample(trained(), 4)}, axes) == {}


def test_what_a_mesh_treats_by_itself_loses_as_in_one_process():
    """Frozen numbers of no axes, which FSDP2 cannot shard; a key encoder and a queue that move once a step."""
    special = ("gpt+dyt+grpo(questions=2)", "simclr+moco(momentum=0.5, length=6)")
    assert compared({each: job(each, "loop.accumulate=2") for each in special}, "fsdp=2") == {}
