"""A recipe's title is what its tree holds: of whatever deltas are added, each is there whole, or the sum is refused."""

import random
from collections import Counter
from functools import cache
from itertools import permutations

import pytest

from deltax import Part, UserError, catalog, diff, paper, part, recipe
from deltax.expression import load
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.dyt import DyT, dyt
from deltax.papers.language.norm.rms_norm import RMSNorm, rms_norm
from deltax.papers.language.position.rope import rope
from deltax.papers.language.post_training.grpo import grpo
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.papers.optimization.local_updates.local_sgd import local_sgd
from deltax.papers.optimization.local_updates.nesterov_outer import outer_nesterov
from deltax.papers.optimization.optimizers.adamw import adamw
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.self_supervised.mae import mae
from deltax.parts.training.optimizers import adamw as adamw_optimizer
from deltax.parts.training.optimizers import sgd as sgd_optimizer
from deltax.recipe import takes

PAIRS, TRIPLES = 400, 400
"""Sums tried on bases other than gpt, besides every pair on gpt."""


@cache
def deltas():
    return {key: load(key) for key, record in catalog.papers().items() if record.kind == "delta"}


@cache
def bases():
    return {key: load(key) for key, record in catalog.papers().items() if record.kind == "recipe"}


@cache
def alone(base, key):
    """A base and one delta; None where it cannot stand on that base."""
    try:
        return bases()[base] + deltas()[key]
    except UserError:
        return None


def held(tree, *, with_defaults=False):
    """(path, argument, what is there) of all that a tree decides, but for the defaults that parts bring along.

    Worked out from the trees alone, so that it knows nothing of the marks that `+` goes by.
    """
    found = Counter()

    def look(value, path):
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                look(item, f"{path}.{i}")
        if not isinstance(value, Part):
            return
        for name, inner in value.kwargs:
            here = path if name == "inner" else f"{path}.{name}"
            known, name = takes(value.target).get(name), here.rpartition(".")[2]
            if isinstance(inner, Part) and (with_defaults or not (known and known.default == inner)):
                found[here, name, inner.target] += 1
            elif not isinstance(inner, Part | tuple):
                found[here, name, inner] += 1
            look(inner, here)

    look(tree, "")
    return found


ADAPTS = {"topk-compression": "exchange"}
"""Deltas that write less where a recipe has this slot already: they fill it, and leave the rest as it is."""


def anywhere(marks):
    return Counter((name, what) for _, name, what in marks)


@cache
def writes(base, key):
    """What a delta writes on a base that was nowhere in it, and how often each is anywhere."""
    before, after = held(bases()[base], with_defaults=True), held(alone(base, key))
    copied = anywhere(before)
    return [mark for mark in after if mark not in before and not copied[mark[1:]]], anywhere(after)


def missing(base, key, tree):
    """What a delta writes on a base and `tree` lacks: at its place, and moved to another place too."""
    written, theirs = writes(base, key)
    now = held(tree)
    lost = [mark for mark in written if mark not in now]
    ours = anywhere(now) if lost else theirs
    return [m for m in lost if ours[m[1:]] < theirs[m[1:]]], written


def check(base, tree):
    papers = [applied.paper for applied in tree.history[len(bases()[base].history) :]]
    for i, one in enumerate(papers):
        adapted = i and ADAPTS.get(one.key) in tree.slots()
        if adapted or alone(base, one.key) is None:
            continue
        lost, written = missing(base, one.key, tree)
        if any(one in later.replaces for later in papers[i + 1 :]):
            assert len(lost) < len(written), f"nothing of {one.key} is in {tree.title}"
        else:
            assert not lost, f"{tree.title} lacks {lost} of {one.key}"


def test_every_pair_on_gpt_is_honest_or_refused():
    stand = [key for key in deltas() if alone("gpt", key) is not None]
    honest = 0
    for a, b in permutations(stand, 2):
        try:
            tree = alone("gpt", a) + deltas()[b]
        except UserError as error:
            assert "\n" not in str(error)
            continue
        check("gpt", tree)
        honest += 1
        if honest % 10 == 0:
            assert recipe(tree.title) == tree, tree.title
    assert honest > len(stand) ** 2 / 2, "most deltas leave each other alone"


@pytest.mark.parametrize(("count", "tried"), [(2, PAIRS), (3, TRIPLES)])
def test_pairs_and_triples_on_any_base_are_honest_or_refused(count, tried):
    draw, honest = random.Random(20251201 + count), 0
    for _ in range(tried):
        base = draw.choice(sorted(bases()))
        tree = bases()[base]
        try:
            for key in draw.sample(sorted(deltas()), count):
                tree = tree + deltas()[key]
        except UserError:
            continue
        check(base, tree)
        honest += 1
        assert recipe(tree.title) == tree, tree.title
    assert honest > tried / 40  # most triples are refused, by contracts or because they erase


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpt+dyt+rms-norm", "rms-norm erases part of dyt; .*model.stack.block.residual.norm: DyT becomes RMSNorm"),
        ("gpt+rope+softmax-attention", "softmax-attention erases part of rope; .*qk_position: Rotary becomes Identity"),
        ("gpt+lora+softmax-attention", "softmax-attention erases part of lora; .*query: LoRA becomes Linear"),
        ("gpt+bpt+flash-attention", "flash-attention erases part of bpt; .*kernel: flash_attention_2 becomes"),
        ("gpt+dropout+swiglu", "swiglu erases part of dropout; .*mlp: BranchDropout becomes SwiGLU"),
        ("gpt+adamw(lr=0.01)+sgd(lr=0.01)", "erases all of adamw.*optimizer: adamw becomes sgd"),
        ("gpt+local-sgd+diloco", "optimizer of gpt.local-sgd is inside LocalSteps already"),
    ],
)
def test_lies_of_before_are_refused(text, says):
    with pytest.raises(UserError, match=says) as error:
        recipe(text)
    assert "\n" not in str(error.value)


def test_a_block_filled_anew_loses_no_paper_silently():
    def new_block(tree):
        return tree.fill("block", part(Boxed, name="new"))

    for changed in ("gpt+bpt", "gpt+rope", "gpt+lora", "gpt+dropout"):
        with pytest.raises(UserError, match="new_block erases"):
            recipe(changed) + new_block
    assert (recipe("gpt+muon") + new_block).title == "gpt+muon+new_block"


class Boxed:
    def __init__(self, dim, *, name="old", lr=0.7):
        self.dim, self.name, self.lr = dim, name, lr


# What is written


def test_a_default_that_is_written_wins_over_what_was_kept():
    trained = gpt + diloco(outer_lr=0.5)
    assert trained.fill("outer", part(outer_nesterov, lr=0.7))["optimizer.outer.lr"] == 0.7
    assert trained.fill("outer", outer_nesterov, lr=0.7)["optimizer.outer.lr"] == 0.7
    assert trained.fill("outer", part(outer_nesterov))["optimizer.outer.lr"] == 0.5, "nothing was said of the rate"
    again = part(part(outer_nesterov, lr=0.9), lr=0.7)
    assert trained.fill("outer", again)["optimizer.outer.lr"] == 0.7


def test_what_was_written_is_not_compared():
    bare, said = part(outer_nesterov), part(outer_nesterov, lr=0.7)
    assert bare == said and hash(bare) == hash(said) and bare.id == said.id and repr(bare) == repr(said)
    assert bare.written.keys() < said.written.keys()


def test_an_earlier_default_that_was_written_is_not_taken_over():
    declared = gpt.fill("optimizer", adamw_optimizer, lr=1e-3)
    assert (declared + adamw).title == "gpt+adamw"
    with pytest.raises(UserError, match="sgd erases all of adamw"):
        gpt + adamw + sgd
    assert gpt.fill("optimizer", sgd_optimizer)["optimizer"].target is sgd_optimizer


def test_a_required_argument_may_be_none():
    assert dict(part(Needs, this=None).kwargs) == {"this": None}


class Needs:
    def __init__(self, this):
        self.this = this


# What a paper replaces


def delta_of(function, **words):
    return paper(year=2001, **words)(function)


def test_what_is_replaced_whole_leaves_the_title():
    def newer_norm(recipe: Part) -> Part:
        return recipe.fill("norm", DyT)

    def half_norm(recipe: Part) -> Part:
        return recipe.put("model.norm", part(DyT))

    newer, half = delta_of(newer_norm, replaces=rms_norm), delta_of(half_norm, replaces=rms_norm)
    assert [c.paper.function for c in (gpt + rms_norm + newer).history[1:]] == [newer_norm]
    assert gpt + rms_norm + newer == gpt + newer
    kept = gpt + rms_norm + half
    assert [c.paper.function for c in kept.history[1:]] == [rms_norm.function, half_norm]
    assert {kept["model.norm"].target, kept["model.stack.block.residual.norm"].target} == {DyT, RMSNorm}
    with pytest.raises(UserError, match="erases all of rms-norm"):
        gpt + rms_norm + delta_of(newer_norm)


def test_only_deltas_replace_and_are_replaced():
    for wrong in (gpt, "rms-norm", (rms_norm, gpt)):
        with pytest.raises(UserError, match="only a delta replaces, and only deltas"):
            delta_of(lambda recipe: recipe, replaces=wrong)


def test_the_catalogue_reads_what_a_paper_replaces():
    for key, record in catalog.papers().items():
        if record.kind == "delta":
            assert record.replaces == tuple(x.key for x in load(key).replaces), key
    assert catalog.find("prime-rl").replaces == ("grpo",)
    assert recipe("lenet-1989+cross-entropy+entropy-minimisation").title == "lenet-1989+entropy-minimisation"


# What was set outside the story


def test_without_sets_again_what_was_set_by_hand():
    changed = (gpt + rope).put("model.stack.depth", 5) + dyt(alpha=0.3)
    assert changed.without(rope) == gpt.put("model.stack.depth", 5) + dyt(alpha=0.3)
    assert changed.without(dyt(alpha=0.3)) == (gpt + rope).put("model.stack.depth", 5)
    later = recipe("gpt+rope", ["optimizer.lr=0.01", "loop.steps=7"])
    assert later.without(rope) == recipe("gpt", ["optimizer.lr=0.01", "loop.steps=7"])
    by_role = (gpt + rope).fill("norm", RMSNorm)
    assert by_role.without(rope) == gpt.fill("norm", RMSNorm)
    pictures = (vit + mae).put("model.trunk.dim", 32)
    with pytest.raises(UserError, match="not among"):
        pictures.without(rope)


def test_without_refuses_by_name_what_has_no_place_any_more():
    with pytest.raises(
        UserError, match=r"model.norm.alpha=0.1 was set by hand in gpt\+dyt and has no place without dyt"
    ):
        (gpt + dyt).put("model.norm.alpha", 0.1).without(dyt)
    with pytest.raises(UserError, match=r"optimizer\.every=3 was set by hand"):
        (gpt + local_sgd).put("optimizer.every", 3).without(local_sgd)
    with pytest.raises(UserError, match=r"batches\.group=3 was set by hand"):
        (gpt + grpo).put("batches.group", 3).without(grpo)


# What differs


def test_a_line_of_a_diff_is_about_one_part():
    known, seen = catalog.papers(), 0
    sums = [("maskformer", "mask2former"), ("mask2former", "maskformer"), ("gpt+rope", "gpt+dropout"), ("vit", "clip")]
    sums += [(shown, f"{shown}+{key}") for key in deltas() for shown in [catalog.shown_on(known[key], known)]]
    for one, other in sums:
        try:
            a, b = recipe(one), recipe(other)
        except UserError:
            continue
        for x, y in ((a, b), (b, a)):
            lines = diff(x, y)
            assert lines and not diff(x, x)
            for path, old, new in lines:
                assert len(old) <= 120 and len(new) <= 120, (path, old, new)
                assert old != new or " parts" in old
                there = x if new == "absent" else y
                assert not path or there[path] is not None
            seen += 1
    assert seen > 100


def test_a_diff_looks_through_a_wrap():
    assert diff(gpt, gpt.wrap("optimizer", Wrapped).put("optimizer.inner.lr", 0.5)) == [
        ("optimizer", "adamw()", "Wrapped()"),
        ("optimizer.inner.lr", "0.003", "0.5"),
    ]
    assert diff(gpt.wrap("optimizer", Wrapped), gpt.put("optimizer.lr", 0.5)) == [
        ("optimizer", "Wrapped()", "adamw(lr=0.5)"),
        ("optimizer.lr", "0.003", "0.5"),
    ]


class Wrapped:
    def __init__(self, parameters, *, inner):
        self.inner = inner(parameters)
