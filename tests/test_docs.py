"""The examples in the documentation run."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from deltax import catalog, cli

DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"
CONTRIBUTING = DOCS.parent / "CONTRIBUTING.md"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_guide_runs():
    names: dict = {}
    for block in blocks(DOCS / "guide.md", "python"):
        exec(compile(block, "guide.md", "exec"), names)


@pytest.mark.parametrize("line", [line for b in blocks(DOCS / "guide.md", "console") for line in b.splitlines()])
def test_the_commands_of_the_guide_run(line, capsys):
    _, dx, *words = shlex.split(line)
    assert dx == "dx"
    assert cli.main(words) == 0
    assert capsys.readouterr().out


def test_the_commands_of_the_readme_exist():
    for line in (line for block in blocks(README, "sh") for line in block.splitlines()):
        words = shlex.split(line, comments=True)
        if words[0] == "dx":
            cli.parser().parse_args(words[1:])


def test_the_paper_of_the_contributing_page_holds(tmp_path, monkeypatch):
    [source] = blocks(CONTRIBUTING, "python")
    path = tmp_path / "swish.py"
    path.write_text(source)
    record = catalog.read(path)
    assert (record.key, record.year, record.on) == ("swish", 2017, ("softmax-attention",))
    monkeypatch.syspath_prepend(tmp_path)
    import swish

    for claim in record.claims:
        if claim.kind != "measured":
            getattr(swish, claim.name)()
    sys.modules.pop("swish")
