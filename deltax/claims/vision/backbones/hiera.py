"""Claims of hiera: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import Part, claim, part
from deltax.claims.checking import assert_equal, faster, gradients, randomise, same_gradients
from deltax.claims.vision.self_supervised.mae import probe
from deltax.paper import paper_of
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.vision.backbones.hiera import NormedMean, OverlappingPatches, hiera
from deltax.papers.vision.backbones.q_pooled_attention import ZOrdered, q_pooled_attention
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.self_supervised.mae import mae, masked_error, random_masking, standardised
from deltax.parts.attention.context import Context
from deltax.parts.model.patches import LearnedGrid, Patches, patchify, unpatchify
from deltax.weights.vision.backbones.hiera import from_hf, pretraining_from_hf


@claim.parity(peer="transformers HieraPooler")
def the_mean_is_normed_after():
    """The classifier's pool is transformers', the norm of the mean and not the mean of norms."""
    from transformers import HieraConfig
    from transformers.models.hiera.modeling_hiera import HieraPooler

    theirs = HieraPooler(
        HieraConfig(embed_dim=3, depths=[1, 1], num_heads=[1, 1], num_query_pool=1, layer_norm_eps=1e-5)
    ).double()
    ours = NormedMean(6, norm=part(LayerNorm)).double()
    for ours_has, theirs_has in ((ours.norm.gain, theirs.layernorm.weight), (ours.norm.bias, theirs.layernorm.bias)):
        nn.init.normal_(theirs_has)
        ours_has.data.copy_(theirs_has)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), ours.norm(x).mean(1))


@claim
def a_unit_is_attended_as_if_alone():
    """Attention in mask units is attention on each unit's own patches, its gradients too, pooled or not; and one unit
    of the whole stream is the inner attention, to the bit."""
    trunk = randomise(_tiny["model.trunk"](2, (8, 12)))
    for mixer in (trunk.stack.stages[0].blocks[0].mixer, trunk.stack.merges[0].mixer):
        x = torch.randn(2, 96, 6, dtype=torch.float64, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        alone = torch.cat([mixer.inner(unit, Context()) for unit in other.split(16, 1)], 1)
        same_gradients(mixer(x, Context()), alone)
        torch.testing.assert_close(x.grad, other.grad)
        assert torch.equal(mixer(x[:, :16], Context()), mixer.inner(x[:, :16], Context()))


@claim
def what_is_not_seen_does_not_reach_what_is():
    """Whatever stands in the masked units, NaN included, the latents of the others are the same to the bit, through
    pooling, through stages that see everything, and through convolutions that reach over the border."""
    for patches in (part(Patches, patch=1), part(OverlappingPatches, patch=1, reach=3)):
        recipe = _masked.set(ZOrdered, inner=patches)
        model = randomise(recipe["model"](2, (8, 12)))
        images, kept = torch.randn(2, 2, 8, 12, dtype=torch.float64), random_masking(torch.rand(2, 6), 0.5)
        hidden = torch.ones(2, 6, dtype=torch.bool).scatter(1, kept, False)
        other = unpatchify(patchify(images, 4).masked_fill(hidden[..., None], torch.nan), 4, (2, 3))
        assert model.encode(images, kept).shape == (2, 3, 24)
        assert torch.equal(model.encode(other, kept), model.encode(images, kept))


@claim
def the_first_stages_do_not_see_across_units():
    """Before the first stage that is not local, a unit's elements depend on its own pixels alone; after it on all."""
    trunk = randomise(_tiny["model.trunk"](1, (8, 12)))
    images = torch.randn(1, 1, 8, 12, dtype=torch.float64, requires_grad=True)
    for stage, x in enumerate(trunk.stack.each(trunk.tokens(images), Context())):
        seen = torch.autograd.grad(x[0, 0].sum(), images, retain_graph=True)[0][0, 0].abs() > 0
        assert seen[:4, :4].all() and seen[4:].any() == (stage == 2) == seen[:, 4:].any()


@claim.parity(peer="transformers HieraModel")
def equals_transformers():
    """The same random weights give transformers' stream, pooled features and gradients on images that are not
    square."""
    from transformers import HieraModel

    recipe = _like(paper_of(vit)(dim=48, heads=8), (1, 2, 2, 1))
    theirs = randomise(HieraModel(_config(depths=[1, 2, 2, 1])))
    trunk = recipe["model.trunk"](2, (32, 64)).double()
    layout = {"grid": (8, 16), "levels": 3, "local": 2}
    trunk.load_state_dict(from_hf(theirs.state_dict(), **layout))
    pool = recipe["model.pool"](48).double()
    last = theirs.pooler.layernorm
    pool.load_state_dict({"norm.gain": last.weight.detach(), "norm.bias": last.bias.detach()})
    images = torch.randn(2, 2, 32, 64, dtype=torch.float64)
    peer = theirs(images)
    torch.testing.assert_close(trunk(images), peer.last_hidden_state)
    same_gradients(pool(trunk(images)), peer.pooler_output)
    assert_equal(gradients(trunk), from_hf(gradients(theirs), **layout))


@claim.parity(peer="transformers HieraForPreTraining")
def equals_transformers_pretraining():
    """The same random weights and noise give the pixels, loss and gradients of transformers' masked pre-training, its
    fusion of stages included."""
    from transformers import HieraForPreTraining

    config = _config(
        depths=[1, 1, 1, 1], decoder_hidden_size=8, decoder_depth=2, decoder_num_heads=2, mask_ratio=0.5
    )  # fmt: skip
    theirs = randomise(HieraForPreTraining(config))
    recipe = _like(paper_of(vit)(dim=48, heads=8) + mae(ratio=0.5, dim=8, depth=2, heads=2), (1, 1, 1, 1))
    recipe = recipe.put("model.pixel_decoder.position", part(LearnedGrid))
    ours = recipe["model"](2, (32, 64)).double()
    layout = {"grid": (8, 16), "levels": 3, "local": 2}
    ours.load_state_dict(pretraining_from_hf(theirs.state_dict(), **layout))
    images, noise = torch.randn(2, 2, 32, 64, dtype=torch.float64), torch.rand(2, 2)
    said, peer = ours(images, noise), theirs(images, noise=noise)
    torch.testing.assert_close(masked_error(said, standardised(patchify(images, 32))).mean(), peer.loss)
    same_gradients(said.pixels, peer.logits)
    assert_equal(gradients(ours), pretraining_from_hf(gradients(theirs), **layout))


@claim.measured(paper="more accurate than previous models, and simpler (abstract); Hiera-B 84.5 ImageNet top-1")
def a_pyramid_learns_as_much_for_less(lab):
    """Pre-trained by MAE on digits, one patch a pixel and masked in units of four, the pyramid's features tell digits
    apart by a linear map less than 2 points worse than a plain ViT's of as many blocks, pre-trained on patches of the
    same size as the units."""
    gaps, right = [], {"ViT": [], "Hiera": []}
    recipes = {"ViT": vit + mae, "Hiera": paper_of(vit)(patch=1) + mae + q_pooled_attention + hiera}
    for seed in lab.seeds(3):
        for name, recipe in recipes.items():
            run = lab.train(recipe, seed=seed)
            right[name].append(probe(run.model, run.task))
        gaps.append(100 * (right["ViT"][-1] - right["Hiera"][-1]))
    return lab.at_most(gaps, 2.0, unit="points of accuracy", numbers=right)


@claim.measured(paper="significantly faster both at inference and during training (abstract)")
def a_pyramid_is_faster(lab):
    """Forward and backward over 256 patches, both with the reference attention, takes a plain ViT of as many blocks and
    the same last width at least twice as long.

    A first version asked this of 1024 patches.
    """
    images, plain_vit = torch.randn(8, 1, 32, 32), paper_of(vit)(dim=128, depth=4, patch=2)
    recipes = (plain_vit + q_pooled_attention(depths=(1, 1, 2)) + hiera, plain_vit)
    trunks = [recipe["model.trunk"](1, 32) for recipe in recipes]
    found = lab.ratio(*(lambda trunk=trunk: trunk(images).sum().backward() for trunk in trunks))
    return lab.verdict(faster(found, 2.0), estimate=found.value, interval=found, unit="times the time")


def _config(**given):
    from transformers import HieraConfig

    return HieraConfig(image_size=[32, 64], num_channels=2, embed_dim=6, num_heads=[1, 2, 4, 8], **given)


def _like(recipe: Part, depths: tuple[int, ...]) -> Part:
    """A recipe with patches, stages and units of the released models."""
    recipe = recipe + q_pooled_attention(depths=depths) + hiera(local=2)
    return recipe.set(ZOrdered, inner=OverlappingPatches)


_small = paper_of(vit)(dim=24, heads=4, patch=1)
_tiny = _small + q_pooled_attention(depths=(1, 2, 2)) + hiera(local=2)
_masked = _small + mae(dim=8, heads=2) + q_pooled_attention(depths=(1, 2, 2)) + hiera(local=2)
