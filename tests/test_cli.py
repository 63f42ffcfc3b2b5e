"""The shell: a mistake is one sentence with the fix and exit code 2; catalogue commands are quick and load no torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deltax import catalog, cli, kernels
from deltax.kernels import choice
from deltax.papers.language.attention.softmax_attention import attend


def dx(*words, **settings):
    return subprocess.run([sys.executable, "-m", "deltax", *words], capture_output=True, text=True, **settings)


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i} is half of {2 * i}.\n\n" for i in range(3000)))
    return path


SIZES = ["model.dim=12", "model.stack.depth=1", "task.context=16", "task.held_out=512"]
TINY = [word for size in SIZES for word in ("--set", size)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "dty"], "did you mean 'dyt'"),
        (["list", "--field", "lingusitics"], "there are"),
        (["diff", "gpt", "gpt+dty"], "did you mean 'dyt'"),
        (["diff", "gpt", "gpt+dyt(alhpa=1)"], "did you mean 'alpha'"),
        (["diff", "gpt", "gpt+rms-norm+dyt"], "dyt erases all of rms-norm"),
        (["train", "gpt", "--set", "model.dmi=3"], "did you mean 'model.dim'"),
        (["train", "dyt"], "start with one, as in 'gpt+dyt'"),
        (["train", "fpn"], "start with one, as in 'r-cnn+fast-r-cnn+faster-r-cnn+fpn'"),
        (["train", "mae"], "start with one, as in 'vit+mae'"),
        (["compare", "gpt"], "at least two"),
        (["compare", "gpt", "gpt+dyt", "--budget", "qick"], "did you mean 'quick'"),
        (["compare", "gpt", "gpt+dyt", "--report", "pyproject.toml/r.html"], "another place"),
        (["compare", "gpt", "gpt+dyt", "--report", "r.pdf"], ".html or .md or .json"),
        (["compare", "gpt", "gpt+dyt", "--data", "no-such-file.txt"], "no-such-file.txt"),
        (["compare", "gpt", "gpt+dyt", "--set", "model.dim=13"], "cannot be built"),
        (["train", "gpt", "--data", ""], "empty string"),
        (["train", "gpt", "--set", "model.dim=abc"], "model.dim is a whole number, such as 96, not 'abc'"),
        (["train", "gpt", "--set", "model.dim=24.5"], "model.dim is a whole number, such as 96, not 24.5"),
        (["train", "gpt", "--set", "model.dim=-24"], "model.dim counts something, such as 96: at least 0, not -24"),
        (["train", "gpt", "--set", "loop.batch=0"], "loop.batch is at least 1, not 0"),
        (["train", "gpt", "--set", "optimizer.lr=fast"], "optimizer.lr is a number, such as 0.003, not 'fast'"),
        (["train", "gpt", "--set", "model.norm=3"], "model.norm is a part, LayerNorm(), not a value"),
        (["show", "gpt+dyt(alpha='steep')"], "dyt's alpha is a number, such as 0.5, not 'steep'"),
        (["train", "gpt", "--set", "model.dim=13", "--steps", "1"], "cannot be built"),
        (["train", "gpt", "--set", "model.dim=0", "--steps", "1"], "dim of LanguageModel is at least 1, not 0"),
        (["verify", "dyt", "--claim", "as_god_as_the_norm"], "did you mean 'as_good_as_the_norm'"),
        (["sample", "feed", "hello"], "no finished run"),
        (["report"], "no comparison yet"),
        (["interact", "rope", "gpt"], "is a recipe"),
        (["compar", "gpt", "gpt+dyt"], "there is no command 'compar'; did you mean 'compare'?"),
        (["zzz"], "there is no command 'zzz': dx --help lists them"),
        (["notes", "impor"], "there is no command 'impor'; did you mean 'import'?"),
        (["notes", "zzz"], "there is no command 'zzz': dx notes --help lists them"),
        (["list", "--field", "visoin"], "there is no field 'visoin'; did you mean 'vision'?"),
        (["list", "--field", "zzz"], "there is no field 'zzz'; there are detection, "),
        (["train", "gpt", "--data", "no-such/name"], "a Hugging Face dataset is hf:no-such/name"),
    ],
)
def test_mistakes_are_one_sentence(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path))
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("dx: ") and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["compare", "gpt", "gpt+dyt", "--budgt", "smoke"],
            "dx compare: error: there is no --budgt; did you mean '--budget'?",
        ),
        (["train", "gpt", "--stepz=3"], "dx train: error: there is no --stepz=3; did you mean '--steps'?"),
        (
            ["notes", "search", "norm", "--limti", "3"],
            "dx notes search: error: there is no --limti; did you mean '--limit'?",
        ),
        (["sample", "run", "Once", "more"], "dx sample: error: 'more' is one too many"),
        (["compare", "gpt", "gpt+dyt", "--ladder", "of"], "it is on or off, not 'of'; did you mean 'off'?"),
    ],
)
def test_a_misspelt_option_is_named_with_its_command(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"too short", "small|short"),
        (bytes(range(256)) * 40, "binary|UTF-8|text"),
        ("Größe".encode("latin-1") * 5000, "UTF-8"),
    ],
)
def test_bad_data_is_named(content, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    assert cli.main(["train", "gpt", "--data", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and "notes.txt" in error and len(error.strip().splitlines()) == 1


def test_list_and_show_load_no_torch():
    code = "import sys; from deltax.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for words in (["list"], ["list", "--json"], ["show", "dyt", "--source"], ["list", "norm", "--field", "language"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_list_as_json_is_what_coverage_reads(capsys):
    cli.main(["list", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {f["key"] for f in found} == set(catalog.papers())
    assert all(set(f["evidence"]) == {"exact", "parity", "measured", "speed"} for f in found)


def test_show_a_recipe(capsys):
    assert cli.main(["show", "gpt+rope"]) == 0
    assert "qk_position = Rotary" in capsys.readouterr().out


def test_diff_with_source(capsys):
    assert cli.main(["diff", "gpt", "gpt+dyt", "--source"]) == 0
    out = capsys.readouterr().out
    assert "LayerNorm() -> DyT()" in out and "class DyT" in out and "def no_feature" not in out


def test_train_then_runs_then_sample(numbers, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    assert cli.main(["train", "gpt+rope", "--steps", "8", "--data", str(numbers), *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "bits per byte" and 3 < found["score"] < 9
    assert cli.main(["runs", "rope", "--json"]) == 0
    [line] = json.loads(capsys.readouterr().out)
    assert line["id"] == found["id"] and line["state"] == "finished"
    assert cli.main(["sample", found["id"][:8], "12 is", "--length", "9", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("12 is")
    assert cli.main(["sample", found["id"][:8], "12 is", "--length", "9", "--temperature", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["run"] == found["id"] and said["text"].startswith("12 is")
    words = ["compare", "gpt", "gpt+rope", "--data", str(numbers), *TINY, "--plan", "--json"]
    assert cli.main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pairs"] == 5 and plan["runs"]["scoring"] == 10 and plan["resolution"] > 1 and len(plan["said"]) >= 4


def test_train_says_what_kernels_were_picked(numbers, capsys, tmp_path, monkeypatch):
    """As on a GPU, where attention is picked for each shape."""
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    found = kernels._twin
    picked = lambda make, device: (choice.auto, "picked for each shape") if make is attend else found(make, device)
    monkeypatch.setattr(kernels, "_twin", picked)
    monkeypatch.setattr(choice, "_picked", {})
    words = ["train", "gpt+alibi", "--steps", "2", "--data", str(numbers), *TINY]
    assert cli.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernel on ")]
    assert lines and all("cpu float32" in line and "Distance+causal: sdpa, torch's fused" in line for line in lines)
    assert cli.main([*words, "--seed", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == [line.removeprefix("kernel on ") for line in lines]


def test_a_run_on_a_mesh_tells_how_it_goes(numbers, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("deltax.lab.worker.TELL_EVERY", 0.0)
    told = []
    monkeypatch.setattr("deltax.lab.terminal.Live.hear", lambda live, event: told.append(event))
    words = ["train", "gpt", "--steps", "3", "--data", str(numbers), *TINY, "--mesh", "dp=2", "--patience", "60"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [event.kind for event in (told[0], told[-1])] == ["started", "finished"]
    assert cli.main(["runs", "--json"]) == 0
    assert [line["title"] for line in json.loads(capsys.readouterr().out)] == ["gpt"]
    assert told[-1].result.score == found["score"] and told[-2].step == 3
    losses = [pair for event in told for pair in event.losses]
    assert [step for step, _ in losses] == [0, 1, 2] and told[-2].loss == losses[-1][1]


def test_compare_writes_a_report_and_repeats_for_nothing(numbers, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = ["compare", "gpt", "gpt+dyt", "--budget", "2k tokens", "--pairs", "2", "--data", str(numbers), *TINY]
    assert cli.main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "gpt+dyt" in page
    assert cli.main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in first["rows"]]
    assert cli.main(["report", "--to", "again.md"]) == 0
    assert "gpt+dyt" in (tmp_path / "again.md").read_text()


def test_an_unknown_tracker_is_named(numbers, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    assert cli.main(["train", "gpt", "--data", str(numbers), *TINY, "--log", "tensorbord"]) == 2
    assert "did you mean 'tensorboard'" in capsys.readouterr().err


def test_figures_on_the_line_are_checked_as_they_are_read(capsys):
    for words, says in {
        ("--steps", "x"): "a whole number of at least 1, not 'x'",
        ("--steps", "0"): "a whole number of at least 1, not '0'",
        ("--lr-scale", "nan"): "a number above 0, not 'nan'",
        ("--lr-scale", "-1"): "a number above 0, not '-1'",
    }.items():
        with pytest.raises(SystemExit) as left:
            cli.main(["train", "gpt", *words])
        assert left.value.code == 2 and says in capsys.readouterr().err


def test_what_never_ran_is_no_run_and_no_title_is_lost(numbers, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    assert cli.main(["train", "gpt", "--steps", "2", "--set", "model.dim=13"]) == 2
    assert cli.main(["runs"]) == 0
    assert "no runs yet" in capsys.readouterr().out
    words = ["train", "resnet", "--steps", "1", "--set", "task.held_out=8"]
    assert cli.main(words) == 0
    run = re.search(r"^run (\w+)", capsys.readouterr().out, re.MULTILINE)[1]
    assert cli.main(["sample", run, "Once"]) == 2
    assert "resnet is no language model" in capsys.readouterr().err
    assert cli.main(["runs", "gpt"]) == 0
    assert "none of 1 runs has all of these words" in capsys.readouterr().out


def test_json_is_strict(capsys):
    from deltax.lab.printing import print_json

    print_json({"loss": float("inf"), "each": [(1, float("nan"))], "file": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "each": [[1, None]], "file": "a"}


def test_help_teaches():
    assert "dx compare gpt gpt+dyt" in dx("--help").stdout
    assert dx("compare", "--help").returncode == 0
    assert dx("shwo").returncode == 2


def test_what_is_left_out_is_one_sentence_and_no_picture_is_sampled_from(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAX_HOME", str(tmp_path / "home"))
    for i, kind in enumerate(("cat", "dog")):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for k in range(12):
            Image.new("L", (8, 8), 20 * k + i).save(tmp_path / "pets" / kind / f"{k}.png")
    (tmp_path / "pets" / "cat" / "torn.png").write_bytes(b"no picture")
    words = ["train", "resnet", "--steps", "1", "--data", str(tmp_path / "pets"), "--set", "task.size=8"]
    assert cli.main(words) == 2
    assert "cat/torn.png is no picture: save it again" in capsys.readouterr().err
    told = dx(*words, "--set", "task.faults=skip")
    first, then = told.stderr.splitlines()
    assert first == "dx: left out of pets: cat/torn.png is no picture: save it again as PNG or JPEG"
    assert then.startswith("1/1 resnet") and told.returncode == 0 and "dx sample" not in told.stdout
