"""Weights and the state of an optimizer as safetensors: nothing here ever unpickles."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deltax.errors import StoreError, UserError
from deltax.train import mesh
from deltax.whole import whole


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON facts at once: the file is whole or not there, whenever the process dies.

    Raises StoreError when the disk is full or the folder cannot be written.
    """
    plain = {k: mesh.whole(v.detach()).contiguous().cpu().clone() for k, v in tensors.items()}
    plain = mesh.of_all_stages(plain)
    if mesh.rank() > 0:
        return
    try:
        with whole(path) as scratch:
            save_file(plain, scratch, {"facts": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write {path}: {_reason(error)}; free some space or choose another --store") from None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts. Raises UserError when the file is no checkpoint of ours, or is cut short."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a checkpoint that can be read ({_reason(error)}); delete it to start anew"
        ) from None


def flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of both as one flat dict. Numbers of the optimizer become tensors; the learning rate is not state."""
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    names = _names(model, optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        for word, value in state.items():
            if isinstance(value, (Tensor, int, float)):
                tensors[f"optimizer/{names[index]}/{word}"] = torch.as_tensor(value)
    return tensors


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `flatten` took, on this mesh or another."""
    load_model(model, {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {name: index for index, name in _names(model, optimizer).items()}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        _, *name, word = key.split("/")
        if key.startswith("optimizer/") and name[0] in index_of:
            index = index_of[name[0]]
            shaped = value.shape == parameters[index].shape
            state.setdefault(index, {})[word] = mesh.like(value, parameters[index]) if shaped else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_model(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole weights into a model, sharded or not; a stage of a pipeline takes its own."""
    ours = model.state_dict()
    if mesh.layout().pp > 1:
        weights = {k: v for k, v in weights.items() if k in ours}
    model.load_state_dict({k: mesh.like(v, ours[k]) if k in ours else v for k, v in weights.items()})


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The name of each of the optimizer's parameters, by its number; one that is not the model's keeps the number."""
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {index: names.get(id(p), str(index)) for index, p in enumerate(parameters)}


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
