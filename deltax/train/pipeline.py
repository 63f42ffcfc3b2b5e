"""A language model cut into stages, run one forward, one backward by torch.distributed.pipelining."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from deltax.errors import UserError
from deltax.parts.model.language_model import LanguageModel, Tied


class Passed(nn.Module):
    """What another stage does: the stream goes by."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x


class Table(Passed):
    """The token embedding on the last stage, where a tied head reads it and the stream goes by."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


def cut(model: nn.Module, stage: int, stages: int) -> None:
    """Leave of a model what this stage computes, under the names of the whole.

    Raises UserError for a model that is no LanguageModel over a stack of blocks, or a depth that does not divide.
    """
    blocks = getattr(getattr(model, "stack", None), "blocks", None)
    if not isinstance(model, LanguageModel) or not isinstance(blocks, nn.ModuleList):
        raise UserError(f"pp={stages} cuts a language model's stack of blocks; {type(model).__name__} has none")
    if len(blocks) % stages:
        raise UserError(f"pp={stages} does not divide the {len(blocks)} blocks; set model.stack.depth to a multiple")
    each = len(blocks) // stages
    for i in range(len(blocks)):
        if i // each != stage:
            blocks[i] = Passed()
    first, last = stage == 0, stage == stages - 1
    if not last:
        model.norm, model.head = Passed(), Passed()
    if not first:
        tied = last and isinstance(model.head, Tied)
        model.embedding = Table(model.embedding.weight) if tied else Passed()
        model.position, model.stack.entry = Passed(), Passed()


class Pipeline(nn.Module):
    """All stages, from the point of view of one.

    `backward` trains: batches stream through all stages. `forward` evaluates, one stage after the other: tokens (B, T)
    -> logits (B, T, V) on every process.
    """

    def __init__(self, stage: nn.Module, device: torch.device, group: distributed.ProcessGroup):
        super().__init__()
        self.stage, self.device, self.group = stage, device, group
        self.at, self.count = distributed.get_rank(group), distributed.get_world_size(group)
        self.bare = [stage.module if isinstance(stage, nn.parallel.DistributedDataParallel) else stage]
        self.schedule: Any = None

    def backward(self, objective: Callable[..., Tensor], pieces: list[Any]) -> Tensor:
        """Gradients of the mean loss over equal pieces; that loss on the last stage, zero on the others."""
        if self.schedule is None:
            from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # takes a second to load

            stage = PipelineStage(self.stage, self.at, self.count, self.device, group=self.group)
            self.schedule = Schedule1F1B(stage, len(pieces), loss_fn=lambda *given: self._loss(*given))
        self._loss = lambda logits, piece: objective(Said(logits), pieces[int(piece[0])]).mean()
        rows = len(pieces[0].inputs)
        losses: list[Tensor] = []
        if self.at == 0:
            self.schedule.step(torch.cat([piece.inputs for piece in pieces]))
        elif self.at < self.count - 1:
            self.schedule.step()
        else:
            self.schedule.step(target=torch.arange(len(pieces)).repeat_interleave(rows), losses=losses)
        self._add_tied_gradients()
        return torch.stack(losses).mean().detach() if losses else torch.zeros((), device=self.device)

    def forward(self, tokens: Tensor) -> Tensor:
        x, shape = tokens, [None]
        for at in range(self.count):
            if at == self.at:
                x = self.stage(x).float()
                shape = [x.shape]
            source = distributed.get_global_rank(self.group, at)
            distributed.broadcast_object_list(shape, source, group=self.group)
            x = x if at == self.at else torch.empty(shape[0], device=self.device)
            distributed.broadcast(x, source, group=self.group)
        return x

    def _add_tied_gradients(self) -> None:
        """The first stage embeds with the table that the last reads: each adds the other's gradient to its own."""
        tied = torch.tensor(float(isinstance(self.bare[0].embedding, Table)), device=self.device)
        distributed.all_reduce(tied, group=self.group)
        if not tied or 0 < self.at < self.count - 1:
            return
        gradient = self.bare[0].embedding.weight.grad
        mine = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        theirs, mine = torch.empty_like(mine), mine.contiguous()
        other = distributed.get_global_rank(self.group, self.count - 1 - self.at)
        moves = [distributed.P2POp(distributed.isend, mine, other), distributed.P2POp(distributed.irecv, theirs, other)]
        for work in distributed.batch_isend_irecv(moves):
            work.wait()
        mine.add_(theirs)


class Said:
    """A stand-in for the model, once the pipeline has computed what it says."""

    def __init__(self, logits: Tensor):
        self.logits: Tensor | None = logits

    def __call__(self, *inputs: Any) -> Tensor:
        if self.logits is None:
            raise UserError("a pipeline runs objectives that ask the model once; train this recipe without pp")
        logits, self.logits = self.logits, None
        return logits
