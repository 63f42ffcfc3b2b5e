"""The tree: what it promises about values, rewrites and the story."""

import json

import pytest
import torch

from deltax import UserError, diff, part, recipe
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.dyt import DyT, dyt
from deltax.papers.language.norm.rms_norm import RMSNorm, rms_norm
from deltax.papers.language.position.alibi import alibi
from deltax.papers.language.position.rope import rope
from deltax.papers.language.post_training.grpo import grpo
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.model.stack import Block, PreNorm, Stack
from deltax.recipe import from_json, to_json


def test_a_part_makes_a_new_object_each_time():
    norm = part(LayerNorm, eps=1e-3)
    assert norm(4) is not norm(4)
    assert norm(4).eps == 1e-3


def test_a_part_is_a_value():
    assert part(DyT, alpha=0.3) == part(DyT, alpha=0.3)
    assert hash(part(DyT, alpha=0.3)) == hash(part(DyT, alpha=0.3))
    assert part(DyT, alpha=0.5) == part(DyT), "a default that is written out is still the default"
    assert part(DyT, alpha=0.3) != part(DyT)
    with pytest.raises(AttributeError):
        part(DyT).target = LayerNorm


def test_a_part_prints_as_python():
    text = repr(part(PreNorm, norm=part(LayerNorm, eps=1e-3)))
    assert text == "PreNorm(norm=LayerNorm(eps=0.001))"
    assert eval(
        text, {"PreNorm": lambda **k: part(PreNorm, **k), "LayerNorm": lambda **k: part(LayerNorm, **k)}
    ) == part(PreNorm, norm=part(LayerNorm, eps=1e-3))


@pytest.mark.parametrize("tree", [gpt, gpt + dyt(alpha=0.3), gpt + rope + rms_norm])
def test_json_there_and_back(tree):
    again = from_json(json.loads(json.dumps(to_json(tree))))
    assert again == tree and again.id == tree.id


def test_json_may_not_name_anything_else():
    with pytest.raises(UserError, match="not 'os'"):
        from_json({"make": "os:system", "given": {}})


def test_ids_see_defaults_and_ignore_the_road():
    assert (gpt + dyt + rope).id == (gpt + rope + dyt).id
    assert (gpt + dyt(alpha=0.5)).id == (gpt + dyt).id
    assert len({t.id for t in (gpt, gpt + dyt, gpt + dyt(alpha=0.4), gpt + rope)}) == 4


def test_misspelt_arguments_are_errors_when_written():
    with pytest.raises(UserError, match="takes no 'alhpa'; did you mean 'alpha'"):
        part(DyT, alhpa=0.3)
    with pytest.raises(UserError, match="did you mean 'alpha'"):
        dyt(alhpa=0.3)


@pytest.mark.parametrize("value", [torch.zeros(2), {1: 2}, object()])
def test_only_plain_values_are_kept(value):
    with pytest.raises(UserError, match="numbers, words, tuples and parts"):
        part(DyT, alpha=value)


def test_a_lambda_is_no_part():
    with pytest.raises(UserError, match="cannot be found again by name"):
        part(lambda x: x)


def test_fill_keeps_what_both_take():
    coarse = gpt.set(LayerNorm, eps=1e-3)
    assert (coarse + rms_norm(eps=1e-4))["model.norm"].target.__name__ == "RMSNorm"
    assert dict(coarse.fill("norm", RMSNorm)["model.norm"].kwargs) == {"eps": 1e-3}
    assert dict(coarse.fill("norm", DyT)["model.norm"].kwargs) == {}


def test_fill_reaches_every_slot_of_the_name():
    tree = gpt + dyt
    assert {v.target for path, v in tree.walk() if path.endswith(".norm")} == {DyT}


def test_unknown_slots_name_the_nearest():
    with pytest.raises(UserError, match="no slot 'nrom'; did you mean 'norm'"):
        gpt.fill("nrom", DyT)


def test_wrap_puts_the_old_part_inside():
    wrapped = gpt.wrap("mlp", Wrapping)
    assert wrapped["model.stack.block.mlp.inner"] == gpt["model.stack.block.mlp"]


def test_what_an_earlier_paper_wrote_may_be_wrapped_whole():
    wrapped = gpt + rope + grpo
    assert wrapped["model.inner.stack"] == (gpt + rope)["model.stack"]
    assert wrapped == gpt + grpo + rope
    with pytest.raises(UserError, match="dyt erases all of rms-norm"):
        gpt + rms_norm + grpo + dyt


class Wrapping(torch.nn.Module):
    def __init__(self, dim, *, inner):
        super().__init__()
        self.inner = inner(dim)

    def forward(self, x):
        return self.inner(x)


def test_set_and_put():
    assert gpt.set(Stack, depth=6) == gpt.put("model.stack.depth", 6)
    assert gpt.put("model.stack.depth", 6)["model.stack.depth"] == 6
    with pytest.raises(UserError, match=r"did you mean 'model.stack.depth'"):
        gpt.put("model.stack.detph", 6)
    with pytest.raises(UserError, match="no DyT"):
        gpt.set(DyT, alpha=1.0)


def test_rewrites_leave_the_original_alone():
    before = repr(gpt)
    _ = (gpt + dyt + rope).put("model.dim", 8), gpt.fill("norm", DyT)
    assert repr(gpt) == before


def test_without_replays_the_story():
    assert (gpt + rope + dyt).without(rope) == gpt + dyt
    assert (gpt + rope).without(rope) == gpt
    with pytest.raises(UserError, match="not among the changes"):
        (gpt + rope).without(dyt)


def test_a_delta_that_changes_nothing_is_an_error():
    rms = gpt.fill("norm", RMSNorm)
    with pytest.raises(UserError, match="rms-norm changes nothing in gpt"):
        rms + rms_norm


def test_a_paper_is_written_once():
    with pytest.raises(UserError, match="has dyt already"):
        gpt + dyt + dyt(alpha=0.1)


def test_a_delta_that_erases_an_earlier_one_names_both():
    with pytest.raises(UserError, match="dyt erases all of rms-norm; keep one"):
        gpt + rms_norm + dyt


def test_whether_deltas_commute_is_computed():
    assert gpt + dyt + alibi == gpt + alibi + dyt
    assert gpt + dyt(alpha=0.1) + alibi != gpt + alibi + dyt


def test_the_sum_of_two_recipes_is_refused():
    with pytest.raises(UserError, match="is a recipe, not a change"):
        gpt + gpt
    with pytest.raises(UserError, match="3 is none"):
        gpt + 3


def test_diff_names_the_lines():
    assert diff(gpt, gpt + dyt) == [
        ("model.stack.entry", "Identity()", "Lift()"),
        ("model.stack.block.residual.norm", "LayerNorm()", "DyT()"),
        ("model.norm", "LayerNorm()", "DyT()"),
    ]
    assert diff(gpt, gpt) == []


def test_diff_sees_defaults_that_were_changed():
    assert diff(gpt, gpt.put("model.stack.depth", 5)) == [("model.stack.depth", "3", "5")]


class TestExpressions:
    def test_reads_what_the_library_writes(self):
        assert recipe("gpt+rope+dyt(alpha=0.8)") == gpt + rope + dyt(alpha=0.8)
        assert recipe(" gpt + rms-norm ") == gpt + rms_norm
        assert recipe("gpt+rms_norm(eps=1e-6)") == gpt + rms_norm(eps=1e-6)

    def test_a_recipe_takes_options_too(self):
        assert recipe("gpt(depth=5)+rope")["model.stack.depth"] == 5

    def test_titles_are_expressions(self):
        for text in ("gpt", "gpt+rope+dyt(alpha=0.8)"):
            assert recipe(text).title == text

    def test_settings(self):
        assert recipe("gpt", ["model.dim=48", "task.source=notes.md"])["task.source"] == "notes.md"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("gtp", "did you mean 'gpt'"),
            ("gpt+dty", "did you mean 'dyt'"),
            ("gpt++dyt", "cannot read"),
            ("", "cannot read"),
            ("gpt+dyt(0.8)", "name every argument"),
            ("gpt+dyt(alpha=0.8", "not closed"),
            ("gpt+dyt(alpha=open)", "numbers, words"),
            ("gpt+dyt(alhpa=1)", "did you mean 'alpha'"),
            ("dyt", "start with one, as in 'gpt"),
            ("gpt+gpt", "is a recipe, not a change"),
            ("gpt(detph=2)", "did you mean 'depth'"),
        ],
    )
    def test_mistakes_are_one_sentence(self, text, says):
        with pytest.raises(UserError) as error:
            recipe(text)
        assert says in str(error.value) and "\n" not in str(error.value)

    def test_unknown_settings_name_the_nearest(self):
        with pytest.raises(UserError, match=r"did you mean 'model.stack.depth'"):
            recipe("gpt", ["model.stack.dpeth=3"])
        with pytest.raises(UserError, match="path=value"):
            recipe("gpt", ["model.dim"])


def test_building_twice_gives_two_models():
    tree = gpt.put("model.dim", 12)
    build = lambda: tree().build({"vocab": 7, "context": 5})
    first, second = build(), build()
    assert not any(p is q for p in first.parameters() for q in second.parameters())
    assert [type(b) for b in first.stack.blocks] == [Block] * 3
