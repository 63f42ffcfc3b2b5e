import gzip
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltax.errors import UserError
from deltax.tasks.language import sources
from deltax.tasks.language.corpus import SPLITS, Corpus
from deltax.tasks.language.sources import load
from deltax.tasks.language.text import Batch, Text

LINES = [f"line {i} of a text that is long enough to learn from, number {i * i}\n\n" for i in range(400)]
PROSE = "".join(LINES)


def documents(count: int, size: int = 200, salt: str = "") -> list[tuple[str, bytes]]:
    return [(f"{salt}{i}", (f"{salt} {i} " * size)[:size].encode()) for i in range(count)]


def by_name(corpus: Corpus) -> dict[str, str]:
    return {corpus.names[i]: split for split in SPLITS for i in corpus.splits[split]}


def bytes_of(corpus: Corpus, split: str) -> int:
    return sum(corpus[i].size for i in corpus.splits[split])


def sentence(trigger, *needles: str) -> str:
    """The one line of the UserError that `trigger` raises; it says all of `needles`."""
    with pytest.raises(UserError) as caught:
        trigger()
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message, message
    return message


# Documents and splits


def test_default_text_holds_prose_and_code_and_no_tests():
    corpus = load()
    assert corpus is load("default")
    assert "topics/assert" in corpus.names and "json/decoder.py" in corpus.names
    assert not [name for name in corpus.names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert "pydoc_data/topics.py" not in corpus.names
    assert 4_000_000 < corpus.documents.size <= sources.DEFAULT_BYTES
    for split in ("train", "validation"):
        titles = [corpus.names[i] for i in corpus.splits[split]]
        assert 0 < sum(title.startswith("topics/") for title in titles) < len(titles)


def test_default_text_is_the_same_in_another_process_and_loads_no_torch():
    code = (
        "import sys; from deltax.tasks.language.sources import load; print(load().fingerprint, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [load().fingerprint, "False"]


def test_prose_and_code_are_the_two_halves_of_the_default_text():
    prose, code = load("prose"), load("code")
    assert prose is load("prose") and prose.fingerprint != code.fingerprint
    assert all(name.startswith("topics/") for name in prose.names)
    assert all(name.endswith(".py") and not name.startswith("topics/") for name in code.names)
    assert set(load().names) <= set(prose.names) | set(code.names)
    assert Text(source="prose").task_spec == Text(source="code").task_spec


def test_default_text_stops_at_its_cap_and_stays_mixed(monkeypatch):
    monkeypatch.setattr(sources, "DEFAULT_BYTES", 1_500_000)
    corpus = sources._default.__wrapped__()
    assert 1_000_000 < corpus.documents.size <= 1_500_000
    topics = sum(name.startswith("topics/") for name in corpus.names)
    assert 5 < topics < len(corpus) / 2


def test_splits_are_near_90_5_5_and_share_no_content():
    corpus = Corpus.of("many", documents(3000) + documents(500, salt="b") + documents(3000))
    where = by_name(corpus)
    assert len(where) == 3500 and sum(map(len, corpus.splits.values())) == len(corpus) == 6500
    for split, share in zip(SPLITS, (0.90, 0.05, 0.05), strict=True):
        assert abs(bytes_of(corpus, split) / corpus.documents.size - share) < 0.02
    contents = [{corpus[i].tobytes() for i in corpus.splits[split]} for split in SPLITS]
    assert all(contents)
    assert not (contents[0] & contents[1] or contents[0] & contents[2] or contents[1] & contents[2])


def test_new_documents_move_no_other():
    old, new = documents(1000), documents(300, salt="new")
    before, after = by_name(Corpus.of("a", old)), by_name(Corpus.of("b", new + old))
    assert {name: after[name] for name in before} == before


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=12))
def test_any_documents_split_disjointly_with_train_and_validation_filled(texts):
    kept = [clean for text in texts if (clean := text.encode().replace(b"\0", b"")).strip()]
    joined = b"".join(kept)
    try:
        corpus = Corpus.of("any", [(str(i), text.encode()) for i, text in enumerate(texts)])
    except UserError:
        repeated = joined in (joined + joined)[1:-1]
        assert repeated or len(joined) < 16
        return
    assert corpus.documents.tobytes() == joined
    assert corpus.splits["train"].size and corpus.splits["validation"].size
    assert sorted(np.concatenate(list(corpus.splits.values()))) == list(range(len(corpus)))
    contents = [{corpus[i].tobytes() for i in corpus.splits[split]} for split in SPLITS]
    assert not (contents[0] & contents[1] or contents[0] & contents[2] or contents[1] & contents[2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(50, 20_000), min_size=2, max_size=12), st.integers(0, 10**6))
def test_few_documents_of_unlike_size_leave_train_half_and_validation_a_hundredth(sizes, salt):
    numbers = [
        " ".join(map(str, range(salt + i * 10**7, salt + i * 10**7 + size // 8 + 1))) for i, size in enumerate(sizes)
    ]
    corpus = Corpus.of("few", [(str(i), text.encode()) for i, text in enumerate(numbers)])
    assert bytes_of(corpus, "train") >= corpus.documents.size * 0.49
    assert bytes_of(corpus, "validation") >= corpus.documents.size * 0.01


def test_one_document_is_cut_after_paragraphs_near_4096_bytes():
    corpus = Corpus.of("one", [("book", PROSE.encode())])
    sizes = np.diff(corpus.offsets)
    assert corpus.documents.tobytes() == PROSE.encode()
    assert len(corpus) == round(len(PROSE) / 4096)
    assert all(abs(end - 4096 * (i + 1)) <= 1024 for i, end in enumerate(corpus.offsets[1:-1]))
    assert all(corpus[i].tobytes().endswith(b"\n\n") for i in range(len(corpus))) and sizes.min() > 2048
    assert corpus.names[1] == f"book@{sizes[0]}"


def test_a_document_that_dwarfs_the_others_is_cut_too():
    corpus = Corpus.of("two", [("note", b"a note\n"), ("book", PROSE.encode())])
    assert len(corpus) > 3
    assert bytes_of(corpus, "train") > bytes_of(corpus, "validation") > 1000


@pytest.mark.parametrize(("share", "cut"), [(0.89, False), (0.91, True)])
def test_documents_stay_whole_up_to_nine_tenths_of_the_bytes(share, cut):
    book = "".join(f"{i:09} " for i in range(2000))
    note = "n" * round(len(book) * (1 - share) / share)
    corpus = Corpus.of("two", [("book", book.encode()), ("note", note.encode())])
    assert (len(corpus) > 2) == cut


@pytest.mark.parametrize(("size", "spans"), [(8192 + 2047, 2), (8192 + 2049, 3)])
def test_a_tail_under_half_a_span_joins_the_last(size, spans):
    text = "".join(f"{i:09} " for i in range(2000))[:size]
    assert len(Corpus.of("one", [("a", text.encode())])) == spans


def test_a_cut_never_falls_inside_a_character():
    corpus = Corpus.of("one", [("é", ("a" + "é€😀" * 5000).encode())])
    assert len(corpus) > 5
    assert "".join(corpus[i].tobytes().decode() for i in range(len(corpus))) == "a" + "é€😀" * 5000


def test_fingerprint_follows_bytes_and_boundaries_not_names():
    two = [("a", b"abc"), ("b", b"def")]
    same = Corpus.of("x", two).fingerprint
    assert same == Corpus.of("y", [("c", b"abc"), ("d", b"def")]).fingerprint
    assert len(same) == 16 and int(same, 16) >= 0
    assert same != Corpus.of("x", [("a", b"abcd"), ("b", b"ef")]).fingerprint
    assert same != Corpus.of("x", [("a", b"abc"), ("b", b"deF")]).fingerprint


# Files and folders


def test_every_kind_of_file_and_its_gz(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [f"row {i} café {LINES[i]}" for i in range(30)]
    for name in ("a.txt", "B.MD", "c.py"):
        (tmp_path / name).write_text(f"# {name}\n{PROSE}", encoding="utf-8")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"id": i, "text": r}) for i, r in enumerate(rows)) + "\n\n")
    parquet.write_table(pa.table({"n": range(30), "body": rows}), tmp_path / "e.parquet")
    for name in ("a.txt", "B.MD", "c.py", "d.jsonl", "e.parquet"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        plain, packed = load(str(tmp_path / name)), load(str(tmp_path / f"{name}.gz"))
        assert plain.name == name and packed.name == f"{name}.gz"
        assert plain.fingerprint == packed.fingerprint
    for name, first in (("d.jsonl", 1), ("e.parquet", 0)):
        corpus = load(str(tmp_path / name))
        assert [corpus[i].tobytes().decode() for i in range(30)] == rows
        assert corpus.names[4] == f"{name}:{4 + first}"
    folder = load(str(tmp_path))
    assert folder.name == tmp_path.name and not folder.skipped
    assert [name for name in folder.names if ":" not in name] == [
        "B.MD",
        "B.MD.gz",
        "a.txt",
        "a.txt.gz",
        "c.py",
        "c.py.gz",
    ]
    assert len(folder) == 6 + 4 * 30


def test_parquet_with_a_dictionary_nulls_and_a_text_column_among_others(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    words = pa.array(["one", None, "two", "one"]).dictionary_encode()
    parquet.write_table(pa.table({"title": ["t"] * 4, "text": words}), tmp_path / "w.parquet")
    corpus = load(str(tmp_path / "w.parquet"))
    assert corpus.documents.tobytes() == b"onetwoone" and corpus.names == ("w.parquet:0", "w.parquet:2", "w.parquet:3")


def test_a_folder_is_walked_sorted_without_hidden_and_strange_files(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "a.md", ".git/x.txt", ".hidden.txt", "photo.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} says hello")
    (tmp_path / "empty.txt").touch()
    corpus = load(str(tmp_path))
    assert corpus.names == ("a.md", "b/a.txt", "b/z.txt") and not corpus.skipped


def test_unreadable_files_of_a_folder_are_named_and_left_out(tmp_path):
    (tmp_path / "good.txt").write_text(PROSE)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "binary.md").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(PROSE.encode(), mtime=0)[:-9])
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.warns(UserWarning, match="left out") as warned:
        corpus = load(str(tmp_path))
    assert {name.split("@")[0] for name in corpus.names} == {"good.txt"}
    for name in ("latin.txt", "binary.md", "gone.py", "bad.jsonl, line 2", "broken.txt.gz", "pipe.txt"):
        assert sum(line.startswith(name) for line in corpus.skipped) == 1, name
        assert name in str(warned[0].message)
    assert len(corpus.skipped) == 6


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "good.txt").write_text(PROSE)
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.warns(UserWarning, match="inner cannot be listed"):
        assert load(str(tmp_path)).skipped == ("inner cannot be listed (Permission denied)",)


def test_a_folder_with_nothing_readable_says_why(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    sentence(lambda: load(str(tmp_path)), tmp_path.name, "a.txt is binary")


def test_a_folder_without_text_names_the_kinds(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    sentence(lambda: load(str(tmp_path)), ".jsonl", ".gz")


@pytest.mark.parametrize(
    ("name", "data", "needles"),
    [
        ("empty.txt", b"", ["empty.txt is empty", "give"]),
        ("blank.md", b" \n\n\t", ["blank.md is empty"]),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), ["is empty"]),
        ("none.gz", b"", ["is empty"]),
        ("empty.jsonl", b"\n", ["is empty"]),
        ("empty.parquet", b"", ["is empty"]),
        ("one.txt", b"x", ["too small", "give more text"]),
        ("binary.txt", b"abc" * 5000 + b"\0", ["binary.txt is binary", "UTF-8"]),
        ("photo.png", b"\x89PNG\r\n\x1a\n\0", ["photo.png is binary"]),
        ("latin.txt", "naïve".encode("latin-1"), ["not UTF-8", "byte 2", "iconv"]),
        ("utf16.txt", "text".encode("utf-16"), ["utf16.txt"]),
        ("inner.txt.gz", gzip.compress("naïve".encode("latin-1"), mtime=0), ["not UTF-8"]),
        ("plain.txt.gz", b"not compressed", ["not whole gzip", "again"]),
        ("cut.txt.gz", gzip.compress(PROSE.encode(), mtime=0)[:-30], ["not whole gzip"]),
        ("torn.txt.gz", gzip.compress(PROSE.encode(), mtime=0)[:40] + b"\xff" * 60, ["not whole gzip"]),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"', ["a.jsonl, line 3", "not JSON"]),
        ("a.jsonl", b'"only a string"', ["a.jsonl, line 1", "not an object", '{"text": "..."}']),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl, line 1", "not JSON"]),
        ("a.jsonl", b'{"text": "x"}\n{"title": "a", "body": "b"}', ["line 2", "title, body", "name the one to read"]),
        ("a.jsonl", b'{"n": 3}', ["line 1", "no string field 'text'", "no other"]),
        ("a.jsonl", b'{"text": null, "n": 3}', ["line 1", "no string field 'text'"]),
        ("a.jsonl", "{'text': 'naïve'}".encode("latin-1"), ["not UTF-8"]),
        ("a.parquet", b"PAR1 but no more", ["a.parquet", "not a whole parquet"]),
    ],
)
def test_a_single_file_that_cannot_be_used_gets_one_sentence(tmp_path, name, data, needles):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    message = sentence(lambda: load(str(tmp_path / name)), *needles)
    assert str(tmp_path) not in message


def test_parquet_without_a_text_column_names_the_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"title": ["a"], "body": ["b"], "n": [1]}), tmp_path / "a.parquet")
    sentence(lambda: load(str(tmp_path / "a.parquet")), "a.parquet", "title, body")


@pytest.mark.parametrize("in_folder", [False, True])
def test_parquet_without_pyarrow_names_the_command(tmp_path, monkeypatch, in_folder):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.txt").write_text(PROSE)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sentence(
        lambda: load(str(tmp_path / "a.parquet" if not in_folder else tmp_path)), "pip install 'deltax-ml[parquet]'"
    )


def test_a_missing_source_gets_the_nearest_name(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    sentence(lambda: load("corpsu.txt"), "corpsu.txt", "did you mean 'corpus.txt'?")
    sentence(lambda: load("quite-else"), "no file or folder quite-else", "hf:NAME")
    sentence(lambda: load("nowhere/corpus.txt"), "nowhere cannot be listed")
    sentence(lambda: load(""), "empty string")
    sentence(lambda: load("x" * 5000), "no file or folder")
    sentence(lambda: load("/dev/null"), "neither a file nor a folder")


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(PROSE)
    first = load(str(path))
    assert load(str(path)) is first
    path.write_text(PROSE + "more")
    assert load(str(path)).documents.size == first.documents.size + 4


def test_a_byte_order_mark_nul_and_lone_surrogates_leave_no_trace(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + PROSE.encode())
    assert load(str(tmp_path / "a.txt"))[0][0] == ord("l")
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "\\ud800c"}\n')
    assert load(str(tmp_path / "a.jsonl")).documents.tobytes() == b"ab?c"


# Hugging Face datasets, by a stand-in for the package: no test goes to the network.


def hub(monkeypatch, rows=None, error=None):
    calls = []

    class Table(dict):
        features = types.MappingProxyType(
            {"text": types.SimpleNamespace(dtype="string"), "label": types.SimpleNamespace(dtype="int64")}
        )

    def load_dataset(*names, split):
        calls.append((*names, split))
        if error:
            raise error
        return Table(text=rows)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    sources._hub.cache_clear()
    return calls


def test_a_hugging_face_dataset_by_name_split_and_config(monkeypatch):
    calls = hub(monkeypatch, rows=["first row", None, "", "second row"])
    corpus = load("hf:owner/tales")
    assert corpus.names == ("owner/tales:0", "owner/tales:3") and corpus.name == "hf:owner/tales"
    assert corpus.documents.tobytes() == b"first rowsecond row"
    load("hf:owner/tales:test"), load("hf:owner/tales:raw:test")
    assert calls == [("owner/tales", "train"), ("owner/tales", "test"), ("owner/tales", "raw", "test")]


def test_hugging_face_without_package_network_or_name(monkeypatch):
    hub(monkeypatch, error=ConnectionError("Couldn't reach the hub.\nmore"))
    sentence(lambda: load("hf:tales"), "hf:tales cannot be loaded (Couldn't reach the hub)", "network", "local file")
    for wrong in ("hf:", "hf:a:", "hf:a:b:c:d"):
        sentence(lambda wrong=wrong: load(wrong), "hf:NAME:SPLIT")
    monkeypatch.setitem(sys.modules, "datasets", None)
    sentence(lambda: load("hf:tales"), "pip install 'deltax-ml[hf]'")


# The task


@pytest.fixture
def folder(tmp_path) -> str:
    """600 documents of 20 to 619 bytes: some shorter than a window, some many windows long."""
    for i in range(600):
        (tmp_path / f"{i:03}.txt").write_text((f"{i:03} é " * 200)[: 20 + i])
    return str(tmp_path)


def test_a_batch_depends_on_step_size_and_seed_alone(folder):
    task, again = Text(source=folder, context=37), Text(source=folder, context=37)
    late = [again.batch(step, size=5, seed=3) for step in (1000, 2, 0)]
    for step, batch in zip((1000, 2, 0), late, strict=True):
        for mine, other in zip(task.batch(step, size=5, seed=3), batch, strict=True):
            assert torch.equal(mine, other)
    one = task.batch(2, size=5, seed=3).inputs
    assert not torch.equal(one, task.batch(3, size=5, seed=3).inputs)
    assert not torch.equal(one, task.batch(2, size=5, seed=4).inputs)
    assert torch.equal(one, task.batch(2, size=9, seed=3).inputs[:5])


def test_a_batch_is_next_byte_windows_of_training_text_only(folder):
    task = Text(source=folder, context=37)
    batch = task.batch(11, size=64, seed=2**63)
    assert batch.inputs.shape == batch.targets.shape == (64, 37)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert task.tokens(64) == batch.targets.numel()
    stream = b"\0" + b"".join(task.corpus[i].tobytes() + b"\0" for i in task.corpus.splits["train"])
    for row, target in zip(*batch, strict=True):
        assert bytes([*row.tolist(), int(target[-1])]) in stream


def test_every_start_of_the_training_text_is_drawn_equally(folder):
    task = Text(source=folder, context=8)
    task._stream = np.arange(8 + 10, dtype=np.uint8)  # ten starts, each known by its first byte
    first = task.batch(0, size=20_000, seed=0).inputs[:, 0]
    counts = torch.bincount(first, minlength=10).double()
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_batches_move_to_a_device():
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)).to("meta")
    assert isinstance(batch, Batch) and batch.inputs.device.type == batch.targets.device.type == "meta"


@pytest.mark.parametrize("split", ["validation", "sealed"])
def test_held_out_windows_tell_every_byte_of_their_documents_once(folder, split):
    task = Text(source=folder, context=16, held_out=10**9)
    said: dict[int, bytes] = {}
    batches = list(task.held_out_batches(7, split))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert inputs.shape == targets.shape and all(len(batch.inputs) <= 7 for batch in batches)
    rows = task.held_out_documents(split)
    assert len(rows) == len(inputs)
    for document, row, target in zip(rows.tolist(), inputs, targets, strict=True):
        before = said.get(document, b"")
        real = target[target >= 0]
        assert torch.equal(row[: len(real)], torch.tensor([(b"\0" + before)[-1], *real[:-1].tolist()]))
        assert (target[len(real) :] == -100).all() and (row[len(real) :] == 0).all()
        said[document] = before + bytes(real.tolist())
    assert said == {i: task.corpus[i].tobytes() for i in task.corpus.splits[split].tolist()}


def test_held_out_selection_is_fixed_spread_and_large_enough(folder):
    task, whole = Text(source=folder, context=16, held_out=3000), Text(source=folder, context=16, held_out=10**9)
    one, other = (torch.cat([batch.targets for batch in task.held_out_batches(size)]) for size in (3, 1000))
    assert torch.equal(one, other)
    counted = int((one >= 0).sum())
    assert 3000 <= counted < 3200
    everything = torch.cat([batch.targets for batch in whole.held_out_batches(50)])
    assert 2 * counted < int((everything >= 0).sum())
    rows = task.held_out_documents()
    assert np.all(np.diff(rows) >= 0) and set(rows) <= set(task.corpus.splits["validation"])
    share = np.bincount(rows, minlength=600) / len(rows)
    expected = np.bincount(whole.held_out_documents(), minlength=600) / len(whole.held_out_documents())
    assert np.abs(share - expected).max() <= 1 / len(rows)


def test_the_default_text_has_enough_to_evaluate_on():
    task = Text()
    assert task.task_spec == {"vocab": 256, "context": 128}
    for split in ("validation", "sealed"):
        assert sum(int((batch.targets >= 0).sum()) for batch in task.held_out_batches(64, split)) >= 163_840
    assert len(set(task.held_out_documents())) > 20


def test_fingerprint_follows_data_context_and_selection(folder, tmp_path_factory):
    marks = {Text(source=folder, **given).fingerprint for given in ({}, {"context": 64}, {"held_out": 500})}
    assert len(marks) == 3
    assert Text(source=folder).fingerprint in marks
    other = tmp_path_factory.mktemp("other") / "a.txt"
    other.write_text(PROSE)
    assert Text(source=str(other)).fingerprint not in marks


def test_score_is_bits():
    assert Text.unit == "bits per byte"
    assert Text().score(np.log(256)) == pytest.approx(8, abs=1e-12)


@pytest.fixture(scope="module")
def default_task() -> Text:
    return Text()


@given(text=st.text())
def test_encode_and_decode_are_inverse(default_task, text):
    task = default_task
    ids = task.encode(text)
    assert ids.dtype == torch.int64 and ids.tolist() == list(text.encode())
    assert task.decode(ids) == task.decode(ids.tolist()) == text


def test_decode_marks_what_is_no_character():
    assert Text().decode([0x61, 0xC3]) == "a\ufffd"


def test_too_little_text_for_two_sequences_names_what_fits(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE[:300])
    message = sentence(lambda: Text(source=str(tmp_path / "a.txt"), context=256), "too small", "give more text")
    most = int(message.split()[-1])
    Text(source=str(tmp_path / "a.txt"), context=most)
    sentence(lambda: Text(source=str(tmp_path / "a.txt"), context=most + 1), f"at most {most}")


def test_arguments_that_make_no_sense(folder):
    sentence(lambda: Text(context=0), "context")
    sentence(lambda: Text(context=12.5), "context", "12.5")
    sentence(lambda: Text(held_out=-1), "held_out")
    sentence(lambda: Text(source=3), "string")
    task = Text(source=folder)
    sentence(lambda: next(task.held_out_batches(4, "valdation")), "did you mean 'validation'?")
    sentence(lambda: task.held_out_documents("train"), "train")


def test_a_split_without_documents_says_so(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name + PROSE)
    sentence(lambda: next(Text(source=str(tmp_path)).held_out_batches(1, "sealed")), "too few documents", "sealed")
