"""Learning Transferable Visual Models From Natural Language Supervision. Radford, Kim, Hallacy, Ramesh, Goh, Agarwal,
Sastry, Askell, Mishkin, Clark, Krueger, Sutskever, 2021. arXiv:2103.00020

Contrastive learning, but the second view of an image is its caption, with an encoder of its own.

In a batch of pairs, each image is to find its text among all texts and each text its image; only pairs across count, so
there is one softmax over rows and one over columns. How sharp they are is learned. What this gives for free is a
classifier of anything that can be named: write each class as a sentence, and see which lies nearest. The image's side
is a ViT with one more norm before its blocks, the text's GPT, read where the text ends; both map linearly into the
shared space. ViT-L/14 was trained on 400 million pairs, 32,768 a batch; the default here reads digits and bytes.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.paper import paper_of
from deltax.papers.language.gpt import gpt
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.papers.vision import vit as vision
from deltax.papers.vision.simclr import simclr
from deltax.papers.vision.vit import vit
from deltax.parts.checking import assert_equal, gradients, randomise
from deltax.parts.linear import Matrix
from deltax.parts.nothing import Nothing
from deltax.parts.objectives import mixes
from deltax.parts.optimizers import adamw
from deltax.parts.pairs import DualEncoder, Temperature, TextEncoder
from deltax.parts.patches import First, ImageClassifier, Patches
from deltax.parts.run import Run
from deltax.shapes import PerExample
from deltax.tasks.pairs import ColouredPairs, PairBatch, Pairs


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the GELU of the released weights."""
    return x * torch.sigmoid(1.702 * x)


def symmetric(logits: Float[Tensor, "N N"]) -> PerExample:
    """How surprising it is, in nats, that row i belongs to column i: a mean of both directions (Figure 3)."""
    own = logits.float() if logits.dtype is not torch.float64 else logits
    return (own.logsumexp(0) + own.logsumexp(1)) / 2 - own.diagonal()


@mixes("the negatives of an example are the others of its piece")
def pair_contrast(model: nn.Module, batch: PairBatch) -> PerExample:
    """`symmetric` of a batch. What a pair is told from is its own piece of the batch."""
    return symmetric(model(batch.images, batch.texts))


@paper(on=simclr, year=2021, arxiv="2103.00020")
def clip(*, dim: int = 48, depth: int = 2, heads: int = 3, patch: int = 2, width: int = 32) -> Part:
    image = paper_of(vit)(dim=dim, depth=depth, heads=heads, patch=patch)["model.trunk"]
    image = image.fill("norm", LayerNorm, eps=1e-5).put("stack.entry", part(LayerNorm)).set(Patches, embed=Matrix)
    text = paper_of(gpt)(dim=dim, depth=depth, heads=heads)["model"].put("head", part(Nothing))
    model = part(
        DualEncoder,
        width=width,
        image=part(ImageClassifier, trunk=image, pool=First, classifier=Matrix),
        text=part(TextEncoder, trunk=text),
    )
    return part(
        Run,
        model=model.fill("activation", quick_gelu),
        task=Pairs,
        objective=pair_contrast,
        batches=simclr["batches"],
        optimizer=part(adamw, rate=1e-3, beta2=0.98, decay=0.2),
        schedule=simclr["schedule"],
        loop=simclr["loop"],
    )


HF = (
    ("logit_scale", "logits.log"),
    ("vision_model", "image.trunk"),
    ("text_model", "text.trunk"),
    ("visual_projection", "image.classifier"),
    ("text_projection", "text.classifier"),
    ("embeddings.patch_embedding", "patches.embed"),
    ("embeddings.token_embedding", "embedding"),
    ("embeddings.position_embedding.weight", "position.table"),
    ("encoder.layers", "stack.blocks"),
    ("layer_norm1", "mixer_residual.norm"),
    ("layer_norm2", "mlp_residual.norm"),
    ("self_attn.q_proj", "mixer.project.query"),
    ("self_attn.k_proj", "mixer.project.key"),
    ("self_attn.v_proj", "mixer.project.value"),
    ("self_attn.out_proj", "mixer.project.out"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("pre_layrnorm.weight", "stack.entry.gain"),
    ("pre_layrnorm.bias", "stack.entry.bias"),
    ("image.trunk.post_layernorm", "image.trunk.norm"),
    ("text.trunk.final_layer_norm", "text.trunk.norm"),
    ("norm.weight", "norm.gain"),
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` CLIPModel as that of clip's model, its class token with the place that it has."""
    state = dict(state)
    token = state.pop("vision_model.embeddings.class_embedding")
    places = state.pop("vision_model.embeddings.position_embedding.weight")
    ours = {"image.trunk.class_token.token": token + places[0], "image.trunk.position.table": places[1:]}
    for name, value in state.items():
        ours[vision.renamed(name, HF)] = value.flatten(1) if value.ndim == 4 else value
    return {k: v.contiguous() for k, v in ours.items()}


def to_hf(state: dict[str, Tensor], *, channels: int = 3) -> dict[str, Tensor]:
    """The state of clip's model as that of a `transformers` CLIPModel; its class token stands at zero."""
    theirs = {hf_name(name): squares(name, value, channels) for name, value in state.items()}
    theirs["vision_model.embeddings.class_embedding"] = theirs.pop("vision_model.class_token.token")
    table = "vision_model.embeddings.position_embedding.weight"
    theirs[table] = nn.functional.pad(theirs[table], (0, 0, 1, 0))
    return {k: v.contiguous() for k, v in theirs.items()}


def hf_name(name: str) -> str:
    """A parameter's name as `transformers` has it."""
    return vision.renamed(name, tuple((ours, theirs) for theirs, ours in reversed(HF)))


def squares(name: str, value: Tensor, channels: int) -> Tensor:
    """The weight of a patch embedding as a convolution's (D, C, patch, patch); any other value as it is."""
    if not name.endswith("patches.embed.weight"):
        return value
    side = math.isqrt(value.shape[1] // channels)
    return value.unflatten(1, (channels, side, side))


@claim
def neither_side_is_first():
    """Swapping images and texts transposes the logits and leaves every loss as it was, and so the gradients; each loss
    is the mean of two cross-entropies, of its row and of its column."""
    torch.manual_seed(0)
    logits = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    weight, own = torch.randn(7, dtype=torch.float64), torch.arange(7)
    rows, columns = (nn.functional.cross_entropy(x, own, reduction="none") for x in (logits, logits.mT))
    slopes = []
    for losses in (symmetric(logits), symmetric(logits.mT), (rows + columns) / 2):
        torch.testing.assert_close(losses, (rows + columns) / 2)
        slopes += torch.autograd.grad(losses @ weight, logits, retain_graph=True)
    torch.testing.assert_close(slopes[0], slopes[1])
    torch.testing.assert_close(slopes[0], slopes[2])


@claim
def the_first_end_is_read():
    """What fills the context after a text's end, whatever it is, changes nothing of its vector; what is before does."""
    model, _, texts = tiny()
    texts[:, 4] = 10
    filled = torch.cat([texts[:, :5], torch.randint(11, (3, 2))], 1)
    torch.testing.assert_close(model.read(filled), model.read(texts))
    changed = torch.cat([(texts[:, :1] + 1) % 10, texts[:, 1:]], 1)
    assert (model.read(changed) - model.read(texts)).abs().amax(-1).min() > 1e-4


@claim
def the_sharpness_is_capped():
    """In training the learned scale goes back to 100 where it is beyond, and what is below is left, to the bit; its
    gradient is never cut off."""
    scale = Temperature().double().train()
    cosines = torch.rand(3, 3, dtype=torch.float64)
    torch.testing.assert_close(scale(cosines), cosines / 0.07)
    for start, after in ((5.0, math.log(100)), (4.0, 4.0)):
        scale.log.data.fill_(start)
        scale.log.grad = None
        torch.testing.assert_close(scale(cosines), cosines * math.exp(after))
        scale(cosines).sum().backward()
        assert scale.log.item() == after and scale.log.grad > 0


@claim.parity(peer="transformers CLIPModel")
def equals_transformers():
    """The same random weights give transformers' logits, loss and gradients, with texts of different lengths; the
    weights go there and back unchanged."""
    from transformers import CLIPConfig, CLIPModel

    shape = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    ids = dict(bos_token_id=0, eos_token_id=10, pad_token_id=10)
    config = CLIPConfig(
        text_config=dict(**shape, **ids, vocab_size=11, max_position_embeddings=7),
        vision_config=dict(**shape, image_size=9, patch_size=3, num_channels=2),
        projection_dim=5,
    )
    theirs = randomise(CLIPModel(config)).eval()
    ours, images, texts = tiny()
    ours.load_state_dict(from_hf(theirs.state_dict()))
    back = from_hf(to_hf(ours.state_dict(), channels=2))
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())
    texts[:, 4:] = 10
    texts[0, 2:] = 10

    peer = theirs(input_ids=texts, pixel_values=images, return_loss=True)
    logits = ours(images, texts)
    torch.testing.assert_close(logits, peer.logits_per_image)
    torch.testing.assert_close(symmetric(logits).mean(), peer.loss)
    for loss in (symmetric(logits).mean(), peer.loss):
        loss.backward()
    expected = gradients(theirs)
    token, places = (expected[f"vision_model.embeddings.{n}"] for n in ("class_embedding", "position_embedding.weight"))
    torch.testing.assert_close(places[0], token)
    places[0] = 0
    assert_equal(to_hf(gradients(ours), channels=2), expected)


@claim.measured(paper="76.2 % of ImageNet zero-shot, as a supervised ResNet-50 (abstract)")
def names_are_enough(lab):
    """Trained on digits and captions alone, comparing with captions tells more than 90 % of held-out digits."""
    right = [100 - lab.train("clip", seed=seed).score for seed in lab.seeds(3)]
    return lab.at_least(right, 90.0, unit="% right")


@claim.measured(paper="an ensemble of 80 prompts adds 3.5 % over one; wordings never trained on work (section 3.1.4)")
def other_words_will_do(lab):
    """Asked in wordings that were never trained on it loses at most 5 points."""
    metrics = [lab.train("clip", seed=seed).evaluation.metrics for seed in lab.seeds(3)]
    known, new = ([m[f"% error, wordings {which}"] for m in metrics] for which in ("trained on", "never seen"))
    lost = [b - a for a, b in zip(known, new, strict=True)]
    return lab.at_most(lost, 5.0, unit="points", numbers={"% error, known wordings": known, "new wordings": new})


@claim.measured(paper="76.2 % of ImageNet zero-shot by ViT-L/14@336px (abstract)")
def unseen_combinations_are_named(lab):
    """Digits in a colour that they never had in training are named, colour and digit, among all 50 names in more than
    half the cases, where guessing is right in 2 %."""
    seeds, rates = lab.seeds(3), {}
    for size in (16, 64):
        recipe = lab.recipe("clip").put("task", part(ColouredPairs)).put("loop.batch", size)
        rates[size] = [100 - lab.train(recipe, seed=seed).score for seed in seeds]
    return lab.at_least(rates[64], 50.0, unit="% right", numbers={f"batch of {k}": v for k, v in rates.items()})


def tiny(recipe: Part | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """A small model in float64 with random weights, three images of 9 x 9 with 2 channels, and texts (3, 7)."""
    recipe = recipe or paper_of(clip)(dim=12, depth=2, heads=3, patch=3, width=5)
    model = randomise(recipe().build({"channels": 2, "size": 9, "vocab": 11, "context": 7})).eval()
    return model, torch.randn(3, 2, 9, 9, dtype=torch.float64), torch.randint(10, (3, 7))
