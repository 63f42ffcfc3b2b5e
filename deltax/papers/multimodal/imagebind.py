"""ImageBind: One Embedding Space To Bind Them All. Girdhar, El-Nouby, Liu, Singh, Alwala, Joulin, Misra, 2023.
arXiv:2305.05665

CLIP, but there are more senses than two, each trained on pairs with images alone; what no pair has shown falls into
place.

Nobody has pictures, texts, sounds and depths of the same things, but nearly everything has been filmed. Two things
that lie where their image lies lie together, so sounds find texts though no sound was ever given with a text, and
vectors of different senses can be added. A sound is a spectrogram, cut into patches as an image is; each sense has a
fixed temperature. The paper has six senses, and begins with the encoders of OpenCLIP, which it leaves as they are:
that is `onto_frozen`. Here a number is seen as two digits, read, and heard as tones that stand for letters; all that
is but the digits is made (`deltax.tasks.multimodal.spoken_numbers`).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper
from deltax.contract import PAIRS_TO_LOGITS, SENSES_TO_LOGITS, needs
from deltax.papers.multimodal.clip import clip, symmetric
from deltax.papers.vision.backbones.vit import mean_pooled
from deltax.parts.model.linear import LinearNoBias
from deltax.parts.model.pairs import Vectors
from deltax.parts.model.patches import Grid, Patches
from deltax.parts.numerics.precision import of_length_one, similarity
from deltax.parts.training.objectives import mixes
from deltax.shapes import Images, PerExample, Tokens
from deltax.tasks.multimodal.spoken_numbers import BoundBatch, SpokenNumbers

Sounds = Float[Tensor, "B 1 bands frames"]


@needs(model=PAIRS_TO_LOGITS)
class Bound(nn.Module):
    """Images, texts, other images and their sounds -> the logits of both, (B, B) each, an image a row.

    The inner model sees and reads; `sound` maps spectrograms to its space, where cosines are divided by `temperature`.
    The state of an inner model alone, loaded to start from, leaves the sound's encoder as it is.
    """

    interface = SENSES_TO_LOGITS

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
        self.inner = inner(channels=channels, size=size, vocab=vocab, context=context)
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
        return of_length_one(self.sound(sounds))

    def forward(
        self, images: Images, texts: Tokens, others: Images, sounds: Sounds
    ) -> tuple[Float[Tensor, "B B"], Float[Tensor, "B B"]]:
        return self.inner(images, texts), similarity(self.see(others), self.hear(sounds)) / self.temperature


def _begin_from_inner(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if not any(key.startswith(f"{prefix}inner.") for key in state):
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
        state |= {f"{prefix}sound.{key}": value for key, value in module.sound.state_dict().items()}


@needs("images", "texts", "others", "sounds", model=SENSES_TO_LOGITS)
@mixes("the negatives of an example are the others of its piece")
def bind(model: nn.Module, batch: BoundBatch) -> PerExample:
    """The sum of both contrasts, L_IM + L_MI for the texts and for the sounds (Eq. 1)."""
    return sum(symmetric(logits) for logits in model(batch.images, batch.texts, batch.others, batch.sounds))


@needs("others", "sounds", model=SENSES_TO_LOGITS)
@mixes("the negatives of an example are the others of its piece")
def bind_sounds(model: Bound, batch: BoundBatch) -> PerExample:
    """The contrast of images and sounds, of which the sounds' encoder alone learns."""
    with torch.no_grad():
        seen = model.see(batch.others)
    return symmetric(similarity(seen, model.hear(batch.sounds)) / model.temperature)


@paper(on=clip, year=2023, arxiv="2305.05665")
def imagebind(recipe: Part, *, temperature: float = 0.05, patch: int = 4) -> Part:
    sound = mean_pooled(recipe["model.image"]).set(Patches, patch=patch).fill("classifier", LinearNoBias)
    recipe = recipe.wrap("model", Bound, sound=sound, temperature=temperature)
    return recipe.fill("objective", bind).fill("task", SpokenNumbers)


def onto_frozen(recipe: Part) -> Part:
    """Images and texts are done with learning, and a new sense is bound to them, as in the paper. It takes the weights
    of a trained clip to start from."""
    return recipe.fill("objective", bind_sounds)
