"""What tasks tell a model's constructor. A task annotates its `task_spec` with one of these; see `deltax.contract`."""

from typing import TypedDict


class TextSpec(TypedDict):
    """Of sequences of tokens: how many tokens there are, and the length of a sequence."""

    vocab: int
    context: int


class ImageSpec(TypedDict):
    """Of images: channels, pixels along a side, and how many classes they show."""

    channels: int
    size: int
    classes: int


class VideoSpec(ImageSpec):
    """Of videos: also the frames of each."""

    frames: int


class TrackSpec(TypedDict):
    """Of tracks of points: the frames of a film."""

    frames: int


class PairSpec(TypedDict):
    """Of images with texts: channels, rows and columns or pixels along a side, tokens, and the length of a text."""

    channels: int
    size: int | tuple[int, int]
    vocab: int
    context: int


class BoundSpec(PairSpec):
    """Of images with texts and with sounds: also bands and frames of a spectrogram."""

    spectrogram: tuple[int, int]
