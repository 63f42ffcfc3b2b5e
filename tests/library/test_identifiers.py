import pytest

from deltax.library.identifiers import from_text, from_url, normal_title, parse, unique, urls


@pytest.mark.parametrize(
    "url, wanted",
    [
        ("https://arxiv.org/abs/2503.10622", "arxiv:2503.10622"),
        ("https://arxiv.org/pdf/2212.05153.pdf", "arxiv:2212.05153"),
        ("https://www.arxiv.org/pdf/2503.03965v2", "arxiv:2503.03965v2"),
        ("https://arxiv.org/html/2410.11758v1#S2", "arxiv:2410.11758v1"),
        ("http://export.arxiv.org/abs/0905.3587", "arxiv:0905.3587"),
        ("https://arxiv.org/abs/hep-th/9901001v3", "arxiv:hep-th/9901001v3"),
        ("https://arxiv.org/abs/math.GT/0309136", "arxiv:math.GT/0309136"),
        ("https://www.alphaxiv.org/abs/2503.10622", "arxiv:2503.10622"),
        ("https://huggingface.co/papers/2503.10622", "arxiv:2503.10622"),
        ("https://ar5iv.labs.arxiv.org/html/2503.10622", "arxiv:2503.10622"),
        ("https://doi.org/10.48550/arXiv.2503.10622", "arxiv:2503.10622"),
        ("https://doi.org/10.1038/S41586-021-03819-2", "doi:10.1038/s41586-021-03819-2"),
        ("https://dl.acm.org/doi/abs/10.1145/3292500.3330701", "doi:10.1145/3292500.3330701"),
        ("https://openreview.net/pdf?id=HxPDWbaK1E", "openreview:HxPDWbaK1E"),
        ("https://openreview.net/forum?id=M3Yd3QyRG4&noteId=x", "openreview:M3Yd3QyRG4"),
        ("https://arxiv.org/list/cs.LG/recent", None),
        ("https://arxiv.org/abs/2513.10622", None),
        ("https://github.com/arxiv.org/abs/2503.10622", None),
        ("https://huggingface.co/spaces/nanotron/ultrascale-playbook", None),
        ("http://[broken", None),
    ],
)
def test_from_url(url, wanted):
    found = from_url(url)
    assert (str(found) if found else None) == wanted


def test_versions_are_kept_and_name_the_same_paper():
    found = unique([from_url("https://arxiv.org/abs/2503.10622v2"), from_url("https://arxiv.org/pdf/2503.10622")])
    assert [str(i) for i in found] == ["arxiv:2503.10622v2"]
    assert found[0].key == "arxiv:2503.10622"


def test_written_out():
    assert [str(i) for i in from_text("see arXiv:1706.03762v5 and doi: 10.1000/xyz.")] == [
        "arxiv:1706.03762v5",
        "doi:10.1000/xyz",
    ]
    assert from_text("version 2503.10622 of nothing") == ()


@pytest.mark.parametrize(
    "text", ["arxiv:2503.10622", "2503.10622", "arXiv: 2503.10622", "https://arxiv.org/abs/2503.10622"]
)
def test_parse(text):
    assert str(parse(text)) == "arxiv:2503.10622"
    assert parse("attention") is None


def test_urls_end_where_the_sentence_goes_on():
    assert urls("(see https://a.b/c_(d), or https://e.f/g.)") == ["https://a.b/c_(d)", "https://e.f/g"]


def test_titles_fold():
    assert normal_title("Qwen2.5-Omni") == normal_title("qwen 2.5 omni")
    assert normal_title("Schrödinger’s  CAT") == "schrodingerscat"
