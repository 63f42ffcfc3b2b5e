"""Claims of mae: the paper's equations, parity with peers, and what it measures."""

import math
from typing import Any

import torch
from torch import nn

from deltax import claim
from deltax.claims.checking import assert_equal, faster, gradients, randomise, same_gradients
from deltax.paper import paper_of
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.self_supervised.mae import (
    Filled,
    MaskedAutoencoder,
    Pixels,
    fill_in,
    filled_in,
    keep,
    mae,
    masked_error,
    standardised,
    take,
)
from deltax.parts.model.patches import patchify, unpatchify
from deltax.shapes import Images
from deltax.tasks.images.digits import Batch
from deltax.weights.vision.self_supervised.mae import from_hf


def plain(patches: Pixels) -> Pixels:
    """The pixels themselves."""
    return patches


@claim
def the_encoder_does_not_see_what_is_masked():
    """Whatever stands in the masked patches, NaN included, the latents are the same to the bit; and what the encoder
    makes of seen patches is what a ViT makes of them alone."""
    model, images = _tiny()
    kept = keep(torch.rand(2, 6), 0.5)
    hidden = Filled(torch.empty(2, 6, 0), kept).masked
    other = unpatchify(patchify(images, 3).masked_fill(hidden[..., None], torch.nan), 3, (2, 3))
    latent = model.encode(images, kept)
    assert latent.shape == (2, 1 + 3, 12)
    assert torch.equal(model.encode(other, kept), latent)
    torch.testing.assert_close(model.trunk.read(take(model.trunk.tokens(images), kept)), latent)


@claim
def masking_nothing_is_the_vit():
    """With a ratio of 0 every patch is kept, and put back in order the latents are the ViT's."""
    model, images = _tiny()
    kept = keep(torch.rand(2, 6), 0.0)
    latent = model.encode(images, kept)
    order = kept.argsort(1)
    torch.testing.assert_close(torch.cat([latent[:, :1], take(latent[:, 1:], order)], 1), model.trunk(images))


@claim
def what_is_taken_is_put_back():
    """The decoder's gather and scatter undo each other: seen patches return to their places, and mask tokens stand
    everywhere else."""
    model, _ = _tiny()
    x, kept = torch.randn(2, 6, 12, dtype=torch.float64), keep(torch.rand(2, 6), 0.4)
    given = []
    model.pixel_decoder.stack.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.pixel_decoder(torch.cat([x[:, :1], take(x, kept)], 1), kept)
    entered = given[0][:, 1:] - model.pixel_decoder.position.table
    masked = Filled(x, kept).masked[..., None]
    expected = torch.where(masked, model.pixel_decoder.mask_token, model.pixel_decoder.enter(x))
    torch.testing.assert_close(entered, expected)


@claim
def only_masked_patches_are_learned():
    """The loss has no gradient for the pixels it says of seen patches, nor for their targets, and it is the mean over
    the others."""
    torch.manual_seed(0)
    said, target = torch.randn(2, 2, 7, 5, dtype=torch.float64).requires_grad_().unbind()
    filled = Filled(said, keep(torch.rand(2, 7), 0.6))
    loss = masked_error(filled, target)
    for gradient in torch.autograd.grad(loss.sum(), (said, target)):
        assert torch.equal(gradient.abs().amax(-1) > 0, filled.masked)
    torch.testing.assert_close(loss.mean(), (said - target)[filled.masked].square().mean())


@claim.parity(peer="transformers ViTMAEForPreTraining")
def equals_transformers():
    """The same random weights and noise give transformers' pixels, loss and gradients, and its fixed positions are
    ours."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=9, patch_size=3,
        num_channels=2, decoder_hidden_size=8, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, layer_norm_eps=1e-6, norm_pix_loss=True,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config)
    theirs.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False  # else its positions stay zero
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(9)
    places = [theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed]
    recipe = paper_of(vit)(dim=12, depth=2, heads=3, patch=3) + mae(dim=8, depth=2, heads=2)
    ours = recipe["model"](2, 9).double()
    tables = [ours.trunk.position.table, ours.pixel_decoder.position.table]
    for fixed, table in zip(places, tables, strict=True):
        torch.testing.assert_close(fixed[0, 1:].double(), table, rtol=0, atol=1e-7)
    randomise(theirs)
    for fixed, table in zip(places, tables, strict=True):
        fixed.data = nn.functional.pad(table, (0, 0, 1, 0))[None]
    ours.load_state_dict(from_hf(theirs.state_dict(), channels=2))

    images, noise = torch.randn(2, 2, 9, 9, dtype=torch.float64), torch.rand(2, 9)
    said, peer = ours(images, noise), theirs(images, noise=noise)
    torch.testing.assert_close(masked_error(said, standardised(patchify(images, 3))).mean(), peer.loss)
    logits = peer.logits.unflatten(-1, (9, 2)).mT.flatten(-2)
    torch.testing.assert_close(said.masked, peer.mask.bool())
    same_gradients(said.pixels, logits)
    yours = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    yours["vit.embeddings.position_embeddings"] = places[0].detach()  # fixed: without a gradient
    assert_equal(gradients(ours), from_hf(yours, channels=2))


@claim.measured(
    paper="with mask tokens in the encoder 3.3 times the FLOPs (Table 1c), and 2.8 times the time (Table 2)"
)
def a_sparse_encoder_costs_less(lab):
    """A training step on 256 patches with the reference attention, three in four of them masked, takes less than half
    as long as the same step of an encoder that is given all 256."""
    recipe = paper_of(vit)(dim=128, depth=4) + mae(ratio=0.75, dim=32)
    images, labels, steps = torch.randn(16, 1, 32, 32), torch.zeros(16), []
    for ratio in (0.75, 0.0):
        model = recipe.set(MaskedAutoencoder, ratio=ratio)["model"](1, 32)
        steps.append(lambda model=model: fill_in(model, Batch(images, labels)).sum().backward())
    found = lab.ratio(*steps)
    return lab.verdict(faster(found, 2.0), estimate=found.value, interval=found, unit="times the time")


@claim.measured(paper="linear probe 73.5 at 75 % masked against 54.6 at 10 % and 66.1 at 90 % (Figure 5)")
def much_must_be_masked(lab):
    """What the encoder learns of unlabelled digits with three in four patches masked tells them apart by a linear map
    at least half a point better than what it learns with one in four."""
    gains, numbers, figures = [], {}, {}
    for seed in lab.seeds(3):
        right = {}
        for ratio in (0.25, 0.5, 0.75, 0.9):
            run = lab.train(vit + mae(ratio=ratio), seed=seed)
            right[ratio] = probe(run.model, run.task)
            numbers.setdefault(f"probe, {ratio:.0%} masked", []).append(right[ratio])
            if ratio == 0.75 and not figures:
                caption = "Seen; filled in, given each hidden patch's true mean and deviation; true"
                figures = {caption: lab.figure(reconstructions(run.model, run.task))}
        gains.append(100 * (right[0.75] - right[0.25]))
    return lab.at_least(gains, 0.5, unit="points of accuracy", numbers=numbers, figures=figures)


@torch.no_grad()
def probe(model: MaskedAutoencoder, task: Any) -> float:
    """The held-out accuracy of a linear classifier on the mean over what the encoder makes of all patches."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    training, held_out = (task.all(split) for split in ("train", "validation"))
    features = lambda images: model.trunk(images)[:, model.trunk.prefix :].mean(1).numpy()
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return float(
        linear.fit(features(training.images), training.labels).score(features(held_out.images), held_out.labels)
    )


@torch.no_grad()
def reconstructions(model: MaskedAutoencoder, task: Any, *, count: int = 10) -> Any:
    """A matplotlib figure of held-out images: what is seen, what is filled in, what there is."""
    from matplotlib.figure import Figure

    images = task.all("validation").images[:count]
    noise = torch.rand(count, math.prod(model.trunk.grid), generator=torch.Generator().manual_seed(0))
    rows = filled_in(model, images, noise)
    figure = Figure(figsize=(0.6 * count, 2))
    for ax, (word, row) in zip(figure.subplots(3, 1), rows.items(), strict=True):
        ax.set_facecolor("0.7")
        ax.imshow(torch.cat(list(row[:, 0]), 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        ax.set_ylabel(word, rotation=0, ha="right", va="center")
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def _tiny() -> tuple[MaskedAutoencoder, Images]:
    recipe = paper_of(vit)(dim=12, depth=2, heads=3, patch=3) + mae(dim=8, heads=2)
    return randomise(recipe["model"](2, (6, 9))), torch.randn(2, 2, 6, 9, dtype=torch.float64)
