"""Sigmoid Loss for Language Image Pre-Training. Zhai, Mustafa, Kolesnikov, Beyer, 2023. arXiv:2303.15343

CLIP, but every image and every text of a batch are asked alone whether they belong together.

One yes or no a pair needs no sum over all the others, so no machine needs to hold all N x N scores: texts go round
from machine to machine, and each adds its part. Most answers are no, so a learned bias starts at -10 and the scale at
10: at the start nearly all pairs are told apart already, and the loss begins with the pairs that belong together. The
sum over pairs is divided by images, not by pairs. The released models also read the last place of a text that sees
all of itself, and gather an image's patches by attention: `released_towers`.
"""

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.paper import paper_of
from deltax.papers.language.softmax_attention import CrossAttention
from deltax.papers.multimodal.clip import HF as CLIP
from deltax.papers.multimodal.clip import clip, hf_name, squares, tiny
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.papers.vision import vit as vision
from deltax.parts.checking import assert_equal, gradients, randomise
from deltax.parts.context import Context
from deltax.parts.linear import Linear
from deltax.parts.mlp import MLP, gelu_tanh
from deltax.parts.nothing import Nothing
from deltax.parts.objectives import mixes
from deltax.parts.pairs import Temperature, at_last
from deltax.parts.patches import NoClassToken, Patches, Pooled
from deltax.parts.ring import Ring, in_threads
from deltax.parts.roles import tag
from deltax.parts.scores import everywhere
from deltax.parts.stack import PreNorm
from deltax.shapes import PerExample, Stream
from deltax.tasks.pairs import ColouredPairs, PairBatch


class Biased(Temperature):
    """A `Temperature` and a learned bias, added last, from `bias` on. (N, M) -> (N, M)."""

    def __init__(self, *, start: float = 0.1, most: float = math.inf, bias: float = -10.0):
        self.begin = bias
        super().__init__(start=start, most=most)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.bias = tag(nn.Parameter(torch.tensor(float(self.begin))), "vector")

    def forward(self, cosines: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        return super().forward(cosines) + self.bias


def each_alone(logits: Float[Tensor, "N N"]) -> PerExample:
    """-log of the chance of the right answer, summed over each row: yes on the diagonal, no elsewhere (Eq. 1)."""
    return _surprise(logits, torch.eye(len(logits), dtype=torch.bool, device=logits.device))


def _surprise(logits: Float[Tensor, "N M"], belong: Tensor) -> PerExample:
    logits = logits.float() if logits.dtype is not torch.float64 else logits
    return -nn.functional.logsigmoid(torch.where(belong, logits, -logits)).sum(1)


@mixes("the negatives of an example are the others of its piece")
def pair_sigmoid(model: nn.Module, batch: PairBatch) -> PerExample:
    """`each_alone` of a batch."""
    return each_alone(model(batch.images, batch.texts))


class _AroundTheRing(torch.autograd.Function):
    """Texts go round with their gradient beside them; when they are home again both are complete."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> Tensor:
        mine = [t.detach().requires_grad_() for t in (images, scale, bias)]
        totals = [torch.zeros_like(t) for t in mine]
        loss, held, slope = images.new_zeros(()), texts.detach(), torch.zeros_like(texts)
        for hop in range(ring.size):
            belong = torch.eye(len(images), dtype=torch.bool, device=images.device) & (hop == 0)
            with torch.enable_grad():
                guest = held.detach().requires_grad_()
                part_ = _surprise(mine[0] @ guest.mT * mine[1] + mine[2], belong).sum()
                *own, of_guest = torch.autograd.grad(part_, [*mine, guest])
            loss, slope = loss + part_.detach(), slope + of_guest
            totals = [a + b for a, b in zip(totals, own, strict=True)]
            held, slope = ring.pass_on((held, slope))()
        ctx.save_for_backward(totals[0], slope, *totals[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, *weight: Tensor) -> Any:
        return (*(weight[0] * slope for slope in ctx.saved_tensors), None)


def around_the_ring(
    images: Float[Tensor, "N K"], texts: Float[Tensor, "N K"], scale: Tensor, bias: Tensor, ring: Ring
) -> Float[Tensor, ""]:
    """The sum of `each_alone` over this member's images, against the texts of all; N x N scores at a time (Figure 1).

    All members have as many pairs, and weigh their losses alike: a text's gradient is of all members' losses. The
    gradients of scale and bias are this member's share.
    """
    return _AroundTheRing.apply(images, texts, scale, bias, ring)


class AttentionPool(nn.Module):
    """One learned query asks the stream, and a branch of MLP is added. Stream (B, T, D) -> (B, D)."""

    def __init__(self, dim: int, *, heads: int = 3, norm: Part = part(LayerNorm), mlp: Part = part(MLP)):
        super().__init__()
        self.probe = tag(nn.Parameter(torch.empty(dim)), "embedding")
        self.attention = CrossAttention(dim, heads=heads)
        self.mlp_residual, self.mlp = PreNorm(dim, norm=norm), mlp(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.probe)

    def forward(self, x: Stream) -> Pooled:
        asked = self.attention(self.probe.expand(len(x), 1, -1), Context(memory=x))
        return self.mlp_residual(asked, self.mlp)[:, 0]


def released_towers(recipe: Part) -> Part:
    """The encoders of the released models: `AttentionPool` over patches without a class token, a text that sees all of
    itself and is read at its last place, no map after the image's side. Heads of the pool are those of the blocks."""
    norm = part(LayerNorm, eps=1e-6)
    recipe = recipe.fill("norm", norm).fill("class_token", NoClassToken).set(Patches, embed=Linear)
    recipe = recipe.put("model.image.trunk.stack.entry", part(Nothing)).fill("activation", gelu_tanh)
    recipe = recipe.put("model.image.pool", part(AttentionPool, norm=norm)).fill("mask", everywhere)
    recipe = recipe.put("model.image.classifier", part(Nothing)).put("model.text.classifier", part(Linear))
    return recipe.put("model.text.summary", at_last)


@paper(on=clip, year=2023, arxiv="2303.15343")
def siglip(recipe: Part, *, bias: float = -10.0) -> Part:
    return recipe.fill("objective", pair_sigmoid).fill("logits", Biased, bias=bias)


_HF = (
    ("logit_bias", "logits.bias"),
    ("vision_model.head", "image.pool"),
    ("text_model.head", "text.classifier"),
    ("image.pool.attention.out_proj", "image.pool.attention.project.out"),
    ("image.pool.layernorm.weight", "image.pool.mlp_residual.norm.gain"),
    ("image.pool.layernorm.bias", "image.pool.mlp_residual.norm.bias"),
)
_THIRDS = ("query", "key", "value")


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` SiglipModel as that of `released_towers`' model."""
    ours = {}
    for name, value in state.items():
        name = vision.renamed(name, (*_HF, *CLIP))
        if ".in_proj_" in name:
            before, kind = name.split("in_proj_")
            ours |= {f"{before}project.{n}.{kind}": v for n, v in zip(_THIRDS, value.chunk(3), strict=True)}
        elif name.startswith("logits."):
            ours[name] = value.reshape(())
        else:
            ours[name] = value.flatten(1) if value.ndim == 4 else value
    ours["image.pool.probe"] = ours["image.pool.probe"].flatten()
    return {k: v.contiguous() for k, v in ours.items()}


def to_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of `released_towers`' model as that of a `transformers` SiglipModel. The inverse of `from_hf`."""
    back = tuple((ours, theirs) for theirs, ours in reversed(_HF))
    theirs = {hf_name(vision.renamed(name, back)): squares(name, value, channels) for name, value in state.items()}
    head = "vision_model.head"
    for kind in ("weight", "bias"):
        thirds = [theirs.pop(f"{head}.attention.project.{n}.{kind}") for n in _THIRDS]
        theirs[f"{head}.attention.in_proj_{kind}"] = torch.cat(thirds)
    theirs[f"{head}.probe"] = theirs[f"{head}.probe"][None, None]
    return {k: v.reshape(1) if v.ndim == 0 else v.contiguous() for k, v in theirs.items()}


@claim
def around_the_ring_it_is_the_whole_batch():
    """Summed over workers that hold a few pairs each and pass their texts on, the loss is that of the whole batch, and
    so is each gradient: of images, texts, scale and bias."""
    torch.manual_seed(0)
    for size in (1, 2, 5):
        images, texts = (torch.randn(2 * size, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.7, -0.6))
        whole = each_alone(images @ texts.mT * scale + bias).sum()
        expected = torch.autograd.grad(whole, [images, texts, scale, bias])

        ends = scale.detach().requires_grad_(), bias.detach().requires_grad_()
        found = in_threads(size, partial(_member, images, texts, *ends))
        losses, of_images, of_texts, *of_ends = zip(*found, strict=True)
        torch.testing.assert_close(sum(losses), whole.detach())
        found = [torch.cat(of_images), torch.cat(of_texts), *(sum(x) for x in of_ends)]
        for ours, slope in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, 3 * slope)


@claim
def at_the_start_the_pairs_that_belong_together_lead():
    """Where all cosines are zero, a bias of -10 leaves each image a loss of 10 or so, however many texts it is shown;
    from a bias of 0 on it is log 2 a text, nearly all of it from texts that do not belong."""
    for n in (4, 64):
        cosines = torch.zeros(n, n, dtype=torch.float64)
        torch.testing.assert_close(each_alone(Biased().double()(cosines)).mean(), _start(n, 10.0))
        assert 10 < _start(n, 10.0) < 10.01
        plain = each_alone(Biased(bias=0.0).double()(cosines))
        torch.testing.assert_close(plain, torch.full((n,), n * math.log(2), dtype=torch.float64))


@claim
def neither_side_is_first():
    """Swapping images and texts transposes the scores: the loss of the batch stays, and so do its gradients."""
    torch.manual_seed(0)
    logits = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    losses = each_alone(logits).sum(), each_alone(logits.mT).sum()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


@claim.parity(peer="transformers SiglipModel")
def equals_transformers():
    """The same random weights give transformers' logits, loss and gradients; they go there and back unchanged."""
    from transformers import SiglipConfig, SiglipModel

    shape = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    config = SiglipConfig(
        text_config=dict(**shape, vocab_size=11, max_position_embeddings=7, bos_token_id=0, eos_token_id=10),
        vision_config=dict(**shape, image_size=9, patch_size=3, num_channels=2),
    )
    theirs = randomise(SiglipModel(config)).eval()
    recipe = paper_of(clip)(dim=12, depth=2, heads=3, patch=3, width=12) + siglip
    ours, images, texts = tiny(released_towers(recipe))
    ours.load_state_dict(from_hf(theirs.state_dict()))
    back = to_hf(ours.state_dict(), channels=2)
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items() if "position_ids" not in k)
    peer = theirs(input_ids=texts, pixel_values=images, return_loss=True)
    logits = ours(images, texts)
    torch.testing.assert_close(logits, peer.logits_per_image)
    losses = each_alone(logits.mT).mean(), peer.loss
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_equal(to_hf(gradients(ours), channels=2), gradients(theirs))


@claim.measured(paper="sigmoid is ahead of softmax below a batch of 16k, and equal at 32k (Figure 2, section 4.2)")
def small_batches_suffice(lab):
    """With 16 pairs a batch it names more digits in colours that they never had than CLIP does."""
    wrong = {name: _errors(lab, name, 16) for name in ("clip", "clip+siglip")}
    gains = [a - b for a, b in zip(wrong["clip"], wrong["clip+siglip"], strict=True)]
    return lab.at_least(gains, 0.0, unit="points", numbers={f"% error, {k}": v for k, v in wrong.items()})


@claim.measured(paper="without the bias of -10 the start is unstable, and ImageNet zero-shot falls (Table 4)")
def the_bias_is_needed(lab):
    """Started with a bias of 0 it names fewer digits in colours that they never had than with -10."""
    wrong = {bias: _errors(lab, f"clip+siglip(bias={bias})", 64) for bias in (-10.0, 0.0)}
    gains = [b - a for a, b in zip(wrong[-10.0], wrong[0.0], strict=True)]
    return lab.at_least(gains, 0.0, unit="points", numbers={f"% error, bias {k}": v for k, v in wrong.items()})


def _errors(lab, expression: str, batch: int) -> list[float]:
    recipe = lab.recipe(expression).put("task", part(ColouredPairs)).put("loop.batch", batch)
    return [lab.train(recipe, seed=seed).score for seed in lab.seeds(3)]


def _member(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> list[Tensor]:
    """A worker's loss, and three times its gradients, of its two pairs and of scale and bias."""
    own = [x.detach()[2 * ring.rank :][:2].requires_grad_() for x in (images, texts)]
    loss = around_the_ring(*own, scale, bias, ring)
    return [loss.detach(), *torch.autograd.grad(3 * loss, [*own, scale, bias])]


def _start(n: int, bias: float) -> Tensor:
    no, yes = math.log1p(math.exp(-bias)), math.log1p(math.exp(bias))
    return torch.tensor(yes + (n - 1) * no, dtype=torch.float64)
