"""Claims of vit: the paper's equations, parity with peers, and what it measures."""

from typing import Any

import torch
from torch import nn

from deltax import claim, part
from deltax.claims.checking import assert_equal, gradients, randomise, same_gradients
from deltax.paper import paper_of
from deltax.papers.vision.backbones.vit import attention_maps, mean_pooled, resized, vit
from deltax.parts.model.identity import Identity
from deltax.parts.model.patches import Grid, ImageClassifier, Patches, patchify, unpatchify
from deltax.shapes import Images
from deltax.tasks.images.digits import Digits
from deltax.weights.vision.backbones.vit import from_hf, to_hf


@claim
def a_patch_embedding_is_a_convolution():
    """Cutting into patches and mapping each linearly is a convolution of that size and stride, its gradients too, and
    cutting loses nothing: the patches put together again are the image."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 15, dtype=torch.float64)
    patches = Patches(3, 7, patch=3).double()
    conv = nn.Conv2d(3, 7, 3, stride=3).double()
    patches.load_state_dict({"embed.weight": conv.weight.detach().flatten(1), "embed.bias": conv.bias.detach()})
    same_gradients(patches(images), conv(images).flatten(2).mT)
    torch.testing.assert_close(patches.embed.weight.grad, conv.weight.grad.flatten(1))
    assert torch.equal(unpatchify(patchify(images, 3), 3, (2, 5)), images)


@claim
def without_positions_a_picture_is_a_bag_of_patches():
    """Without positions, shuffling an image's patches shuffles the stream and leaves a mean-pooled classifier's logits
    as they were; with positions it changes them."""
    images = torch.randn(2, 2, 6, 9, dtype=torch.float64)
    order = torch.randperm(6)
    shuffled = unpatchify(patchify(images, 3)[:, order], 3, (2, 3))
    bag = mean_pooled(_tiny).fill("position", Identity)
    for recipe, same in ((bag, True), (mean_pooled(_tiny), False)):
        model = randomise(recipe().build({"channels": 2, "size": (6, 9), "classes": 5}))
        assert torch.allclose(model(shuffled), model(images)) == same
        assert torch.allclose(model.trunk(shuffled), model.trunk(images)[:, order]) == same


@claim.parity(peer="transformers ViTModel")
def equals_transformers():
    """The same random weights give transformers' stream and gradients on images that are not square, at their own size
    and, positions interpolated, at another; the weights go there and back unchanged."""
    from transformers import ViTConfig, ViTModel

    shape = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)

    def both(size: Grid) -> tuple[nn.Module, nn.Module]:
        config = ViTConfig(**shape, image_size=size, patch_size=3, num_channels=2, layer_norm_eps=1e-6)
        theirs = randomise(ViTModel(config, add_pooling_layer=False).double())
        ours = _tiny["model.trunk"](2, size).double()
        ours.load_state_dict(from_hf(theirs.state_dict()))
        return ours, theirs

    ours, theirs = both((9, 15))
    back = from_hf(to_hf(ours.state_dict(), channels=2))
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())

    images = torch.randn(2, 2, 9, 15, dtype=torch.float64)
    same_gradients(ours(images), theirs(images).last_hidden_state)
    peer = gradients(theirs)
    places = peer["embeddings.position_embeddings"]
    torch.testing.assert_close(places[:, :1], peer["embeddings.cls_token"])
    places[:, 0] = 0
    assert_equal(to_hf(gradients(ours), channels=2), peer)

    ours, theirs = both((9, 9))  # transformers interpolates from a square alone
    larger = _tiny["model.trunk"](2, (6, 15)).double()
    table = resized(ours.position.table.detach(), (3, 3), (2, 5))
    larger.load_state_dict({**ours.state_dict(), "position.table": table})
    images = torch.randn(2, 2, 6, 15, dtype=torch.float64)
    torch.testing.assert_close(larger(images), theirs(images, interpolate_pos_encoding=True).last_hidden_state)


@claim.measured(paper="ViT-L/16 below BiT when pre-trained on ImageNet-1k, above on JFT-300M (Figure 3)")
def with_little_data_convolutions_win(lab):
    """Trained on 100 digits, a ResNet of 8 layers with as many parameters is right on held-out ones at least 3 points
    more often than ViT."""
    return lab.at_least(_ahead(lab, 100), 3.0, unit="points of accuracy")


@claim.measured(paper="ViT-L/16 below BiT when pre-trained on ImageNet-1k, above on JFT-300M (Figure 3)")
def more_data_closes_the_gap(lab):
    """Trained on all 1250 digits or so, the ResNet's lead over ViT is at least 2 points smaller than on 100."""
    gaps = [few - many for few, many in zip(_ahead(lab, 100), _ahead(lab, 10_000), strict=True)]
    run = _trained(lab, "vit", 10_000, lab.seeds(1)[0])
    figure = lab.figure(attention_figure(run.model, run.task.all().images[:8]))
    return lab.at_least(gaps, 2.0, unit="points", figures={"What the class token looks at in the last block": figure})


def _ahead(lab, examples: int) -> list[float]:
    """Points of accuracy that a ResNet of 8 layers from width 26 has over ViT, for each seed."""
    right = lambda name, seed: _trained(lab, name, examples, seed).evaluation.metrics["accuracy"]
    return [100 * (right("resnet(n=1,width=26)", seed) - right("vit", seed)) for seed in lab.seeds(3)]


def _trained(lab, expression: str, examples: int, seed: int):
    return lab.train(lab.recipe(expression).put("task", part(Digits, examples=examples)), seed=seed, steps=300)


def attention_figure(model: ImageClassifier, images: Images) -> Any:
    """A matplotlib figure: images, and under each the mean over heads of `attention_maps`."""
    from matplotlib.figure import Figure

    maps = attention_maps(model.trunk, images).mean(1)
    figure = Figure(figsize=(0.7 * len(images), 1.6))
    axes = figure.subplots(2, len(images), squeeze=False)
    for (above, below), image, looked in zip(axes.T, images, maps, strict=True):
        above.imshow(image[0].numpy(), cmap="gray_r")
        below.imshow(looked.numpy(), cmap="magma", vmin=0)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure


_tiny = paper_of(vit)(dim=12, depth=2, heads=3, patch=3)
