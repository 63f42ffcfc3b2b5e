"""Sparsified SGD with Memory. Stich, Cordonnier, Jaggi, 2018. arXiv:1809.07599

Synchronous data-parallel SGD, but each worker sends only the k largest entries of its step, and adds what was left out
to the next message.

Without the memory small entries are never sent, and what they would have done is lost; with it everything is sent in
the end, only later, and SGD's rate of convergence stays. What the workers send here is the step that their optimizer
made (AdamW's as well as SGD's), and all start each step from the same weights. Activations have no next message: see
`beyond_topk`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper, part
from deltax.papers.language.gpt import gpt
from deltax.papers.optimization.local_sgd import LocalSteps, average
from deltax.papers.optimization.sgd import sgd
from deltax.parts import optimizers
from deltax.parts.exchange import Exchange, Payload, nbytes, ring_bytes
from deltax.parts.replicas import flat


class TopK:
    """The `keep` largest entries of a vector in absolute value, at least one: where they stand, and what they are.

    8 bytes an entry in float32. Raises UserError for a share outside (0, 1].
    """

    def __init__(self, *, keep: float = 0.01):
        if not 0 < keep <= 1:
            raise UserError(f"keep is the share of entries that is sent, above 0 and at most 1, not {keep}")
        self.keep = keep

    def encode(self, vector: Tensor) -> Payload:
        where = vector.abs().topk(max(1, round(self.keep * len(vector)))).indices
        size = torch.tensor([len(vector)], dtype=torch.int32, device=vector.device)
        return where.int(), vector[where], size

    def decode(self, payload: Payload) -> Tensor:
        where, values, size = payload
        return values.new_zeros(int(size)).index_copy_(0, where.long(), values)


class Remembered(Exchange):
    """Everybody sends a coded message to everybody; what the code loses of a message is added to the next.

    With residual e and vector v: p = memory e + v; send code(p); e <- p - code(p). A `memory` of 0 forgets. Each worker
    sends P - 1 copies of its message, whatever the others send.
    """

    def __init__(self, *, code: Part = part(TopK), memory: float = 1.0):
        super().__init__(code=code)
        self.weight = memory
        self.residuals: dict[int, Tensor] = {}

    def among(self, vectors: Mapping[int, Tensor]) -> Tensor:
        payloads = [self._message(worker, vector) for worker, vector in vectors.items()]
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
        wanted = self.weight * residual + vector
        payload = self.code.encode(wanted)
        residual.copy_(wanted - self.code.decode(payload))
        return payload


@paper(on=sgd, arxiv="1809.07599", year=2018)
def topk_compression(recipe: Part, *, workers: int = 4, keep: float = 0.01, memory: float = 1.0) -> Part:
    exchange = part(Remembered, code=part(TopK, keep=keep), memory=memory)
    if "exchange" in recipe.slots():
        return recipe.fill("exchange", exchange)
    return recipe.wrap("optimizer", LocalSteps, workers=workers, every=1, outer=part(average), exchange=exchange)


@claim
def what_was_sent_and_what_was_kept_is_what_was_wanted():
    """With memory, the messages of a worker so far and its residual sum to the vectors that it was given."""
    torch.manual_seed(0)
    for keep in (0.03, 0.4):
        exchange = _exchange(3, 71, keep=keep)
        given, found = torch.zeros(71, dtype=torch.float64), torch.zeros(71, dtype=torch.float64)
        for _ in range(20):
            vectors = torch.randn(3, 71, dtype=torch.float64)
            given += vectors.mean(0)
            found += exchange.among(dict(enumerate(vectors)))
        left = torch.stack(list(exchange.residuals.values())).mean(0)
        torch.testing.assert_close(found + left, given, rtol=1e-12, atol=1e-12)
        assert (found - given).norm() > 0.1


@claim
def the_largest_entries_are_the_best_choice():
    """What k of d entries leave of a vector has at most 1 - k/d of its square, and no other k entries leave less."""
    torch.manual_seed(0)
    code = TopK(keep=7 / 31)
    for scale in (1.0, 3.0):
        x = torch.randn(31, dtype=torch.float64).abs() ** scale
        left = (x - code.decode(code.encode(x))).square().sum()
        assert left <= (1 - 7 / 31) * x.square().sum()
        for _ in range(50):
            other = x.clone()
            other[torch.randperm(31)[:7]] = 0
            assert left <= other.square().sum()


@claim
def all_entries_are_data_parallelism():
    """With keep = 1 nothing is left over, and training is that of SGD on the mean gradient of the workers."""
    torch.manual_seed(0)
    exchange = _exchange(3, 17, keep=1.0)
    vectors = torch.randn(3, 17, dtype=torch.float64)
    torch.testing.assert_close(exchange.among(dict(enumerate(vectors))), vectors.mean(0), rtol=1e-12, atol=1e-12)
    assert not any(r.any() for r in exchange.residuals.values())
    apart, together = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    together.load_state_dict(apart.state_dict())
    ours = (gpt + sgd + topk_compression(workers=2, keep=1.0))["optimizer"](apart)
    theirs = optimizers.sgd(together)
    for _ in range(5):
        theirs.zero_grad()
        for x in torch.randn(2, 7, 5, dtype=torch.float64):
            ours.zero_grad()
            apart(x).square().mean().backward()
            ours.step()
            (together(x).square().mean() / 2).backward()
        theirs.step()
    torch.testing.assert_close(flat(ours.shared), flat(list(together.parameters())), rtol=1e-12, atol=1e-12)


@claim
def memory_brings_it_to_the_optimum():
    """Logistic regression on 4 workers, each step sending 1 % of the entries: with memory the loss comes as near to the
    optimum as with all entries; without, what two workers disagree on most is all that they ever send.
    """
    torch.manual_seed(0)
    dim = 100
    truth = torch.randn(dim, dtype=torch.float64)
    x = torch.randn(4, 60, dim, dtype=torch.float64)
    x[..., 0] += 8.0 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    y = (x @ truth > 0).double()
    logits = lambda w: torch.einsum("knd,d->kn", x, w)
    loss = lambda w: nn.functional.binary_cross_entropy_with_logits(logits(w), y) + 0.05 * w.square().sum()
    gradients = lambda w: torch.einsum("knd,kn->kd", x, logits(w).sigmoid() - y) / x.shape[1] + 0.1 * w
    ends = {}
    for name, keep, memory in (("all", 1.0, 1.0), ("memory", 0.01, 1.0), ("forgetful", 0.01, 0.0)):
        exchange, w = _exchange(4, dim, keep=keep, memory=memory), torch.zeros(dim, dtype=torch.float64)
        for step in range(400):
            w = w - exchange.among(dict(enumerate(0.5 / (1 + step / 50) * gradients(w))))
        ends[name] = loss(w).item()
    assert ends["memory"] < ends["all"] + 0.02 < ends["forgetful"] - 0.02


@claim
def a_message_is_eight_bytes_an_entry():
    """In float32 a message of k entries has 4 bytes for each place, 4 for each value and 4 for the length, and goes to
    P - 1 others: at k = 1 % of N and 4 workers, 3 * (0.08 N + 4) bytes against the 6 N of a ring.
    """
    exchange = _exchange(4, 1000, keep=0.01)
    exchange.prepare(4, torch.zeros(1000))
    exchange.among(dict(enumerate(torch.randn(4, 1000))))
    assert exchange.sent == 3 * (10 * 8 + 4) and ring_bytes(1000, 4) == 6 * 1000


@claim.measured(paper="converges at the rate of SGD while sending k of d entries (Theorem 2.4)")
def one_in_a_hundred_is_enough(lab):
    """Sending 1 % of each step, gpt on 4 workers under SGD ends at most 0.1 bits per byte above sending all of it."""
    small = lab.recipe("gpt(dim=48, depth=2)+sgd").put("loop.batch", 8)
    ends = lambda **given: [lab.train(small + topk_compression(**given), seed=s, steps=800).score for s in lab.seeds(3)]
    whole, ours, forgetful = ends(keep=1.0), ends(), ends(memory=0.0)
    gaps = [a - b for a, b in zip(ours, whole, strict=True)]
    numbers = {"all": whole, "1 %": ours, "1 % without memory": forgetful}
    return lab.at_most(gaps, 0.1, unit="bits per byte", numbers=numbers)


def _exchange(workers: int, numbers: int, *, keep: float, memory: float = 1.0) -> Remembered:
    exchange = Remembered(code=part(TopK, keep=keep), memory=memory)
    exchange.prepare(workers, torch.zeros(numbers, dtype=torch.float64))
    return exchange
