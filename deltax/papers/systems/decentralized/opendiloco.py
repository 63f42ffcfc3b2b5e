"""OpenDiLoCo: An Open-Source Framework for Globally Distributed Low-Communication Training.
Jaghouar, Ong, Hagemann, 2024. arXiv:2407.07852

DiLoCo, but pseudo-gradients are all-reduced in float16, between peers that discover each other and may join or leave.

Differences of weights over hundreds of steps need less precision than the weights. The authors saw no loss from
float16, which halves the bytes. Their peers meet through Hivemind's hash table, on two continents; here they meet at a
register (`deltax.train.islands`), and training continues without a worker that dies.

    every worker, from the same weights w:
        w_i = H inner steps from w
        g = mean over workers of half(w - w_i)    # all-reduce around the ring
        w = outer Nesterov step from w along g
"""

from torch import Tensor

from deltax import Part, paper
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.parts.distributed.exchange import Payload


class Half:
    """Float16 code, decoded as float32; magnitudes are clamped to 65,504."""

    def encode(self, vector: Tensor) -> Payload:
        # the largest float16 number; beyond it half() would give infinity
        return (vector.clamp(-65504.0, 65504.0).half(),)

    def decode(self, payload: Payload) -> Tensor:
        return payload[0].float()


@paper(on=diloco, arxiv="2407.07852", year=2024, whole="gpt+diloco")
def opendiloco(recipe: Part) -> Part:
    return recipe.fill("code", Half)
