"""A file is whole or not there."""

import pytest

from deltax.whole import whole


def test_a_file_is_as_it_was_until_all_is_written(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with whole(path) as scratch:
        scratch.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt(), ValueError("wrong")])
def test_what_fails_leaves_no_trace(tmp_path, fault):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(type(fault)), whole(path) as scratch:
        scratch.write_text("half")
        raise fault
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
