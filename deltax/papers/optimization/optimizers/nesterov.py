"""A method for solving the convex programming problem with convergence rate O(1/k^2). Nesterov, 1983.

SGD with momentum, but the gradient is taken where the velocity is about to lead, not where the weights are.

Momentum that overshoots is told so one step earlier. On smooth convex functions the error falls as 1/k^2 where plain
descent's falls as 1/k, and no method that sees only gradients does better. Sutskever et al. (2013) wrote it with a
velocity, for training networks; torch keeps the weights at the place looked ahead to, which is the same sequence after
a change of variables.
"""

from deltax import Part, paper
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.parts.training import optimizers


@paper(on=sgd, year=1983, url="https://proceedings.mlr.press/v28/sutskever13.html")
def nesterov(recipe: Part, *, lr: float = 0.1, momentum: float = 0.9) -> Part:
    return recipe.fill("optimizer", optimizers.nesterov, lr=lr, momentum=momentum)
