"""Words as sounds that are made here. Nobody's voice was recorded, and nothing is pronounced: a word is spelt in tones.

Each letter is a chord of two tones, which no other letter has, for a twentieth of a second; a space is silence. A
speaker is a pitch, a speed, a moment to begin and a hiss, all drawn. What models get is the spectrogram.
"""

import numpy as np
from jaxtyping import Float

RATE = 4000  # samples a second
BANDS = 16  # of 125 Hz each
WIDTH, HOP = 128, 88  # samples that a frame sees, and from one to the next
_LETTER = 200  # samples


def tones(letter: str) -> tuple[float, float]:
    """The two frequencies of a letter from a to z, in Hz."""
    low, high = ord(letter) - ord("a"), (ord(letter) - ord("a")) // 6
    return 180.0 + 110.0 * (low % 6), 1000.0 + 170.0 * high


def waveform(word: str, draw: int, samples: int) -> Float[np.ndarray, "samples"]:
    """The word said by the speaker of this number; what does not fit is cut off."""
    rng = np.random.Generator(np.random.Philox(key=draw))
    pitch, length = np.exp(rng.uniform(-0.06, 0.06)), int(_LETTER * rng.uniform(0.9, 1.1))
    wave = 0.1 * rng.standard_normal(samples)
    at, envelope, time = int(rng.integers(_LETTER)), np.hanning(length), np.arange(length) / RATE
    for letter in word:
        if letter != " " and at + length <= samples:
            wave[at : at + length] += envelope * sum(np.sin(2 * np.pi * pitch * tone * time) for tone in tones(letter))
        at += length
    return wave


def spectrograms(words: list[str], draws: np.ndarray, *, frames: int) -> Float[np.ndarray, "N {BANDS} {frames}"]:
    """Loudness by band and frame, low bands first: half the logarithm of the power, above a floor. float32.

    draws  (N,), the number of each word's speaker
    """
    samples = WIDTH + HOP * (frames - 1)
    waves = np.stack([waveform(word, int(draw), samples) for word, draw in zip(words, draws, strict=True)])
    cut = np.lib.stride_tricks.sliding_window_view(waves, WIDTH, axis=1)[:, ::HOP] * np.hanning(WIDTH)
    power = np.abs(np.fft.rfft(cut, axis=-1)[..., 1:]) ** 2
    loud = power.reshape(*power.shape[:2], BANDS, -1).mean(-1)
    return np.ascontiguousarray(0.5 * np.log(0.5 + loud).swapaxes(1, 2), dtype=np.float32)
