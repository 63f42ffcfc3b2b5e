"""Probabilistic Interpretation of Feedforward Classification Network Outputs. Bridle, 1990.

A network that is told which class is right, but its outputs are read as probabilities and it is scored by the log of
the one that counts.

Squared error through a squashing output has no slope where the network is surest, also where it is surely wrong. With
normalised exponentials and the log of the right one, the slope is what was said minus what is so: largest where it is
most wrong. Targets may be softened: a share of each label is then spread over all classes.
"""

from deltax import Part, paper
from deltax.papers.vision.backbones.lenet_1989 import lenet_1989
from deltax.parts.training.objectives import classify, classify_softly


@paper(on=lenet_1989, year=1990, url="https://doi.org/10.1007/978-3-642-76153-9_28")
def cross_entropy(recipe: Part, *, smoothing: float = 0.0) -> Part:
    return (
        recipe.fill("objective", classify_softly, smoothing=smoothing)
        if smoothing
        else recipe.fill("objective", classify)
    )
