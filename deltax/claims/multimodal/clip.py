"""Claims of clip: the paper's equations, parity with peers, and what it measures."""

import math

import torch
from torch import Tensor, nn

from deltax import Part, claim, part
from deltax.claims.checking import assert_equal, gradients, randomise
from deltax.paper import paper_of
from deltax.papers.multimodal.clip import clip, symmetric
from deltax.parts.model.pairs import Temperature
from deltax.tasks.multimodal.pairs import ColouredPairs
from deltax.weights.multimodal.clip import from_hf, to_hf


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
