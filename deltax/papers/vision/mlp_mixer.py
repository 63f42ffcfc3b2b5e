"""MLP-Mixer: An all-MLP Architecture for Vision. Tolstikhin, Houlsby, Kolesnikov, Beyer, Zhai, Unterthiner, Yung,
Steiner, Keysers, Uszkoreit, Lucic, Dosovitskiy, 2021. arXiv:2105.01601

A ViT, but patches are mixed by an MLP along the patch axis, with no attention.

The MLP that ViT has for features is used a second time with the axes swapped: every feature is a vector over patches,
and all features share one MLP. Each patch has its own weights in it, so positions need no vectors, and the number of
patches is fixed when the model is built. B/16 has 12 blocks of width 768 on 196 patches, with 384 hidden in the mixing.
"""

import torch
from torch import nn

from deltax import Part, UserError, claim, paper, part
from deltax.paper import paper_of
from deltax.papers.language.softmax_attention import Attention
from deltax.papers.vision.vit import mean_pooled, vit
from deltax.parts.checking import randomise, same_gradients
from deltax.parts.context import Context
from deltax.parts.linear import Glorot
from deltax.parts.mlp import MLP, gelu
from deltax.parts.nothing import Nothing
from deltax.parts.stack import Block
from deltax.shapes import Stream


class TokenMixing(nn.Module):
    """An MLP over the patches, the same for every feature (Eq. 1). Stream (B, T, D) -> (B, T, D), T = `context`.

    `context` is the number of patches; an image with another number raises UserError.
    """

    def __init__(self, dim: int, *, context: int = 16, mlp: Part = part(MLP, widen=2, activation=gelu)):
        super().__init__()
        self.context = context
        self.mlp = mlp(context)

    def forward(self, x: Stream, ctx: Context | None = None) -> Stream:
        if x.shape[1] != self.context:
            raise UserError(
                f"{x.shape[1]} patches for a mixer of {self.context}: write mlp_mixer(context={x.shape[1]})"
            )
        return self.mlp(x.mT).mT


@paper(on=vit, year=2021, arxiv="2105.01601")
def mlp_mixer(recipe: Part, *, context: int = 16, widen: float = 2) -> Part:
    mlp = part(MLP, widen=widen, up=Glorot, activation=gelu, down=Glorot)
    recipe = mean_pooled(recipe).fill("position", Nothing)
    return recipe.fill("mixer", TokenMixing, context=context, mlp=mlp)


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
        recipe = (paper_of(vit)(dim=12, depth=2, heads=3, patch=3) + delta).fill("position", Nothing)
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
