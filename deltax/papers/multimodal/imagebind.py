"""ImageBind: One Embedding Space To Bind Them All. Girdhar, El-Nouby, Liu, Singh, Alwala, Joulin, Misra, 2023.
arXiv:2305.05665

CLIP, but with more than two modalities, each trained on pairs with images only.

No data set has images, text, audio and depth of the same things, but pairs with images are common. Two modalities
aligned with images are aligned with each other, so audio retrieves text without any (audio, text) pair, and embeddings
of different modalities can be added. Audio is a spectrogram, cut into patches like an image; each modality has a fixed
temperature. The paper has six modalities and starts from OpenCLIP's encoders, which stay frozen: that is `onto_frozen`.
Here a number is shown as two digits, as text, and as tones for letters; all but the digits is synthetic
(`deltax.tasks.multimodal.spoken_numbers`).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, paper
from deltax.contract import PAIRS_TO_LOGITS, SENSES_TO_LOGITS, needs
from deltax.papers.multimodal.clip import clip, symmetric
from deltax.papers.vision.backbones.vit import mean_pooled
from deltax.parts.model.linear import Matrix
from deltax.parts.model.pairs import Vectors
from deltax.parts.model.patches import Grid, Patches
from deltax.parts.numerics.precision import of_length_one, similarity
from deltax.parts.training.objectives import mixes
from deltax.shapes import Images, PerExample, Tokens
from deltax.tasks.multimodal.spoken_numbers import BoundBatch, SpokenNumbers

Sounds = Float[Tensor, "B 1 bands frames"]


@paper(on=clip, year=2023, arxiv="2305.05665")
def imagebind(recipe: Part, *, temperature: float = 0.05, patch: int = 4) -> Part:
    # the same ViT on spectrograms, mean-pooled
    sound = mean_pooled(recipe["model.image"]).set(Patches, patch=patch).fill("classifier", Matrix)
    recipe = recipe.wrap("model", Bound, sound=sound, temperature=temperature)
    return recipe.fill("objective", bind).fill("task", SpokenNumbers)


def onto_frozen(recipe: Part) -> Part:
    """The paper's training: image and text encoders are frozen and the sound encoder is trained. Start from the
    weights of a trained clip."""
    return recipe.fill("objective", bind_sounds)


@needs(model=PAIRS_TO_LOGITS)
class Bound(nn.Module):
    """Images, texts, other images and their sounds -> the two logit matrices (B, B), images in rows.

    `inner` encodes images and texts; `sound` encodes spectrograms into its space, where cosines are divided by
    `temperature`. A state of the inner model alone can be loaded and leaves the sound encoder unchanged.
    """

    interface = SENSES_TO_LOGITS

    def __init__(
        self, channels: int, size: int | Grid, vocab: int, context: int, spectrogram: Grid, *, inner: Part, sound: Part,
        temperature: float = 0.05,
    ):  # fmt: skip
        super().__init__()
        self.inner = inner(channels=channels, size=size, vocab=vocab, context=context)
        self.sound = sound(1, spectrogram, self.inner.width)  # a spectrogram is an image of one channel
        self.temperature = temperature
        self.register_load_state_dict_pre_hook(_begin_from_inner)

    def see(self, images: Images) -> Vectors:
        """L2-normalised vectors of images."""
        return self.inner.see(images)

    def read(self, texts: Tokens) -> Vectors:
        """L2-normalised vectors of texts."""
        return self.inner.read(texts)

    def hear(self, sounds: Sounds) -> Vectors:
        """L2-normalised vectors of spectrograms."""
        return of_length_one(self.sound(sounds))  # (B, width)

    def forward(
        self, images: Images, texts: Tokens, others: Images, sounds: Sounds
    ) -> tuple[Float[Tensor, "B B"], Float[Tensor, "B B"]]:
        # two losses, no (text, sound) pair
        return self.inner(images, texts), similarity(self.see(others), self.hear(sounds)) / self.temperature


def _begin_from_inner(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if not any(key.startswith(f"{prefix}inner.") for key in state):
        # a clip's own state: its keys get the prefix `inner.`
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}inner.{key.removeprefix(prefix)}"] = state.pop(key)
        state |= {f"{prefix}sound.{key}": value for key, value in module.sound.state_dict().items()}


@needs("images", "texts", "others", "sounds", model=SENSES_TO_LOGITS)
@mixes("the negatives of an example are the others of its piece")
def bind(model: nn.Module, batch: BoundBatch) -> PerExample:
    """L_{I,M} + L_{M,I}, summed over texts and sounds (Eq. 1)."""
    return sum(symmetric(logits) for logits in model(batch.images, batch.texts, batch.others, batch.sounds))


@needs("others", "sounds", model=SENSES_TO_LOGITS)
@mixes("the negatives of an example are the others of its piece")
def bind_sounds(model: Bound, batch: BoundBatch) -> PerExample:
    """The contrastive loss of images and sounds; only the sound encoder gets gradients."""
    with torch.no_grad():
        seen = model.see(batch.others)
    return symmetric(similarity(seen, model.hear(batch.sounds)) / model.temperature)
