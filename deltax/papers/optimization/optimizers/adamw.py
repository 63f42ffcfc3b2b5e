"""Decoupled Weight Decay Regularization. Loshchilov, Hutter, 2017. arXiv:1711.05101

SGD with momentum, but each coordinate's step is its smoothed gradient over its smoothed magnitude, and weight decay
acts on the weights directly, not through the gradient.

Adam (Kingma and Ba, arXiv:1412.6980) divides each coordinate by the root of its own mean square, so that a step's size
is the rate whatever the scale of the loss. Decay that is added to the gradient is then divided too, and weights with
large gradients decay least; decoupled, all decay alike. The paper multiplies decay by the schedule's factor alone,
torch by the rate as well; `adam_step` is torch's. Decay is kept off gains, biases and embeddings.
"""

from deltax import Part, paper
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.parts.training import optimizers


@paper(on=sgd, arxiv="1711.05101", year=2017)
def adamw(
    recipe: Part, *, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float = 0.01
) -> Part:
    return recipe.fill("optimizer", optimizers.adamw, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
