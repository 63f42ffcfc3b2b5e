"""Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift. Ioffe, Szegedy, 2015.
arXiv:1502.03167

A deep network, but each channel is standardised over the batch before its nonlinearity.

However large the weights before it, what comes out is the same, so the rate may be large, and weights that have grown
take smaller steps by themselves. Mean and variance are the batch's own in training, and gradients pass through them;
a running average of both is used afterwards, and can then be folded into the map before. As in released code, the
running variance is the unbiased one, and the one that is divided by is not.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import Part, UserError, paper
from deltax.parts.training.objectives import mixes
from deltax.parts.training.roles import tag

Channels = Float[Tensor, "B C ..."]


@mixes("batch norm standardises each piece by itself; its running averages are of the first process's pieces")
class BatchNorm(nn.Module):
    """weight * standardised(x) + bias in training; by running mean and variance otherwise. (B, C, ...) -> (B, C, ...).

    The names are those of torch's BatchNorm1d and 2d, so their states load. Raises UserError in training on a batch
    with one value a channel, which has no variance.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = tag(nn.Parameter(torch.ones(channels)), "vector")
        self.bias = tag(nn.Parameter(torch.zeros(channels)), "vector")
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Channels) -> Channels:
        if self.training:
            if x.numel() == x.shape[1]:
                raise UserError("batch norm cannot train on one value a channel: set loop.batch to at least 2")
            self.num_batches_tracked += 1
        average = (self.running_mean, self.running_var)
        return nn.functional.batch_norm(x, *average, self.weight, self.bias, self.training, self.momentum, self.eps)


@torch.no_grad()
def folded(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight (D, ...) and bias of a map with the norm after it, in evaluation, made part of it (section 3.1)."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift if bias is None else bias * scale + shift


@paper(year=2015, arxiv="1502.03167", whole="lenet-1989")
def batch_norm(recipe: Part, *, momentum: float = 0.1) -> Part:
    return recipe.fill("map_norm", BatchNorm, momentum=momentum)
