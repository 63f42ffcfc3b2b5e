"""Each parameter's role, so that optimizers can treat matrices, gains and embeddings each in their own way."""

from collections import defaultdict
from typing import Literal, TypeVar

from torch import Tensor, nn

Role = Literal["matrix", "vector", "embedding", "gate"]
AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def tag(parameter: AnyTensor, role: Role) -> AnyTensor:
    """Say what a parameter is for. Returns it."""
    parameter.role = role
    return parameter


def role_of(parameter: Tensor) -> Role:
    """The tag, or, for a module that does not tag, "matrix" from two axes on and "vector" below."""
    return getattr(parameter, "role", "matrix" if parameter.ndim >= 2 else "vector")


def by_role(model: nn.Module) -> dict[Role, list[nn.Parameter]]:
    """The trainable parameters of a model, each once, by role.

    A parameter that several modules share is an embedding where one of them is an `nn.Embedding`.
    """
    tables = [m.parameters(recurse=False) for m in model.modules() if isinstance(m, nn.Embedding)]
    embeddings = {id(p) for table in tables for p in table}
    found: dict[Role, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():  # torch lists a shared parameter once
        if parameter.requires_grad:
            found["embedding" if id(parameter) in embeddings else role_of(parameter)].append(parameter)
    return dict(found)
