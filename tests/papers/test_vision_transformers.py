"""Vision transformers: what their parts refuse, what they share, and that every recipe trains."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltax import UserError, part
from deltax.claims.checking import assert_equal, randomise
from deltax.claims.vision.backbones import vit as vit_claims
from deltax.claims.vision.self_supervised.mae import probe, reconstructions
from deltax.expression import recipe as read
from deltax.paper import paper_of
from deltax.papers.language.attention.softmax_attention import Attention, attend
from deltax.papers.language.models.transformer import sinusoids
from deltax.papers.vision.backbones import vit as vit_module
from deltax.papers.vision.backbones.hiera import InUnits, OverlappingPatches, hiera
from deltax.papers.vision.backbones.mlp_mixer import mlp_mixer
from deltax.papers.vision.backbones.q_pooled_attention import q_pooled_attention, z_order
from deltax.papers.vision.backbones.register_tokens import register_tokens
from deltax.papers.vision.backbones.swin import PatchMerging, RelativeBias, Windows, partition, regions, swin, unite
from deltax.papers.vision.backbones.vit import ViT, mean_pooled, resized, vit
from deltax.papers.vision.self_supervised.mae import (
    Filled,
    MaskedAutoencoder,
    keep,
    mae,
    masked_error,
    standardised,
    take,
)
from deltax.parts.attention.context import Context
from deltax.parts.model.patches import (
    ClassToken,
    GridSinusoids,
    LearnedGrid,
    Patches,
    patchify,
    unpatchify,
)
from deltax.parts.model.stack import Alternating, Block
from deltax.tasks.images.borders import Borders
from deltax.tasks.images.digits import DigitDrawings, Digits
from deltax.tasks.images.pictures import Drawings
from deltax.train.job import Job
from deltax.train.loop import train
from deltax.train.machine import Machine
from deltax.weights.vision.backbones import vit as vit_weights

RECIPES = [
    "vit",
    "vit+register-tokens",
    "vit+mlp-mixer",
    "vit+swin",
    "vit+swin(window=3,depths=(1,1))",
    "vit+q-pooled-attention",
    "vit+q-pooled-attention+hiera",
    "vit+mae",
    "vit+mae+register-tokens",
    "vit(patch=1)+mae+q-pooled-attention+hiera",
    "vit+rope",
    "vit+rms-norm",
    "vit+register-tokens+swiglu",
]


@pytest.mark.parametrize("expression", RECIPES)
def test_every_recipe_trains(expression):
    machine = replace(Machine.here(), threads=1)
    outcome = train(Job(read(expression).put("loop.batch", 8), 0, 2, 1.0), machine)
    assert not outcome.diverged
    assert all(p.grad is None or p.grad.isfinite().all() for p in outcome.model.parameters())


@pytest.mark.parametrize("expression", RECIPES)
def test_every_parameter_learns(expression):
    run = read(expression)
    task = run["task"]()
    torch.manual_seed(0)
    model = randomise(run().build(task.facts)).float()
    run["objective"](model, task.batch(0, size=4, seed=0)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert not [name for name in silent if not name.endswith("key.bias")], silent


@pytest.mark.parametrize(("rows", "columns", "patch"), [(1, 1, 1), (3, 5, 2), (2, 1, 7)])
def test_patches_are_cut_row_by_row_and_put_back(rows, columns, patch):
    images = torch.randn(2, 3, rows * patch, columns * patch)
    cut = patchify(images, patch)
    assert cut.shape == (2, rows * columns, 3 * patch**2)
    assert torch.equal(unpatchify(cut, patch, (rows, columns)), images)
    corner = images[1, :, -patch:, -patch:]
    assert torch.equal(cut[1, -1], corner.flatten())


def test_an_image_must_be_made_of_patches():
    with pytest.raises(UserError, match="10 x 9 pixels is not made of patches of 4 x 4; set patch"):
        Patches(1, 8, patch=4).grid((10, 9))
    with pytest.raises(UserError, match="stride 4"):
        OverlappingPatches(1, 8).grid(10)


def test_an_image_must_have_the_size_the_model_was_built_for():
    trunk = vit["model.trunk"](1, 8)
    with pytest.raises(UserError, match="resized"):
        trunk(torch.randn(1, 1, 8, 10))


def test_positions_of_some_patches_are_those_of_the_grid():
    x, kept = torch.zeros(2, 3, 8), torch.tensor([[5, 0, 2], [1, 4, 3]])
    for position in (LearnedGrid(8, (2, 3)), GridSinusoids(8, (2, 3))):
        everything = position(torch.zeros(2, 6, 8), Context())
        assert torch.equal(position(x, Context(positions=kept)), take(everything, kept))


def test_grid_sinusoids_are_those_of_rows_and_columns():
    table = GridSinusoids(12, (3, 5)).table.unflatten(0, (3, 5))
    split = lambda waves: torch.cat([waves[..., 0::2], waves[..., 1::2]], -1)
    for row, column in ((0, 0), (2, 4), (1, 3)):
        x, y = (split(sinusoids(torch.tensor(float(at)), 6)) for at in (column, row))
        torch.testing.assert_close(table[row, column], torch.cat([x, y]))
    with pytest.raises(UserError, match="multiple of 4, not 6"):
        GridSinusoids(6, (2, 2))


def test_resizing_to_the_same_grid_changes_nothing():
    table = torch.randn(15, 7, dtype=torch.float64)
    torch.testing.assert_close(resized(table, (3, 5), (3, 5)), table)
    assert resized(table, (3, 5), (6, 4)).shape == (24, 7)


def test_mean_pooling_is_a_delta():
    recipe = vit + mean_pooled
    assert recipe["model.pool"] != vit["model.pool"]
    assert recipe["model.trunk"](1, 8).prefix == 0 and vit["model.trunk"](1, 8).prefix == ClassToken.count == 1
    with pytest.raises(UserError, match="changes nothing"):
        recipe.put("loop.batch", 32) + mean_pooled_again


def mean_pooled_again(recipe):
    return mean_pooled(recipe)


def test_weights_of_a_classifier_are_taken_without_its_head():
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    shape = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, patch_size=2)
    theirs = ViTForImageClassification(ViTConfig(**shape, image_size=4, num_channels=1))
    state = vit_weights.from_hf(theirs.state_dict())
    bare = {k.removeprefix("vit."): v for k, v in theirs.state_dict().items() if k.startswith("vit.")}
    assert_equal(state, vit_weights.from_hf(bare))
    paper_of(vit)(dim=12, depth=2, heads=3)["model.trunk"](1, 4).load_state_dict(state)
    peer = ViTModel(ViTConfig(**shape, image_size=4, num_channels=1), add_pooling_layer=False)
    peer.load_state_dict(vit_weights.to_hf(state, channels=1))


def test_what_the_class_token_looks_at():
    model = randomise(paper_of(vit)(dim=12, depth=2, heads=3)["model"](1, 4, 5))
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    given = []
    attention = model.trunk.stack.blocks[1].mixer
    attention.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    maps = vit_module.attention_maps(model.trunk, images)
    q, k, _ = attention.project.split(given[0])
    scores = torch.einsum("bhk,bshk->bhs", q[:, 0], k) / 2
    torch.testing.assert_close(maps.flatten(2), scores.softmax(-1)[..., 1:])
    assert attention.kernel == part(attend)
    assert len(vit_claims.attention_figure(model.float(), images.float()).axes) == 6


def test_registers_leave_positions_alone():
    trunk = randomise((vit + register_tokens)["model.trunk"](1, 8))
    tokens = torch.randn(1, 16, 64, dtype=torch.float64)
    positions = torch.arange(17)
    torch.testing.assert_close(trunk.read(tokens, Context(positions=positions)), trunk.read(tokens))


def test_registers_refuse_a_stack_that_pools():
    with pytest.raises(UserError, match="WithRegisters cannot have a PooledBlock in it"):
        vit + q_pooled_attention + register_tokens


def test_a_mixer_says_how_many_patches_it_takes():
    trunk = (paper_of(vit)(patch=1) + mlp_mixer)["model.trunk"](1, 8)
    with pytest.raises(UserError, match=r"64 patches for a mixer of 16: write mlp_mixer\(context=64\)"):
        trunk(torch.randn(1, 1, 8, 8))


# Swin


@pytest.mark.parametrize(("rows", "columns", "side"), [(4, 6, 2), (3, 9, 3), (5, 5, 1)])
def test_windows_are_cut_and_put_back(rows, columns, side):
    maps = torch.randn(2, rows, columns, 3)
    windows = partition(maps, side)
    assert torch.equal(windows[0], maps[0, :side, :side].flatten(0, 1))
    assert torch.equal(unite(windows, side, (rows, columns)), maps)


def test_regions_differ_where_the_roll_joined_edges():
    found = regions((4, 6), 2, 1)
    assert found.shape == (6, 4)
    assert [len(set(window.tolist())) for window in found] == [1, 1, 2, 2, 2, 4]


@pytest.mark.parametrize("grid", [(7, 10), (4, 4), (2, 9), (13, 5)])
@pytest.mark.parametrize("shift", [0, 2])
def test_windows_keep_the_grid_and_rows_of_attention_sum_to_one(grid, shift):
    mixer = randomise(part(Windows, inner=part(Attention, heads=2), window=4, shift=shift)(8))
    with torch.no_grad():
        mixer.inner.project.value.weight.zero_()
        mixer.inner.project.value.bias.fill_(1.0)
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    out = mixer(x, Context(grid=grid))
    torch.testing.assert_close(out, mixer.inner.project.out(torch.ones_like(x)))


def test_windows_say_what_they_need():
    with pytest.raises(UserError, match="shift by 0 to 3"):
        Windows(8, inner=part(Attention), window=4, shift=4)
    mixer = Windows(8, inner=part(Attention), window=4)
    for ctx in (Context(), Context(grid=(4, 4))):
        with pytest.raises(UserError, match="leave out what stands before or behind"):
            mixer(torch.randn(1, 17, 8), ctx)


def test_a_bias_is_that_of_the_offset():
    bias = RelativeBias(2, window=3)
    torch.nn.init.normal_(bias.table)
    at = torch.arange(9)
    none = torch.zeros(1, 2, 9, 9)
    given = bias(none, torch.zeros(1), torch.arange(2)[:, None, None], at[:, None], at[None])[0]
    for q, k in ((0, 0), (4, 8), (8, 4), (2, 6)):
        index = (q // 3 - k // 3 + 2) * 5 + (q % 3 - k % 3 + 2)
        assert torch.equal(given[:, q, k], bias.table[index])
    assert torch.equal(given[:, 0, 4], given[:, 4, 8])


def test_merging_halves_odd_grids_upwards():
    x, ctx = PatchMerging(6)(torch.randn(2, 15, 6), Context(grid=(3, 5)))
    assert x.shape == (2, 6, 12) and ctx.grid == (2, 3)


def test_blocks_take_turns():
    block = vit["model.trunk.stack.block"]
    other = block.set(Attention, heads=2)
    stack = Alternating(64, depth=5, blocks=(block, other))
    heads = [b.mixer.project.heads for b in stack.blocks if isinstance(b, Block)]
    assert heads == [4, 2, 4, 2, 4] and stack.width == 64


# MAE and Hiera


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 10), (0.25, 7), (0.75, 2), (0.9, 1), (0.99, 1)])
def test_how_many_are_kept(ratio, count):
    noise = torch.rand(3, 10)
    kept = keep(noise, ratio)
    assert kept.shape == (3, count)
    assert all(len(set(row.tolist())) == count for row in kept)
    assert torch.equal(noise.gather(1, kept), noise.sort(1).values[:, :count])


def test_a_ratio_is_a_share():
    with pytest.raises(UserError, match=r"not 1\.5"):
        (vit + mae(ratio=1.5))["model"](1, 8)


def test_the_target_has_no_brightness_and_no_contrast():
    patches = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(standardised(3 * patches - 7), standardised(patches), rtol=1e-4, atol=1e-4)
    assert torch.equal(standardised(torch.ones(1, 2, 1)), torch.zeros(1, 2, 1))


def test_the_same_noise_masks_the_same():
    run = vit + mae
    task = run["task"]()
    assert isinstance(task, Drawings)
    model = run().build(task.facts).eval()
    batch = task.batch(0, size=4, seed=0)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(run["objective"](model, batch))
    assert losses[0].shape == (4,) and torch.equal(*losses)
    assert masked_error(Filled(torch.zeros(1, 4, 2), torch.tensor([[0, 1, 2, 3]])), torch.ones(1, 4, 2)).item() == 0


def test_a_figure_and_a_probe_of_an_untrained_model():
    torch.manual_seed(0)
    run = vit + mae
    task = DigitDrawings(held_out=40, examples=60)
    model = run().build(task.facts).eval()
    figure = reconstructions(model, task, count=3)
    assert len(figure.axes) == 3
    seen, filled, true = (ax.images[0].get_array() for ax in figure.axes)
    assert np.ma.masked_invalid(seen).mask.mean() == 0.75
    known = ~np.ma.masked_invalid(seen).mask
    assert (np.asarray(filled)[known] == np.asarray(true)[known]).all()
    assert 0.2 < probe(model, task) <= 1


@pytest.mark.parametrize(("grid", "levels"), [((4, 6), 1), ((8, 4), 2), ((3, 5), 0)])
def test_z_order_is_a_permutation(grid, levels):
    assert sorted(z_order(grid, levels)) == list(range(math.prod(grid)))


def test_units_must_fill_the_grid():
    with pytest.raises(UserError, match="6 x 6 patches is not made of units of 4 x 4"):
        (vit + q_pooled_attention(depths=(1, 1, 1)))["model.trunk"](1, 12)


def test_hiera_needs_stages():
    with pytest.raises(UserError, match=r"write vit\+q-pooled-attention\+hiera"):
        vit + hiera


def test_a_masked_pyramid_takes_whole_units():
    recipe = read("vit(patch=1)+mae+q-pooled-attention+hiera")
    model = recipe["model"](1, 8)
    assert isinstance(model, MaskedAutoencoder) and isinstance(model.trunk, InUnits)
    assert model.patch == 2 and model.trunk.grid == (4, 4)
    assert model(torch.randn(2, 1, 8, 8)).pixels.shape == (2, 16, 4)


def test_the_stack_decides_the_width():
    for delta in (swin, q_pooled_attention):
        trunk = (vit + delta)["model.trunk"](1, 8)
        assert isinstance(trunk, ViT)
        assert trunk.width == 64 and trunk(torch.randn(2, 1, 8, 8)).shape == (2, 4, 64)


# Tasks


def test_borders_are_drawn_from_their_key_alone():
    task = Borders(held_out=33)
    a, b = task.batch(7, size=16, seed=1), task.batch(7, size=16, seed=1)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, task.batch(8, size=16, seed=1).images)
    assert (a.images.abs().sum((1, 2, 3)) == 2).all() and (a.images[..., 3:5].abs().sum((1, 2, 3)) == 2).all()
    assert torch.equal(a.labels, (a.images.sum((1, 2, 3)) != 0).long())
    assert sum(len(batch.labels) for batch in task.held_out_batches(8)) == 33 == len(task.held_out_documents())
    assert task.fingerprint == Borders(held_out=33).fingerprint != Borders().fingerprint
    with pytest.raises(UserError, match="no split 'train'"):
        next(task.held_out_batches(8, "train"))
    with pytest.raises(UserError, match="even size, not 7"):
        Borders(size=7)


def test_digits_from_few_examples():
    few, everything = Digits(examples=5), Digits()
    drawn = few.batch(0, size=200, seed=0).images.flatten(1)
    assert len(drawn.unique(dim=0)) == 5 and len(few.all("train").labels) == 5
    assert torch.equal(few.all().labels, everything.all().labels)
    assert few.fingerprint != everything.fingerprint
    with pytest.raises(UserError, match="examples must be a whole number"):
        Digits(examples=0)
