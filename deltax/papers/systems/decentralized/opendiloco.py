"""OpenDiLoCo: An Open-Source Framework for Globally Distributed Low-Communication Training.
Jaghouar, Ong, Hagemann, 2024. arXiv:2407.07852

DiLoCo, but the pseudo-gradients go round in half precision, between peers that find each other and may come and go.

Differences of weights over hundreds of steps need less precision than the weights they are added to: float16 costs
nothing that the authors could see, and halves what is sent. Their peers meet over Hivemind's hash table, on two
continents; here they meet at a register (`deltax.train.islands`), and a worker that dies is gone on without.
"""

from torch import Tensor

from deltax import Part, paper
from deltax.papers.optimization.local_updates.diloco import diloco
from deltax.parts.distributed.exchange import Payload


class Half:
    """Every number as float16, decoded as float32; what is beyond 65,504 is held there."""

    def encode(self, vector: Tensor) -> Payload:
        return (vector.clamp(-65504.0, 65504.0).half(),)

    def decode(self, payload: Payload) -> Tensor:
        return payload[0].float()


@paper(on=diloco, arxiv="2407.07852", year=2024, whole="gpt+diloco")
def opendiloco(recipe: Part) -> Part:
    return recipe.fill("code", Half)
