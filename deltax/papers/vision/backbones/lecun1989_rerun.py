"""Deep Neural Nets: 33 years ago and 33 years from now. Karpathy, 2022.

LeNet of 1989, but trained with the methods of 2022, one change at a time.

The 9,760 parameters stay. Another loss and optimizer, shift augmentation, dropout, more passes and more images more
than halve the errors. Karpathy's re-run has five stops, each a bundle of changes; here each rung is one change, so each
can be measured alone. Longer training is a rung of its own. Karpathy also starts the output biases at 0 after the first
change, which softmax cannot distinguish.
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


def slower(recipe: Part) -> Part:
    """A third of the learning rate, better for softmax cross-entropy."""
    return recipe.put("optimizer.rate", 0.01)


def decayed(recipe: Part) -> Part:
    """The learning rate falls linearly to a third."""
    return recipe.fill("schedule", linear, warmup=0.0, floor=1 / 3)


def passes(recipe: Part, *, of: int) -> Part:
    """`of` passes over the 300 images, one image per step."""
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
    """relu replaces tanh."""
    return recipe.fill("activation", relu)


def more_images(recipe: Part) -> Part:
    """All 1000 training images, with the same number of steps."""
    return recipe.put("task.images", 1000)


RUNGS: tuple[Callable[[Part], Part], ...] = (
    cross_entropy,
    # stop 1 of the re-run: softmax cross-entropy, lr 0.01
    slower,
    # stop 2: AdamW at 3e-4, decayed to 1e-4, 46 passes
    adamw(rate=3e-4),
    decayed,
    longer,
    shift_augmentation,
    # stop 3: shifts by -1 to 1 pixel, 60 passes
    longer_still,
    # stop 4: dropout, relu, 80 passes
    dropout(p=0.25),
    rectified,
    longest,
    more_images,
)


@paper(on=(lenet_1989, cross_entropy, adamw, dropout), year=2022, url="http://karpathy.github.io/2022/03/14/lecun1989/")
def lecun1989_rerun(*, rung: int = 10) -> Part:
    """LeNet of 1989 after the first `rung` changes, 0 to 11. Raises UserError for other numbers."""
    if type(rung) is not int or not 0 <= rung <= len(RUNGS):
        raise UserError(f"the re-run has rungs 0 to {len(RUNGS)}, not {rung!r}; set rung to one of these")
    recipe = lenet_1989
    for change in RUNGS[:rung]:
        recipe = change(recipe)
    return recipe
