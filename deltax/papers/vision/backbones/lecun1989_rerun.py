"""Deep Neural Nets: 33 years ago and 33 years from now. Karpathy, 2022.

The network of 1989, but trained with what was learned in the 33 years after, one change at a time.

Not a weight is added. Another loss, another optimizer, images that move, units that are left out, more passes and more
images take the errors down by more than half. The re-run has five stops, each a bundle; here a rung is one change,
so each can be judged with everything else as it was. A rung that only trains longer is a rung too. Karpathy starts
the output biases at 0 after the first change; softmax does not see a bias that all classes share.
"""

from collections.abc import Callable

from deltax import Part, UserError, paper
from deltax.papers.optimization.losses.cross_entropy import cross_entropy
from deltax.papers.optimization.losses.dropout import dropout
from deltax.papers.optimization.optimizers.adamw import adamw
from deltax.papers.vision.backbones.lenet_1989 import IMAGES, lenet_1989
from deltax.papers.vision.training.shift_augmentation import shift_augmentation
from deltax.parts.model.mlp import relu
from deltax.parts.training.schedules import linear

STOPS = {"1989": 0, "cross-entropy": 2, "AdamW": 5, "shifts": 7, "dropout": 10, "more data": 11}


def slower(recipe: Part) -> Part:
    """A third of the learning rate, which softmax takes better."""
    return recipe.put("optimizer.lr", 0.01)


def decayed(recipe: Part) -> Part:
    """The rate falls in a line to a third."""
    return recipe.fill("schedule", linear, warmup=0.0, floor=1 / 3)


def passes(recipe: Part, *, of: int) -> Part:
    """So many passes over the 300 images."""
    return recipe.put("loop.steps", of * IMAGES)


def longer(recipe: Part) -> Part:
    """46 passes."""
    return passes(recipe, of=46)


def longer_still(recipe: Part) -> Part:
    """60 passes."""
    return passes(recipe, of=60)


def longest(recipe: Part) -> Part:
    """80 passes."""
    return passes(recipe, of=80)


def rectified(recipe: Part) -> Part:
    """relu in place of tanh."""
    return recipe.fill("activation", relu)


def more_images(recipe: Part) -> Part:
    """All images that there are, at the same number of steps."""
    return recipe.put("task.images", 1000)


RUNGS: tuple[Callable[[Part], Part], ...] = (
    cross_entropy,
    slower,
    adamw(lr=3e-4),
    decayed,
    longer,
    shift_augmentation,
    longer_still,
    dropout(p=0.25),
    rectified,
    longest,
    more_images,
)


@paper(on=(lenet_1989, cross_entropy, adamw, dropout), year=2022, url="http://karpathy.github.io/2022/03/14/lecun1989/")
def lecun1989_rerun(*, rung: int = 10) -> Part:
    """The network of 1989 after the first `rung` changes, 0 to 11. Raises UserError for a rung that is not there."""
    if type(rung) is not int or not 0 <= rung <= len(RUNGS):
        raise UserError(f"the ladder has rungs 0 to {len(RUNGS)}, not {rung!r}")
    recipe = lenet_1989
    for change in RUNGS[:rung]:
        recipe = change(recipe)
    return recipe
