"""Works and the catalogue's papers, and what to read next."""

from dataclasses import dataclass
from datetime import date

from deltax.library.importing import import_paths
from deltax.library.join import Catalogue, certain, decide, join
from deltax.library.store import Library
from deltax.library.suggest import next_to_read


@dataclass(frozen=True)
class Paper:
    key: str
    title: str
    arxiv: str | None = None
    year: int = 2020
    on: tuple[str, ...] = ()


FLASH = "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness"
MASK2FORMER = "Masked-attention Mask Transformer for Universal Image Segmentation"
PAPERS = (
    Paper("gpt", "Improving Language Understanding by Generative Pre-Training"),
    Paper("layer-norm", "Layer Normalization", "1607.06450"),
    Paper("dyt", "Transformers without Normalization", "2503.10622v1", 2025, ("gpt", "layer-norm")),
    Paper("online-softmax", "Online normalizer calculation for softmax", "1805.02867"),
    Paper("flash-attention", FLASH, "2205.14135", 2022, ("online-softmax",)),
    Paper("muon", "Muon: An optimizer for hidden layers in neural networks", None, 2024),
    Paper("mask2former", MASK2FORMER, "2112.01527", 2021, ("maskformer",)),
    Paper("maskformer", "Per-Pixel Classification is Not All You Need for Semantic Segmentation", "2107.06278"),
)  # fmt: skip


def _library(tmp_path, text):
    (tmp_path / "n.md").write_text(text, encoding="utf-8")
    library = Library(tmp_path / "l.sqlite")
    import_paths(library, [tmp_path / "n.md"])
    return library, {item.entry.title: item for item in library.items()}


def test_by_id_then_title_then_likeness_that_the_reader_confirms(tmp_path):
    library, by = _library(
        tmp_path,
        "- [ ] [tanh thing](https://arxiv.org/abs/2503.10622v3)\n- [ ] layer normalization\n- [ ] flash attention\n"
        "- [ ] Online normaliser calculations for softmax\n- [ ] [Layer Normalization](https://arxiv.org/abs/1906.56789)\n"
        "- [ ] muon\n- [ ] gpt zero\n",
    )
    papers = Catalogue(PAPERS)
    found = join(library, papers)
    how = {title: (found[i.work].key, found[i.work].how) for title, i in by.items() if i.work in found}
    assert how == {
        "tanh thing": ("dyt", "id"),
        "flash attention": ("flash-attention", "title"),
        "muon": ("muon", "title"),
        "Online normaliser calculations for softmax": ("online-softmax", "likely"),
    }
    assert certain(library, papers) == {work: pair for work, pair in found.items() if pair.how != "likely"}
    likely = by["Online normaliser calculations for softmax"]
    assert 88 <= found[likely.work].score < 100
    decide(library, likely, "online-softmax", False)
    assert likely.work not in join(library, papers)
    decide(library, likely, "online-softmax", True)
    assert join(library, papers)[likely.work].how == "confirmed"
    decide(library, by["tanh thing"], "dyt", False)
    assert by["tanh thing"].work not in join(library, papers)
    assert join(library, Catalogue()) == {}
    library.close()


def test_the_five_files_join(five, tmp_path):
    with Library() as library:
        import_paths(library, [five])
        found = join(library, Catalogue(PAPERS))
        assert {(j.key, j.how) for j in found.values()} >= {
            ("dyt", "id"), ("flash-attention", "id"), ("online-softmax", "title"), ("mask2former", "title"),
        }  # fmt: skip
        assert len({j.key for j in found.values()}) == len(found)


def test_next_is_priorities_dates_and_the_genealogy(tmp_path):
    library, _ = _library(
        tmp_path,
        "- [x] [DyT](https://arxiv.org/abs/2503.10622)\n- [ ] layer normalization\n- [ ] plain\n- [ ] urgent 🔺\n"
        "- [ ] soon 📅 2025-01-10\n- [ ] late 📅 2024-01-01\n- [ ] MaskFormer\n- [-] dropped ⏫\n\n"
        "| Paper title | Model name | Summary |\n|--|--|--|\n| A paper | A | MaskFormer but with more |\n",
    )
    papers = Catalogue(PAPERS[:4])
    found = next_to_read(library.items(), join(library, papers), papers, date(2025, 1, 5))
    assert [(s.title, s.score) for s in found] == [
        ("urgent", 4.0), ("late", 4.0), ("layer normalization", 3.0), ("MaskFormer", 3.0), ("soon", 2.0),
        (PAPERS[0].title, 2.0), ("plain", 1.0),
    ]  # fmt: skip
    reasons = {s.title: " ".join(s.reasons) for s in found}
    assert "X of Transformers without Normalization" in reasons["layer normalization"]
    assert "X of A, which you have notes on" in reasons["MaskFormer"] and reasons["plain"] == ""
    assert "no note of yours" in reasons[PAPERS[0].title]
    library.close()
