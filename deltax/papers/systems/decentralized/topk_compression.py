"""Sparsified SGD with Memory. Stich, Cordonnier, Jaggi, 2018. arXiv:1809.07599

Data-parallel SGD, but each worker sends the k largest entries of its step and adds the rest to the next.

Without error feedback small entries are never sent. With it everything is sent in the end, only later, and SGD's rate
of convergence stays. Here workers send the step of their optimizer (AdamW's as well as SGD's), and all start each step
from the same weights. Activations have no next message: see `beyond_topk`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltax import Part, UserError, paper, part
from deltax.papers.optimization.local_updates.local_sgd import LocalSteps, average
from deltax.papers.optimization.optimizers.sgd import sgd
from deltax.parts.distributed.exchange import Exchange, Payload, nbytes


class TopK:
    """Code: indices and values of a share `keep` of a vector's entries, at least one, with the largest magnitude.

    8 bytes an entry in float32. Raises UserError for a share outside (0, 1].
    """

    def __init__(self, *, keep: float = 0.01):
        if not 0 < keep <= 1:
            raise UserError(f"keep must be a share of entries in (0, 1], not {keep}: choose 0.01 for 1 %")
        self.keep = keep

    def encode(self, vector: Tensor) -> Payload:
        where = vector.abs().topk(max(1, round(self.keep * len(vector)))).indices
        size = torch.tensor([len(vector)], dtype=torch.int32, device=vector.device)
        # 4 bytes of index and 4 of value an entry, and the length
        return where.int(), vector[where], size

    def decode(self, payload: Payload) -> Tensor:
        where, values, size = payload
        return values.new_zeros(int(size)).index_copy_(0, where.long(), values)


class Remembered(Exchange):
    """All-to-all exchange of coded messages with error feedback.

    With residual e and vector v: p = memory e + v; send code(p); e <- p - code(p). A `memory` of 0 turns feedback off.
    Each worker sends P - 1 copies of its message.
    """

    def __init__(self, *, code: Part = part(TopK), memory: float = 1.0):
        super().__init__(code=code)
        self.weight = memory
        self.residuals: dict[int, Tensor] = {}

    def among(self, vectors: Mapping[int, Tensor]) -> Tensor:
        payloads = [self._message(worker, vector) for worker, vector in vectors.items()]
        # no ring: sums of sparse messages would fill up
        self.sent += (len(payloads) - 1) * max(map(nbytes, payloads))
        return torch.stack([self.code.decode(p) for p in payloads]).mean(0)

    def over(self, group: Any, vector: Tensor) -> Tensor:
        payload = self._message(0, vector)
        rows = [[[torch.empty_like(t) for _ in range(group.size())]] for t in payload]
        for row, tensor in zip(rows, payload, strict=True):
            group.allgather(row, [tensor.contiguous()]).wait()
        self.sent += (group.size() - 1) * nbytes(payload)
        decoded = [self.code.decode(tuple(row[0][rank] for row in rows)) for rank in range(group.size())]
        return torch.stack(decoded).mean(0)

    def memory(self) -> dict[str, Tensor]:
        return {f"residual{worker}": residual for worker, residual in self.residuals.items()}

    def prepare(self, workers: int, vector: Tensor) -> None:
        self.residuals = {worker: torch.zeros_like(vector) for worker in range(workers)}

    def _message(self, worker: int, vector: Tensor) -> Payload:
        residual = self.residuals[worker]
        # p = memory e + v; send code(p); e <- p - code(p)
        wanted = self.weight * residual + vector
        payload = self.code.encode(wanted)
        residual.copy_(wanted - self.code.decode(payload))
        return payload


@paper(on=sgd, arxiv="1809.07599", year=2018)
def topk_compression(recipe: Part, *, workers: int = 4, keep: float = 0.01, memory: float = 1.0) -> Part:
    exchange = part(Remembered, code=part(TopK, keep=keep), memory=memory)
    if "exchange" in recipe.slots():
        return recipe.fill("exchange", exchange)
    # one local step between exchanges: synchronous data parallelism
    return recipe.wrap("optimizer", LocalSteps, workers=workers, every=1, outer=part(average), exchange=exchange)
