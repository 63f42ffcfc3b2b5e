"""Claims of mlp-mixer: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import claim
from deltax.claims.checking import randomise, same_gradients
from deltax.paper import paper_of
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.vision.backbones.mlp_mixer import mlp_mixer
from deltax.papers.vision.backbones.vit import mean_pooled, vit
from deltax.parts.attention.context import Context
from deltax.parts.model.identity import Identity
from deltax.parts.model.mlp import gelu
from deltax.parts.model.stack import Block
from deltax.shapes import Stream


@claim
def is_the_equation():
    """A block is Eq. 1 written out, its gradients too: U = X + (W2 gelu(W1 LN(X)^T))^T, then Y = U + W4 gelu(W3
    LN(U))."""
    block, x = _block()
    x.requires_grad_()
    other = x.detach().clone().requires_grad_()
    layer = lambda linear, y: y @ linear.weight.T + linear.bias
    mixing = lambda mlp, y: layer(mlp.down, gelu(layer(mlp.up, y)))
    u = other + mixing(block.mixer.mlp, block.mixer_residual.norm(other).transpose(1, 2)).transpose(1, 2)
    same_gradients(block(x, Context()), u + mixing(block.mlp, block.mlp_residual.norm(u)))
    torch.testing.assert_close(x.grad, other.grad)


@claim
def every_feature_is_mixed_alike_and_alone():
    """Permuting the features of what is mixed permutes what comes out, and does nothing else; no feature's output
    depends on another feature."""
    block, x = _block()
    mixing, order = block.mixer, torch.randperm(7)
    torch.testing.assert_close(mixing(x[..., order]), mixing(x)[..., order])
    jacobian = torch.autograd.functional.jacobian(mixing, x[:1])[0, :, :, 0]
    across = jacobian.abs().amax((0, 2))
    assert torch.equal(across > 0, torch.eye(7, dtype=torch.bool))


@claim
def places_are_known_without_position_vectors():
    """Shuffling the patches does more than shuffle the stream, where attention without positions does no more."""
    for delta, knows in ((mlp_mixer(context=6), True), (mean_pooled, False)):
        recipe = (paper_of(vit)(dim=12, depth=2, heads=3, patch=3) + delta).fill("position", Identity)
        trunk = randomise(recipe["model.trunk"](2, (6, 9)))
        tokens, order = torch.randn(2, 6, 12, dtype=torch.float64), torch.tensor([3, 0, 5, 1, 2, 4])
        assert torch.allclose(trunk.read(tokens[:, order]), trunk.read(tokens)[:, order]) != knows


@claim.measured(paper="Mixer-H/14 on JFT-300M 87.94 against ViT-H/14 88.55 ImageNet top-1 (Table 2)")
def nearly_as_good_as_attention(lab):
    """With as many parameters, 6 blocks against 4, the mixer's accuracy on held-out digits is less than 3 points below
    ViT's."""
    gaps, numbers = [], {"ViT": [], "mixer": []}
    for seed in lab.seeds(3):
        runs = {"ViT": vit, "mixer": paper_of(vit)(depth=6) + mlp_mixer}
        right = {name: lab.train(recipe, seed=seed).evaluation.metrics["accuracy"] for name, recipe in runs.items()}
        gaps.append(100 * (right["ViT"] - right["mixer"]))
        numbers = {name: [*numbers[name], right[name]] for name in right}
    return lab.at_most(gaps, 3.0, unit="points", numbers=numbers)


def _block() -> tuple[Block, Stream]:
    block = (vit + mlp_mixer(context=5))["model.trunk.stack.block"](7)
    assert not any(isinstance(m, Attention) for m in block.modules())
    return randomise(block), torch.randn(2, 5, 7, dtype=torch.float64)
