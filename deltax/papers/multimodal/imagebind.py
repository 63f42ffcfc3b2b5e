"""ImageBind: One Embedding Space To Bind Them All. Girdhar, El-Nouby, Liu, Singh, Alwala, Joulin, Misra, 2023.
arXiv:2305.05665

CLIP, but there are more senses than two, each trained on pairs with images alone; what no pair has shown falls into
place.

Nobody has pictures, texts, sounds and depths of the same things, but nearly everything has been filmed. Two things
that lie where their image lies lie together, so sounds find texts though no sound was ever given with a text, and
vectors of different senses can be added. A sound is a spectrogram, cut into patches as an image is; each sense has a
fixed temperature. The paper has six senses, and begins with the encoders of OpenCLIP, which it leaves as they are:
that is `onto_frozen`. Here a number is seen as two digits, read, and heard as tones that stand for letters; all that
is but the digits is made (`deltax.tasks.spoken_numbers`).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, claim, paper, part
from deltax.paper import paper_of
from deltax.papers.multimodal.clip import clip, symmetric
from deltax.papers.vision.vit import mean_pooled
from deltax.parts.checking import gradients, randomise
from deltax.parts.linear import Matrix
from deltax.parts.objectives import mixes
from deltax.parts.pairs import Vectors
from deltax.parts.patches import Grid, Patches
from deltax.shapes import Images, PerExample, Tokens
from deltax.tasks.spoken_numbers import BoundBatch, SpokenNumbers, found_among

Sounds = Float[Tensor, "B 1 bands frames"]


class Bound(nn.Module):
    """Images, texts, other images and their sounds -> the logits of both, (B, B) each, an image a row.

    The inner model sees and reads; `sound` maps spectrograms to its space, where cosines are divided by `temperature`.
    The state of an inner model alone, loaded to start from, leaves the sound's encoder as it is.
    """

    def __init__(
        self,
        channels: int,
        size: int | Grid,
        vocab: int,
        context: int,
        spectrogram: Grid,
        *,
        inner: Part,
        sound: Part,
        temperature: float = 0.05,
    ):
        super().__init__()
        self.inner = inner(channels, size, vocab, context)
        self.sound = sound(1, spectrogram, self.inner.width)
        self.temperature = temperature
        self.register_load_state_dict_pre_hook(_begin_from_inner)

    def see(self, images: Images) -> Vectors:
        """Images as vectors of length one."""
        return self.inner.see(images)

    def read(self, texts: Tokens) -> Vectors:
        """Texts as vectors of length one."""
        return self.inner.read(texts)

    def hear(self, sounds: Sounds) -> Vectors:
        """Spectrograms as vectors of length one."""
        return nn.functional.normalize(self.sound(sounds), dim=-1)

    def forward(
        self, images: Images, texts: Tokens, others: Images, sounds: Sounds
    ) -> tuple[Float[Tensor, "B B"], Float[Tensor, "B B"]]:
        return self.inner(images, texts), self.see(others) @ self.hear(sounds).mT / self.temperature


def _begin_from_inner(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if not any(key.startswith(f"{prefix}inner.") for key in state):
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
        state |= {f"{prefix}sound.{key}": value for key, value in module.sound.state_dict().items()}


@mixes("the negatives of an example are the others of its piece")
def bind(model: nn.Module, batch: BoundBatch) -> PerExample:
    """The sum of both contrasts, L_IM + L_MI for the texts and for the sounds (Eq. 1)."""
    return sum(symmetric(logits) for logits in model(batch.images, batch.texts, batch.others, batch.sounds))


@mixes("the negatives of an example are the others of its piece")
def bind_sounds(model: Bound, batch: BoundBatch) -> PerExample:
    """The contrast of images and sounds, of which the sounds' encoder alone learns."""
    with torch.no_grad():
        seen = model.see(batch.others)
    return symmetric(seen @ model.hear(batch.sounds).mT / model.temperature)


@paper(on=clip, year=2023, arxiv="2305.05665")
def imagebind(recipe: Part, *, temperature: float = 0.05, patch: int = 4) -> Part:
    sound = mean_pooled(recipe["model.image"]).set(Patches, patch=patch).fill("classifier", Matrix)
    recipe = recipe.wrap("model", Bound, sound=sound, temperature=temperature)
    return recipe.fill("objective", bind).fill("task", SpokenNumbers)


def onto_frozen(recipe: Part) -> Part:
    """Images and texts are done with learning, and a new sense is bound to them, as in the paper. It takes the weights
    of a trained clip to start from."""
    return recipe.fill("objective", bind_sounds)


@claim
def texts_and_sounds_never_meet():
    """What the text's encoder learns of a batch does not depend on its sounds, nor what the sound's learns on its
    texts; the image's learns from both. And no training picture comes with a text and with a sound."""
    model, batch = _tiny()
    texts = torch.where(batch.texts < 10, 9 - batch.texts, 10)
    other = batch._replace(texts=texts), batch._replace(sounds=batch.sounds.flip(1, 2))
    plain, texts, sounds = ({}, {}, {})
    for found, given in zip((plain, texts, sounds), (batch, *other), strict=True):
        model.zero_grad()
        (bind(model, given) @ torch.arange(1.0, 4.0).double()).backward()
        found |= gradients(model)
    for name, slope in plain.items():
        encoder = name.removeprefix("inner.").split(".")[0]
        assert torch.equal(texts[name], slope) == (encoder == "sound")
        assert torch.equal(sounds[name], slope) == (encoder in ("text", "logits"))
    read, heard = ({row.tobytes() for row in _half(half)} for half in ("read", "heard"))
    assert read and heard and not read & heard


@claim
def bound_to_the_same_they_are_bound_to_each_other():
    """Where every text and every sound has found its image's vector, sound to text is right as image to text is; at
    an angle of a to it on either side, the two lie within 2 a of each other."""
    torch.manual_seed(0)
    image = nn.functional.normalize(torch.randn(6, 9, dtype=torch.float64), dim=-1)
    text, sound = (nn.functional.normalize(image + 0.1 * torch.randn_like(image), dim=-1) for _ in range(2))
    angle = lambda a, b: (a * b).sum(-1).clamp(-1, 1).acos()
    assert (angle(text, sound) <= angle(text, image) + angle(image, sound)).all()
    assert (angle(text, sound) > angle(text, image)).any()
    assert found_among(image[None], image[None]).score == 0 and found_among(sound[None], text[None]).score == 0
    assert found_among(sound[None], text.roll(1, 0)[None]).score == 100


@claim
def what_was_bound_to_stays():
    """Bound onto a trained clip, images and texts keep their logits and get no gradient; sounds do."""
    model, batch = _tiny()
    plain = randomise((paper_of(clip)(**_SHAPE))().build(_FACTS), seed=1)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(*batch[:4])[0], plain(*batch[:2]))
    bind_sounds(model, batch).sum().backward()
    assert set(gradients(model)) == {name for name, _ in model.named_parameters() if name.startswith("sound.")}
    model.zero_grad()
    learned = bind_sounds(model, batch).sum(), symmetric(model(*batch[:4])[1]).sum()
    torch.testing.assert_close(*learned)
    torch.testing.assert_close(*(torch.autograd.grad(loss, list(model.sound.parameters())) for loss in learned))


@claim.measured(paper="ESC-50 66.9 %, where no sound was ever given with a text (Table 2)")
def sounds_find_texts_never_given_with_them(lab):
    """Trained on pictures with texts and others with sounds, it finds the text of a held-out sound among 64 at the
    first guess in more than 60 % of cases, where chance is 1.6 %."""
    return _found(lab, [_bound(lab, seed) for seed in lab.seeds(3)])


@claim.measured(paper="image and text encoders of OpenCLIP, kept frozen; ESC-50 66.9 % (Table 2)")
def a_new_sense_is_bound_to_a_finished_clip(lab):
    """A sound's encoder alone, trained onto a clip that was trained before and stays as it is, finds the text of a
    held-out sound among 64 in more than 60 % of cases."""
    runs = []
    for seed in lab.seeds(3):
        start = lab.train(lab.recipe("clip(patch=4)").put("task", part(SpokenNumbers)), seed=seed, rate=_RATE)
        recipe = onto_frozen(lab.recipe("clip(patch=4)+imagebind"))
        runs.append(lab.train(recipe, seed=seed, rate=_RATE, weights=start.model.state_dict()))
    return _found(lab, runs)


@claim.measured(paper="embeddings of image and audio, added, retrieve images of both (Figure 4)")
def senses_add_up(lab):
    """The sum of a number's vectors, seen and heard, finds its text more often than the better of the two alone."""
    gains = []
    for seed in lab.seeds(3):
        wrong = _bound(lab, seed).evaluation.metrics
        alone = min(wrong["% error, image to text"], wrong["% error, sound to text"])
        gains.append(alone - wrong["% error, sound and image to text"])
    return lab.at_least(gains, 0.0, unit="points")


_RATE = 3.0  # times clip's, chosen with 400 steps on the seed for tuning


def _bound(lab, seed: int) -> Any:
    return lab.train("clip(patch=4)+imagebind", seed=seed, rate=_RATE)


def _found(lab, runs: list[Any]):
    errors = {name: [run.evaluation.metrics[name] for run in runs] for name in runs[0].evaluation.metrics}
    return lab.at_least([100 - e for e in errors["% error, sound to text"]], 60.0, unit="% right", numbers=errors)


_SHAPE = dict(dim=12, depth=1, heads=3, patch=3, width=5)
_FACTS = {"channels": 2, "size": (3, 9), "vocab": 11, "context": 7, "spectrogram": (6, 9)}


def _tiny() -> tuple[nn.Module, BoundBatch]:
    """A small model in float64 with random weights, three pairs of each kind."""
    recipe = paper_of(clip)(**_SHAPE) + imagebind(patch=3)
    model = randomise(recipe().build(_FACTS)).eval()
    images, others = torch.randn(2, 3, 2, 3, 9, dtype=torch.float64)
    sounds = torch.randn(3, 1, 6, 9, dtype=torch.float64)
    texts = torch.randint(10, (3, 7))
    texts[:, 4:] = 10
    return model, BoundBatch(images, texts, others, sounds, torch.arange(3), torch.arange(3))


def _half(half: str) -> Any:
    task = SpokenNumbers()
    return [image for rows in task._of[half] for image in task._pixels[rows]]
