"""What a trained model makes of held-out pictures, drawn: boxes, masks, captions, classes, attention, and what it draws
again. Titles are the names that the task has for its classes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor, nn

from deltax.lab.figures import INK, STYLE, inline
from deltax.parts.model.autoencoder import Autoencoder
from deltax.parts.model.patches import ImageClassifier
from deltax.parts.model.videos import film
from deltax.recipe import Part
from deltax.shapes import Images
from deltax.tasks.detection.masks import draw_masks
from deltax.tasks.detection.scenes import draw, framed, gallery
from deltax.tasks.multimodal.pairs import zero_shot

COUNT = 8
LONGEST = 28  # characters of a name or caption
RED = "#d64550"


@torch.no_grad()
def pictures(recipe: Part, task: Any, model: nn.Module) -> dict[str, str]:
    """Captions with SVG, of the first held-out pictures; empty where a task has none or nothing is known to be drawn.

    The model is left in evaluation mode. The same weights give the same text.
    """
    if "channels" not in task.task_spec:
        return {}
    batch = next(iter(task.held_out_batches(COUNT)))
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = {}
    with torch.random.fork_rng(), matplotlib.rc_context({**STYLE, "axes.grid": False}):
        torch.manual_seed(0)
        for way in WAYS:
            for caption, figure in way(recipe, task, model, batch.to(device)).items():
                found[caption] = inline(figure, f"{recipe.id} {caption}")
    return found


Drawn = dict[str, Figure]


def _things(recipe: Part, task: Any, model: Any, batch: Any) -> Drawn:
    """Boxes or masks over scenes."""
    names = [shortened(name) for name in getattr(task, "class_names", ())] or None
    if hasattr(batch, "masks") and hasattr(model, "segment"):
        figure = draw_masks(batch.images, model.segment(batch.images), batch, names=names, light=_light(recipe))
        return {"Masks: what was found at a score of at least 0.5, and, dashed, what is there": figure}
    if hasattr(batch, "boxes") and hasattr(model, "detect"):
        figure = draw(batch.images, model.detect(batch.images), batch, names=names, light=_light(recipe))
        return {"Boxes: what was found at a score of at least 0.5, and, dashed, what is there": figure}
    return {}


def _captions(recipe: Part, task: Any, model: Any, batch: Any) -> Drawn:
    """Pictures with the caption that lies nearest, of all that are held out."""
    if not (hasattr(model, "see") and hasattr(model, "read") and hasattr(task, "prompts")):
        return {}
    prompts = next(iter(task.prompts().values()))
    asked = task.all().labels.unique()
    said = asked[zero_shot(model, batch.images, prompts[asked])]
    return {
        "The nearest caption of all that are held out; red where it is another's": _told(
            recipe, task.names, said, batch
        )
    }


def _classes(recipe: Part, task: Any, model: Any, batch: Any) -> Drawn:
    """Pictures with the class that a classifier says they show."""
    names = getattr(task, "classes", None) or [str(i) for i in range(task.task_spec.get("classes", 0))]
    if not (hasattr(batch, "labels") and batch.labels.ndim == 1 and hasattr(batch, "images")):
        return {}
    if isinstance(model, Autoencoder) or hasattr(model, "read") or not hasattr(task, "accuracy"):
        return {}
    said = model(batch.images)
    if not isinstance(said, Tensor) or said.shape != (len(batch.labels), len(names)) or hasattr(model, "projector"):
        return {}
    return {"The class that was said; red where it is wrong": _told(recipe, names, said.argmax(-1), batch)}


def _attention(recipe: Part, task: Any, model: Any, batch: Any) -> Drawn:
    """Where a class token looks, over the picture."""
    from deltax.papers.language.attention.softmax_attention import Attention
    from deltax.papers.vision.backbones.vit import ViT, attention_maps

    seer = getattr(model, "image", model)
    trunk = seer.trunk if isinstance(seer, ImageClassifier) else None
    if not (isinstance(trunk, ViT) and trunk.prefix and any(type(m) is Attention for m in trunk.stack.modules())):
        return {}
    looked = attention_maps(trunk, batch.images).mean(1)
    figure, panels = gallery(batch.images, light=_light(recipe))
    for axes, each in zip(panels, looked, strict=False):
        ink = np.broadcast_to(np.array(to_rgba(RED)), (*each.shape, 4)).copy()
        ink[..., 3] = 0.85 * (each / each.max().clamp(min=1e-9)).numpy(force=True)
        axes.imshow(ink, extent=axes.images[0].get_extent(), zorder=2)
    return {"Where the class token looks in the last block, the mean over heads; redder is more": figure}


def _redrawn(recipe: Part, task: Any, model: Any, batch: Any) -> Drawn:
    """Pictures as they are, as they were given, and as the model draws them."""
    from deltax.papers.vision.backbones.u_net import Restorer
    from deltax.papers.vision.self_supervised.mae import MaskedAutoencoder, filled_in

    if hasattr(batch, "videos") and isinstance(model, Autoencoder):
        return {"Held-out videos, a frame a column, and under each what comes back": film(batch.videos[:4], model)}
    if not hasattr(batch, "images"):
        return {}
    images = batch.images
    if isinstance(model, MaskedAutoencoder):
        noise = torch.rand(len(images), model.trunk.grid[0] * model.trunk.grid[1]).to(images.device)
        rows = filled_in(model, images, noise)
        return {"Seen; filled in, given each hidden patch's true mean and deviation; true": _rows(recipe, rows)}
    if isinstance(model, Restorer):
        spoilt = images + recipe["objective.noise"] * torch.randn(images.shape).to(images.device)
        return {
            "Spoilt, restored and true": _rows(recipe, {"spoilt": spoilt, "restored": model(spoilt), "true": images})
        }
    if isinstance(model, Autoencoder):
        return {
            "Held-out pictures, and what comes back": _rows(recipe, {"true": images, "rebuilt": model(images).pixels})
        }
    return {}


WAYS: tuple[Callable[[Part, Any, Any, Any], Drawn], ...] = (_things, _captions, _classes, _attention, _redrawn)


def shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _light(recipe: Part) -> str:
    """A user's grey pictures are photographs; the digits are ink."""
    return "paper" if dict(recipe["task"].kwargs).get("source") in (None, "digits") else "photo"


def _told(recipe: Part, names: Sequence[str], said: Tensor, batch: Any) -> Figure:
    """Pictures under what is said of them, in red with what is true where that is another."""
    figure, panels = gallery(batch.images, light=_light(recipe))
    for axes, mine, true in zip(panels, said.tolist(), batch.labels.tolist(), strict=False):
        axes.set_title(shortened(names[mine]), fontsize=10, color=INK if mine == true else RED)
        if mine != true:
            axes.set_xlabel(f"is: {shortened(names[true])}", fontsize=10)
    return figure


def _rows(recipe: Part, rows: Mapping[str, Images]) -> Figure:
    """A row for each word, a column for each picture."""
    count = min(len(images) for images in rows.values())
    figure = Figure(figsize=(0.9 * COUNT + 0.8, 0.9 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), COUNT, squeeze=False)
    for line, (word, images) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=False):
            framed(axes, image, light=_light(recipe))
        for axes in line[count:]:
            axes.set_axis_off()
        line[0].set_ylabel(word, rotation=0, ha="right", va="center")
    return figure
