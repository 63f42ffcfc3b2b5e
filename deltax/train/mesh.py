"""Training on several processes. On one process `reducer` clips gradients, and the rest is the identity.

A mesh says how many processes share each kind of work, from the slowest wire to the fastest:

    pp    stages of a pipeline, `deltax.train.pipeline`
    dp    replicas, each with its share of every batch (DistributedDataParallel; without GPUs, where memory can be
          shared, `deltax.train.shared_memory`; with pp, fsdp or tp, FSDP2's replicas)
    fsdp  shards of parameters, gradients and optimizer state, each with its share of every batch (FSDP2)
    tp    shards of every attention and feed-forward branch, `deltax.train.tensor_parallel`

The losses are those of one process. Draws of an objective or of dropout are per share of the batch.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from deltax.errors import UserError
from deltax.train import shared_memory

PATIENCE = 600.0  # seconds that a process waits for the others
ARRIVAL = 60.0  # seconds that it waits for them to start, or its patience where that is longer

_ELSEWHERE = {"ddp": "dp", "data": "dp", "zero": "fsdp", "tensor": "tp", "megatron": "tp", "pipeline": "pp"}


@dataclass(frozen=True)
class Mesh:
    """How many processes share each kind of work; written `dp=2,tp=2`."""

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """Raises UserError for a word that names no axis, or a count below one."""
        known, found = [f.name for f in fields(cls)], {}
        for word in text.split(","):
            axis, _, count = word.strip().partition("=")
            if axis not in known:
                near = get_close_matches(axis.lower(), [*known, *_ELSEWHERE], 1, cutoff=0.5)  # of words of two letters
                hint = f"; did you mean {_ELSEWHERE.get(near[0], near[0])!r}?" if near else ""
                raise UserError(f"a mesh is written as in dp=2,tp=2, of {', '.join(known)}; there is no {axis!r}{hint}")
            if axis in found or not count.isdigit() or int(count) < 1:
                raise UserError(f"{word.strip()!r} in a mesh needs one count of at least 1, as in {axis}=2")
            found[axis] = int(count)
        return cls(**found)

    def __str__(self) -> str:
        return (
            ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1) or "dp=1"
        )

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.fsdp * self.tp

    @property
    def shares(self) -> int:
        """Into how many every batch is cut."""
        return self.dp * self.fsdp


class Lost(UserError):
    """Another process of the group died, or was not heard of in time."""


_layout, _grid = Mesh(), None
_shared: shared_memory.SharedSum | None = None  # over replicas of one machine


def started() -> int:
    """How many processes torchrun, or `deltax.train.launch`, started with this one, itself included; 0 where none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world if world > 1 else 0


def first() -> bool:
    """Whether this process is the first of those started together, or alone."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(layout: Mesh | None = None, *, patience: float = PATIENCE) -> Iterator[bool]:
    """Join the processes started with this one, and leave them at the end. Yields whether this one speaks for all.

    Without a layout all of them shard the model (fsdp). Raises UserError where the layout wants another number of
    processes or more GPUs than there are; Lost where another process ends, or is not heard of for `patience` seconds.
    """
    global _layout, _grid, _shared
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout or Mesh(fsdp=world)
    if layout.size != world:
        raise UserError(f"mesh {layout} wants {layout.size} processes, but {world} started; start {layout.size}")
    if world == 1:
        yield True
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"mesh {layout} wants a GPU a process, and there are {torch.cuda.device_count()} here")
        torch.cuda.set_device(local)
    try:
        arrival, wait = timedelta(seconds=max(patience, ARRIVAL)), timedelta(seconds=patience)
        distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=arrival)
        distributed.distributed_c10d._set_pg_timeout(wait, distributed.group.WORLD)
        _layout, _grid = layout, _lines(layout, device, wait)
        _shared = shared_memory.shared_sum(patience) if device == "cpu" and _replicated() else None
        yield distributed.get_rank() == 0
    except RuntimeError as error:
        if not _of_the_group(error):
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". This ")[0].strip()
        place = f"rank {os.environ['RANK']} of {world}"
        raise Lost(f"{place} lost another process ({reason}); start again to go on from the last checkpoint") from error
    else:
        distributed.destroy_process_group()
    finally:
        if _shared:
            _shared.close()
        _layout, _grid, _shared = Mesh(), None, None


def _lines(layout: Mesh, device: str, wait: timedelta) -> DeviceMesh:
    """The grid, a group for each line along each axis; those of `init_device_mesh` take no timeout."""
    ranks = torch.arange(layout.size).view(*vars(layout).values())
    groups = []
    for axis in range(ranks.ndim):
        for line in ranks.movedim(axis, -1).flatten(0, -2).tolist():
            group = distributed.new_group(line, timeout=wait)
            if distributed.get_rank() in line:
                groups.append(group)
    return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=tuple(vars(layout)))


def _of_the_group(error: RuntimeError) -> bool:
    said = str(error)
    return isinstance(error, distributed.DistError) or "gloo" in said or "Connection" in said


def layout() -> Mesh:
    """How the processes that train together are laid out."""
    return _layout


def grid(*axes: str) -> DeviceMesh:
    """The processes along these axes that work with this one."""
    assert _grid is not None, "there is a grid only inside joined()"
    return _grid[axes]


def size() -> int:
    """How many processes train together."""
    return _layout.size


def rank() -> int:
    """This process's number among them."""
    return distributed.get_rank() if size() > 1 else 0


def at(axis: str) -> int:
    """This process's number along an axis."""
    return grid(axis).get_local_rank() if size() > 1 else 0


def shard_index() -> int:
    """Which share of every batch is this process's."""
    return at("dp") * _layout.fsdp + at("fsdp")


def check(batch: int, accumulate: int) -> None:
    """Raises UserError for a batch that does not divide over the mesh."""
    pieces = microbatches(accumulate) * _layout.shares
    if size() > 1 and batch % pieces:
        raise UserError(
            f"a batch of {batch} does not divide into the {pieces} pieces of mesh {_layout} with {accumulate} to "
            f"accumulate; set loop.batch to a multiple of {pieces}"
        )


def microbatches(accumulate: int) -> int:
    """Into how many pieces each process cuts its share: a pipeline needs as many as it has stages."""
    return max(accumulate, _layout.pp)


def place(model: nn.Module, device: torch.device, *, compiled: bool = False) -> tuple[nn.Module, nn.Module]:
    """This process's part of the model, on the device, and the engine that `ask` computes its losses with.

    The names of the part's parameters are those of the whole model. Raises UserError where the mesh does not divide
    what it should.
    """
    if size() == 1:
        model.to(device)
        return model, torch.compile(model) if compiled else model
    from deltax.train import pipeline, tensor_parallel

    roles = {name: vars(p).get("role") for name, p in model.named_parameters()}
    if _layout.pp > 1:
        pipeline.cut(model, at("pp"), _layout.pp)
    if _layout.tp > 1:
        tensor_parallel.split(model, grid("tp"))
    engine = torch.compile(model) if compiled else model
    if _layout.fsdp > 1 or (_layout.dp > 1 and not _replicated()):
        engine = _sharded(model, engine, device)
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # gathers in two steps
    model.to(device)
    for name, parameter in model.named_parameters():
        if roles[name]:
            parameter.role = roles[name]
    if _replicated() and not _shared:
        engine = nn.parallel.DistributedDataParallel(Whole(engine), process_group=grid("dp").get_group())
    if _layout.pp > 1:
        engine = pipeline.Pipeline(engine, device, grid("pp").get_group())
    return model, engine


def ask(engine: nn.Module, work: Callable[..., Any], *given: Any) -> Any:
    """work(model, *given), inside the engine's one forward: all that `work` calls of the model sees whole weights."""
    hooked = isinstance(engine, (Whole, nn.parallel.DistributedDataParallel))
    return engine(work, *given) if hooked else work(engine, *given)


def beside(model: nn.Module, engine: nn.Module, work: Callable[[nn.Module], Any]) -> Any:
    """work(the model) beside its training, with whole weights; along a pipeline no process has all, and it is asked."""
    if _layout.pp > 1:
        return work(engine)
    return engine(lambda _: work(model)) if isinstance(engine, Whole) else work(model)


def reshard(engine: nn.Module) -> None:
    """Give back what this process holds of the others' shards. FSDP2 keeps some between a forward and a backward."""
    for module in engine.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def _replicated() -> bool:
    """DDP miscounts the gradients of a stage that several pieces pass."""
    return _layout.dp > 1 and _layout.pp == _layout.fsdp == _layout.tp == 1


class Whole(nn.Module):
    """A model behind one forward. DDP and FSDP2 act before and after a forward; an objective may ask for more of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *given: Any) -> Any:
        return work(self.model, *given)


def _sharded(model: nn.Module, engine: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2, block by block: no device ever holds all of the model."""
    from torch.distributed.fsdp import fully_shard

    over = grid("dp", "fsdp") if _layout.dp > 1 else grid("fsdp")
    scalars = {p for p in model.parameters() if p.ndim == 0}  # FSDP2 cannot shard them: each process keeps all
    for parameter in scalars:
        parameter.data = parameter.data.to(device)
        if parameter.requires_grad:
            parameter.register_hook(_mean_gradient)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = dict.fromkeys(block for inner in reversed(lists) for block in inner)  # what is inside comes first
    for block in blocks:
        small = not any(True for _ in block.children())  # shards of its own would cost more than they save
        if not small and not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters()):
            fully_shard(block, mesh=over, ignored_params=scalars)
    root = model if _layout.pp > 1 else Whole(engine)
    fully_shard(root, mesh=over, ignored_params=scalars)
    return engine if _layout.pp > 1 else root


def _mean_gradient(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    for axis in ("dp", "fsdp"):
        distributed.all_reduce(gradient, group=grid(axis).get_group())
    return gradient / _layout.shares


def gathered(pieces: list[Tensor]) -> list[Tensor]:
    """Of what this process has for each of its pieces, that of all processes, in the order of the pieces."""
    return pieces if _layout.shares == 1 else [shard for piece in pieces for shard in _of_shares(piece)]


def _of_shares(tensor: Tensor) -> list[Tensor]:
    held = tensor.contiguous()[None]
    for axis in ("fsdp", "dp"):  # a share's number counts fsdp fastest
        found = [torch.empty_like(held) for _ in range(getattr(_layout, axis))]
        distributed.all_gather(found, held, group=grid(axis).get_group())
        held = torch.cat(found)
    return list(held)


def sorted_groups(optimizer: torch.optim.Optimizer) -> None:
    """Divide the optimizer's groups so that each holds parameters spread in one way: fused steps take no mixture."""
    if size() > 1:
        groups = optimizer.param_groups
        groups[:] = [{**group, "params": alike} for group in groups for alike in _kinds(group["params"])]


def reducer(model: nn.Module, largest: float) -> Callable[[Tensor], tuple[float, Tensor]]:
    """What is to be done after each backward pass, on all processes.

    It takes this process's loss, the mean over its share of the batch, and scales all gradients so that their norm,
    taken over the whole model, is at most `largest`. Replicas that share memory take the mean of theirs first: no
    backward pass has done so. It returns the mean loss over the whole batch, and the norm that the gradients had.

    It raises UserError where DDP waited in vain for the gradient of a parameter that the loss does not depend on, and
    on several processes for a parameter that is trained only from the middle of the run on.
    """
    if size() == 1:
        weights = list(model.parameters())
        return lambda loss: (float(loss), nn.utils.clip_grad_norm_(weights, largest))
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    shared = shared_memory.Reducer(model, _shared, largest) if _shared else None

    def reduce(loss: Tensor) -> tuple[float, Tensor]:
        if unfrozen := [name for name, p in frozen if p.requires_grad]:
            raise UserError(
                f"{unfrozen[0]} was frozen when the run began, and mesh {_layout} sums no gradient of it; train it "
                "from the first step on, or use one process"
            )
        return shared(loss) if shared else (_mean(loss), _clip(model, largest))

    return reduce


def _clip(model: nn.Module, largest: float) -> Tensor:
    from deltax.train.pipeline import Table

    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if _replicated() and unused:
        raise UserError(
            f"mesh {_layout} needs a gradient for {unused[0]}, and the loss has none; use fsdp in place of dp"
        )
    kinds = _kinds([p for p in model.parameters() if p.grad is not None])
    elsewhere = {id(m.weight) for m in model.modules() if isinstance(m, Table)}
    square = torch.zeros((), device=grid("pp").device_type)
    for alike in kinds:
        square += _square([p.grad for p in alike if id(p) not in elsewhere])
    distributed.all_reduce(square, group=grid("pp").get_group())
    norm = square.sqrt()
    for alike in kinds:
        nn.utils.clip_grads_with_norm_(alike, largest, norm)
    return norm


def _square(gradients: list[Tensor]) -> Tensor | float:
    """The squared norm of gradients that are spread alike, all their shards counted."""
    if not gradients or not isinstance(gradients[0], DTensor):
        return nn.utils.get_total_norm(gradients).square()
    over = gradients[0].device_mesh
    square = torch.zeros((), device=over.device_type)
    for gradient in gradients:
        copies = math.prod(over.size(i) for i, placed in enumerate(gradient.placements) if placed.is_replicate())
        square += gradient.to_local().norm().square() / copies
    for group in over.get_all_groups():
        distributed.all_reduce(square, group=group)
    return square


def _kinds(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters, those together that are spread over the same processes."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(kinds.values())


def shard(pieces: list) -> list:
    """Every n-th piece, beginning with this process's own."""
    return pieces[shard_index() :: _layout.shares]


def _mean(value: Tensor) -> float:
    """The mean over all shares of the batch; along a pipeline, of the sum of its stages' values."""
    return float(_summed(value) / (size() / _layout.pp))


def of_first(number: float) -> float:
    """The first process's number, on all; each process must ask."""
    return number if size() == 1 else float(_summed(torch.tensor(float(number) * (rank() == 0))))


def _summed(value: Tensor) -> Tensor:
    """The sum over all processes; `value` may become it."""
    if _shared:
        return _shared(value)
    value = value.to(grid("pp").device_type)
    distributed.all_reduce(value)
    return value


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from every process where it is sharded; each process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def of_all_stages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of every stage of the pipeline; each process must ask."""
    if _layout.pp == 1:
        return tensors
    found: list[Any] = [None] * _layout.pp
    distributed.all_gather_object(found, tensors, group=grid("pp").get_group())
    return {name: tensor for stage in reversed(found) for name, tensor in stage.items()}


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device_mesh.device_type), model.device_mesh, model.placements)
