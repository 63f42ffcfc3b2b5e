"""What the catalogue reads off the papers without running them, and the rules every paper keeps."""

import ast
import shutil
import subprocess
import sys

import pytest

from deltax import UserError, catalog
from deltax.catalog import PAPERS
from deltax.expression import load, recipe
from deltax.paper import paper_of

RECORDS = catalog.papers()
read = catalog.read


def test_the_catalogue_loads_no_torch():
    code = "import sys; from deltax import catalog; catalog.papers()"
    code += "; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


def test_records_are_read_off_the_file():
    dyt = catalog.find("dyt")
    assert dyt.title == "Transformers without Normalization"
    assert dyt.authors == "Zhu, Chen, He, LeCun, Liu"
    assert dyt.sentence == "A transformer, but every norm is an elementwise tanh."
    assert (dyt.year, dyt.arxiv, dyt.kind, dyt.field) == (2025, "2503.10622", "delta", "language")
    assert dyt.on == ("gpt", "layer-norm", "vit")
    assert "dyt" in catalog.children("gpt")
    assert dyt.change().startswith("class DyT") and "@claim" not in dyt.change()


def memory(folder):
    (file,) = folder.glob("cache/deltax/catalogue-*.json")
    return file


class TestRemembering:
    """A start parses only what changed since the last one."""

    @pytest.fixture
    def papers(self, tmp_path, monkeypatch):
        """The catalogue of two papers, read as a fresh process would, with the files it parsed."""
        for key in ("gpt", "dyt"):
            copy = tmp_path / "papers" / RECORDS[key].path.relative_to(PAPERS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(RECORDS[key].path, copy)
        parsed = []
        monkeypatch.setattr(catalog, "PAPERS", tmp_path / "papers")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(catalog, "read", lambda path: parsed.append(path.stem) or read(path))

        def start():
            parsed.clear()
            return catalog.papers.__wrapped__(), sorted(parsed)

        return start

    def test_nothing_is_parsed_twice(self, papers):
        first, parsed = papers()
        assert parsed == ["dyt", "gpt"]
        again, parsed = papers()
        assert again == first and parsed == []

    def test_a_changed_file_is_parsed_again(self, papers, tmp_path):
        papers()
        file = tmp_path / "papers" / RECORDS["dyt"].path.relative_to(PAPERS)
        file.write_text(file.read_text().replace("A transformer, but", "A network, but"))
        found, parsed = papers()
        assert parsed == ["dyt"] and found["dyt"].sentence.startswith("A network, but")

    def test_a_removed_file_is_forgotten(self, papers, tmp_path):
        papers()
        (tmp_path / "papers" / RECORDS["dyt"].path.relative_to(PAPERS)).unlink()
        assert list(papers()[0]) == ["gpt"]
        assert "dyt" not in memory(tmp_path).read_text()

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"reader": [1, 2], "files": {}}', '{"files": 3}'])
    def test_a_spoilt_memory_is_read_anew(self, papers, tmp_path, content):
        first, _ = papers()
        memory(tmp_path).write_text(content)
        assert papers() == (first, ["dyt", "gpt"])
        assert papers() == (first, [])

    def test_where_nothing_can_be_written_all_is_read(self, papers, tmp_path):
        (tmp_path / "cache").write_text("a file where the folder should be")
        first, _ = papers()
        assert papers() == (first, ["dyt", "gpt"])


def test_unknown_papers_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'dyt'"):
        catalog.find("dty")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "declares no paper"),
        ("def f(:\n", "not a Python file"),
        (
            '"""No date."""\n' * 1 + "from deltax import paper\n@paper(year=2020)\ndef f(recipe):\n    return recipe\n",
            "docstring begins",
        ),
    ],
)
def test_a_broken_paper_is_named(tmp_path, text, says):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        catalog.read(path)
    assert "broken.py" in str(error.value)


@pytest.mark.parametrize("key", RECORDS)
class TestEveryPaper:
    def test_says_x_but_y(self, key):
        record = RECORDS[key]
        assert "but" in record.sentence.replace(",", " ").split(), record.sentence
        assert record.link, "a paper has an arXiv id or a url"
        assert record.authors

    def test_has_claims(self, key):
        assert RECORDS[key].claims

    def test_is_no_older_than_its_parents(self, key):
        record = RECORDS[key]
        for parent in record.on:
            assert catalog.find(parent).year <= record.year, f"{key} ({record.year}) builds on {parent}"

    def test_says_of_itself_what_the_catalogue_reads(self, key):
        record = RECORDS[key]
        declared = paper_of(load(key))
        assert (declared.key, declared.year, declared.kind, declared.arxiv) == (
            record.key,
            record.year,
            record.kind,
            record.arxiv,
        )

    def test_its_line_of_use_reads(self, key):
        words = catalog.use(RECORDS[key], RECORDS).split()
        for text in words[2:] if words[0] == "dx" else []:
            recipe(text)

    def test_only_what_trains_is_proposed_for_training(self, key):
        line = catalog.use(RECORDS[key], RECORDS)
        assert RECORDS[key].trains or not line.startswith(("dx compare", "dx train")), line

    def test_claims_are_sentences(self, key):
        for claim in RECORDS[key].claims:
            assert claim.says[0].isupper() and claim.says.endswith((".", "?")), claim.says
            assert claim.kind in ("exact", "parity", "measured")
            assert claim.kind != "parity" or claim.peer
            assert claim.kind != "measured" or claim.paper


def test_a_claim_without_a_sentence_is_refused():
    from deltax import claim

    with pytest.raises(TypeError, match="write it as the docstring"):

        @claim
        def nothing_said():
            pass


@pytest.mark.parametrize("path", sorted(PAPERS.parent.glob("p*/**/*.py")), ids=lambda p: p.stem)
def test_constructors_stay_small_and_take_no_flags(path):
    for cls in [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]:
        for init in [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]:
            words = init.args.args[1:] + init.args.kwonlyargs
            assert len(words) <= 8, f"{cls.name} takes {len(words)} arguments"
            defaults = [*init.args.defaults, *init.args.kw_defaults]
            flags = [d for d in defaults if isinstance(d, ast.Constant) and isinstance(d.value, bool)]
            typed = [w.arg for w in words if w.annotation and ast.unparse(w.annotation) == "bool"]
            assert not flags and not typed, f"{cls.name}: an idea is a part, not a flag"
