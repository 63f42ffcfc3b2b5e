"""A Stochastic Approximation Method. Robbins, Monro, 1951.

Gradient descent, but each step follows the gradient of a random few examples instead of all.

The noise averages out along the way, so a step need not wait for the whole of the data. With rates that sum to infinity
and whose squares do not, the root is found with probability one. A velocity (heavy ball) averages over steps what a
larger batch would average over examples. `descend` is the step; recipes take torch's.
"""

from deltax import Part, paper
from deltax.parts.training import optimizers


@paper(year=1951, url="https://doi.org/10.1214/aoms/1177729586")
def sgd(recipe: Part, *, lr: float = 0.1, momentum: float = 0.9) -> Part:
    return recipe.fill("optimizer", optimizers.sgd, lr=lr, momentum=momentum)
