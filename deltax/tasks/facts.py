"""What tasks tell a model's constructor. A task annotates its `facts` with one of these; see `deltax.contract`."""

from typing import TypedDict


class TextFacts(TypedDict):
    """Of sequences of tokens: how many tokens there are, and the length of a sequence."""

    vocab: int
    context: int


class ImageFacts(TypedDict):
    """Of images: channels, pixels along a side, and how many classes they show."""

    channels: int
    size: int
    classes: int


class VideoFacts(ImageFacts):
    """Of videos: also the frames of each."""

    frames: int


class TrackFacts(TypedDict):
    """Of tracks of points: the frames of a film."""

    frames: int


class PairFacts(TypedDict):
    """Of images with texts: channels, rows and columns or pixels along a side, tokens, and the length of a text."""

    channels: int
    size: int | tuple[int, int]
    vocab: int
    context: int


class BoundFacts(PairFacts):
    """Of images with texts and with sounds: also bands and frames of a spectrogram."""

    spectrogram: tuple[int, int]
