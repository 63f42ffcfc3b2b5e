"""Layers that are wholly connected, from pixels to classes."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax.contract import IMAGES_TO_LOGITS
from deltax.parts.model.identity import Identity
from deltax.parts.model.mlp import relu
from deltax.parts.training.objectives import classify
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.roles import tag
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.recipe import Part, part
from deltax.shapes import Images


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


class Dense(nn.Linear):
    """x W' + b with W of variance 1 / D and b = 0. (..., D) -> (..., F)."""

    def __init__(self, dim: int, out: int):
        super().__init__(dim, out)
        tag(self.weight, "matrix")

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)


class Perceptron(nn.Module):
    """Images (B, C, Y, X) -> logits (B, V). Each hidden layer is dropout(activation(map_norm(x W' + b))).

    channels, size and classes are the task's.
    """

    interface = IMAGES_TO_LOGITS

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        *,
        widths: tuple[int, ...] = (256, 256),
        activation: Part = part(relu),
        map_norm: Part = part(Identity),
        dropout: Part = part(Identity),
    ):
        super().__init__()
        sizes = (channels * size * size, *widths)
        self.layers = nn.ModuleList(Dense(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(map_norm(width) for width in widths)
        self.dropouts = nn.ModuleList(dropout() for _ in widths)
        self.activation = activation
        self.classifier = Dense(sizes[-1], classes)

    def features(self, images: Images) -> Tensor:
        """The last hidden layer, (B, D)."""
        x = images.flatten(1)
        for layer, norm, dropout in zip(self.layers, self.norms, self.dropouts, strict=True):
            x = dropout(self.activation(norm(layer(x))))
        return x

    def forward(self, images: Images) -> Float[Tensor, "B V"]:
        return self.classifier(self.features(images))


def classifier(model: Part, task: Part, *, lr: float = 1e-3, batch: int = 64, steps: int = 300) -> Part:
    """A run that teaches a model to tell images apart: cross-entropy, AdamW without decay, a cosine."""
    return part(
        Run,
        model=model,
        task=task,
        objective=classify,
        batches=from_task,
        optimizer=part(adamw, lr=lr, weight_decay=0.0),
        schedule=cosine,
        loop=part(Loop, batch=batch, steps=steps),
    )
