"""Every recipe, and every delta on the recipe that it is shown on, trains and is evaluated under bf16 autocast."""

import math

import pytest
import torch

from deltax import Part, catalog, recipe
from deltax.papers.detection.maskformer import pairs
from deltax.papers.generative.vq_vae import MovingCodebook, nearest
from deltax.papers.vision.self_supervised.moco import info_nce
from deltax.papers.vision.self_supervised.simclr import nt_xent
from deltax.papers.vision.video.tracks_to_4d import Scene, scene_of
from deltax.parts.attention.deformable import read
from deltax.parts.detection.masks import binary_cross_entropy, dice_of_pairs, semantic
from deltax.parts.numerics.precision import of_length_one, similarity
from deltax.tasks.multimodal.spoken_numbers import found_among
from deltax.train.initialise import construct
from deltax.train.job import Job, task_of
from deltax.train.loop import train
from deltax.train.machine import Machine

KNOWN = catalog.papers()
RECIPES = [key for key, record in KNOWN.items() if record.kind == "recipe"]
DELTAS = [f"{catalog.shown_on(record, KNOWN)}+{key}" for key, record in KNOWN.items() if record.kind == "delta"]
EVALUATE = {"gpt+sage-attention": "gpt", "gpt+sage-attention-2": "gpt"}  # no gradient: put in after training
AS_GPT = {"gpt+layer-norm"}  # gpt has it
HALF = Machine(precision=torch.bfloat16)

SMALL = {
    "loop.batch": 4, "task.held_out": 8, "task.context": 16, "task.images": 20, "task.groups": 2, "task.labels": 10,
    "task.examples": 64, "group": 4, "depth": 1, "stem_width": 8,
}  # fmt: skip


def small(tree: Part) -> Part:
    """The recipe with few examples and layers. Mask2Former's decoder reads three maps in three layers."""
    for path, value in list(tree.walk()):
        last = path.rpartition(".")[2]
        most = SMALL.get(path, SMALL.get(last))
        if most and isinstance(value, int) and value > most and path != "model.decoder.inner.depth":
            tree = tree.put(path, most)
        elif path.endswith("backbone.widths"):
            tree = tree.put(path, (8,) * len(value))
    return tree


@pytest.mark.parametrize("expression", sorted({*RECIPES, *DELTAS} - AS_GPT))
def test_it_trains_and_is_evaluated_under_autocast(expression):
    tree = small(recipe(EVALUATE.get(expression, expression)))
    outcome = train(Job(tree, steps=2, precision="bfloat16"), HALF)
    assert all(math.isfinite(loss) for _, loss in outcome.progress.losses) and not outcome.diverged
    model, tree = outcome.model, small(recipe(expression))
    assert all(p.dtype is torch.float32 and p.isfinite().all() for p in model.parameters())
    if expression in EVALUATE:
        weights, model = model.state_dict(), tree().build(task_of(tree).task_spec).eval()
        model.load_state_dict(weights, strict=False)
    with HALF.autocast():
        half = task_of(tree).evaluate(model, tree().objective)
    whole = task_of(tree).evaluate(model, tree().objective)
    # 8 bits in each product; where a network picks regions by their scores, near equals change places
    near = 0.05 if "faster" in expression else 0.01
    assert half.score == pytest.approx(whole.score, rel=near, abs=0.01)


def scene() -> Scene:
    return scene_of(torch.randn(2, 3, 11), torch.randn(2, 5, 10))


CASES = {
    "the nearest of many codes": lambda: nearest(torch.randn(500, 4), torch.randn(400, 4)),
    "a moving codebook": lambda: moved().table,
    "cosines": lambda: similarity(of_length_one(torch.randn(9, 16)), torch.randn(5, 16)),
    "InfoNCE": lambda: info_nce(torch.randn(9, 16), torch.randn(9, 16), torch.randn(7, 16)),
    "NT-Xent": lambda: nt_xent(torch.randn(9, 16), torch.randn(9, 16)),
    "what a mask costs": lambda: pairs(binary_cross_entropy, torch.randn(2, 2, 3, 300), mask(2, 4, 300)),
    "dice": lambda: dice_of_pairs(torch.randn(2, 2, 3, 300), mask(2, 4, 300)),
    "the class of each pixel": lambda: semantic(torch.randn(2, 3, 5), torch.randn(2, 3, 7, 7)),
    "cameras": lambda: scene().seen(),
    "words nearest to a sound": lambda: found_among(torch.randn(3, 20, 8), 1 + 0.01 * torch.randn(3, 20, 8)).values,
}


def moved() -> MovingCodebook:
    book = construct(MovingCodebook, 0)
    book(torch.randn(8, 16, 9))
    return book


def mask(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) > 0.5).float()


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing_where_8_bits_are_too_few(case):
    torch.manual_seed(0)
    plain = CASES[case]()
    torch.manual_seed(0)
    with HALF.autocast():
        assert_equal(CASES[case](), plain)


def assert_equal(ours, theirs) -> None:
    if isinstance(ours, tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_numbers_of_16_bits_are_computed_with_in_32():
    low = torch.randn(3, 50).bfloat16()
    assert similarity(low, low).dtype is torch.float32
    assert torch.equal(similarity(low, low), low.float() @ low.float().mT)
    at, weights = torch.rand(1, 9, 1, 1, 2, 2), torch.rand(1, 9, 1, 1, 2)
    table = low.view(1, 75, 1, 2)
    assert torch.equal(read(table, ((1, 75),), at, weights), read(table.float(), ((1, 75),), at, weights))
    assert similarity(low.double(), low.double()).dtype is torch.float64


def test_a_moving_codebook_trains():
    tree = small(recipe("vq-vae").fill("bottleneck", MovingCodebook))
    outcome = train(Job(tree, steps=2, precision="bfloat16"), HALF)
    assert not outcome.diverged and outcome.model.bottleneck.table.dtype is torch.float32
