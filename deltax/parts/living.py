"""The parts of a module that somebody else wrote, found by role.

Norms and activations are known by their class, linear maps by what their attribute is called. Roles have the names
of the slots that recipes know.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LOOKED_FOR = {
    "norm": "nn.LayerNorm, nn.RMSNorm or a class named like them",
    "qk_norm": "a norm called q_norm, k_norm, query_norm or key_norm",
    "query": "a linear map called query, q_proj, wq, to_q or c_attn, or nn.MultiheadAttention",
    "key": "a linear map called key, k_proj, wk, to_k or c_attn, or nn.MultiheadAttention",
    "value": "a linear map called value, v_proj, wv, to_v or c_attn, or nn.MultiheadAttention",
    "out": "a linear map called out_proj, o_proj, wo or to_out",
    "up": "a linear map called up_proj, fc1, c_fc or linear1",
    "gate": "a linear map called gate_proj",
    "down": "a linear map called down_proj, fc2 or linear2",
    "activation": "a GELU, ReLU, SiLU or the like",
}

_LINEARS = {
    "query": r"(w_?)?q|to_q|q_(proj|lin|linear|attn)|query(_proj)?",
    "key": r"(w_?)?k|to_k|k_(proj|lin|linear)|key(_proj)?",
    "value": r"(w_?)?v|to_v|v_(proj|lin|linear)|value(_proj)?",
    "down": r"down(_proj)?|fc2|(linear|lin)2|mlp\.c_proj|dense\w*\.wo|(?<!attention\.)output\.dense",
    "up": r"up(_proj)?|fc1|(linear|lin)1|c_fc|wi(_1)?|intermediate\.dense",
    "gate": r"gate_proj|wi_0",
    "out": r"(w_?)?o|to_out(\.0)?|o_proj|out_(proj|lin)|project\.out|attention\.output\.dense|att(n|ention)\.(c_)?proj",
}
_FUSED = r"c_attn|w?qkv|to_qkv|qkv_proj|query_key_value"
_QK_NORMS = r"(q|k|query|key)_(norm|layernorm)"
_ACTIVATIONS = r"\w*(relu|gelu|silu|swish|mish|elu)\w*"


@dataclass(frozen=True)
class Site:
    """A place in a module: `owner.name` holds `part`. `owner` is None where the part is the module itself.

    rows   for each role that the part plays, which of its output features do; None where their layout is not known
    raw    the part is nn.MultiheadAttention, and its parameter of this name is meant
    """

    owner: nn.Module | None
    name: str
    part: Any
    rows: dict[str, slice] | None
    raw: str | None = None


def find(module: nn.Module) -> Iterator[Site]:
    """Every place that plays a role, shared modules once for each place, the insides of nn.MultiheadAttention never."""
    every = dict(module.named_modules(remove_duplicate=False))
    closed = {f"{path}.{name}" for path, m in every.items() if _is_torch_attention(m) for name, _ in m.named_children()}
    for path, part in every.items():
        above, _, name = path.rpartition(".")
        owner = every[above] if path else None
        if _is_torch_attention(part):
            yield from _torch_attention(owner, name, part)
        elif path not in closed and (rows := _rows(path.lower(), part)) != {}:
            yield Site(owner, name, part, rows)
        function = vars(part).get("activation")
        if callable(function):
            yield Site(part, "activation", function, {"activation": slice(None)})


def is_transposed(part: Any) -> bool:
    """Whether it is `transformers`' Conv1D, a linear map that stores its weight as (in, out)."""
    return type(part).__name__ == "Conv1D" and hasattr(part, "nf")


def width(norm: nn.Module) -> int:
    """How many features a norm works on."""
    shape = getattr(norm, "normalized_shape", None)
    return shape[-1] if shape else len(_own_gain(norm))


@torch.no_grad()
def gain(norm: nn.Module) -> Tensor | None:
    """What a norm multiplies each feature by, its bias aside; None where it has no gain, or one of a kind unknown here.

    Some classes store the gain, some the gain less one (Gemma's). Which, is asked of the norm itself.
    """
    stored = _own_gain(norm)
    if stored is None or stored.is_meta:
        return stored
    x = torch.ones_like(stored)
    x[::2] = -1
    x[2 * (len(x) // 2) :] = 0  # mean zero at any width
    seen = (norm.forward(x[None, None]) - norm.forward(-x[None, None]))[0, 0] / 2 * x * x.square().mean().sqrt()
    near = lambda there: torch.allclose(seen.float(), (there * x.square()).float(), rtol=0.02, atol=0.02)
    return next((there for there in (stored, 1 + stored) if near(there)), None)


class Slice(nn.Module):
    """Some of the output features of a linear map that another module holds, as a linear map. Holds no parameters.

    `weight` (out, in) and `bias` are views: what is written to them in place is written there.
    """

    def __init__(self, owner: nn.Module, name: str, bias: str, rows: slice):
        super().__init__()
        self._owner = (owner,)  # in a tuple its parameters do not become ours
        self._names, self._rows = (name, bias), rows

    @property
    def weight(self) -> Tensor:
        weight = self._stored(self._names[0])
        return (weight.T if is_transposed(self._owner[0]) else weight)[self._rows]

    @property
    def bias(self) -> Tensor | None:
        bias = self._stored(self._names[1])
        return bias if bias is None else bias[self._rows]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def _stored(self, name: str) -> Tensor | None:
        owner = self._owner[0]
        if parametrize.is_parametrized(owner, name):
            return owner.parametrizations[name].original
        return getattr(owner, name, None)


class Fused(nn.Module):
    """A linear map whose output features play several roles, some of them handed to other parts. (..., D) -> (..., F).

    A part that has `adapt(x, y)` is told what the map gave where it stands; another is given x alone.
    """

    def __init__(self, inner: nn.Module, rows: dict[str, slice], parts: dict[str, nn.Module]):
        super().__init__()
        self.inner, self.rows, self.parts = inner, rows, nn.ModuleDict(parts)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        pieces = {role: y[..., rows] for role, rows in self.rows.items()}
        for role, part in self.parts.items():
            pieces[role] = part.adapt(x, pieces[role]) if hasattr(part, "adapt") else part(x)
        return torch.cat(list(pieces.values()), -1)


class FusedWeight(nn.Module):
    """The weight (F, D) that nn.MultiheadAttention reads, the rows of some roles as `merged(rows)` of their parts."""

    def __init__(self, rows: dict[str, slice], parts: dict[str, nn.Module]):
        super().__init__()
        self.rows, self.parts = rows, nn.ModuleDict(parts)

    def forward(self, weight: Tensor) -> Tensor:
        merged = lambda role, piece: self.parts[role].merged(piece) if role in self.parts else piece
        return torch.cat([merged(role, weight[rows]) for role, rows in self.rows.items()])


def _rows(path: str, part: nn.Module) -> dict[str, slice] | None:
    """The rows of each role, none where it plays no role; None where it plays several and their layout is not known."""
    last, every = path.rpartition(".")[2], slice(None)
    if _is_norm(part):
        return {"qk_norm" if re.fullmatch(_QK_NORMS, last) else "norm": every}
    if isinstance(part, nn.Linear) or is_transposed(part):
        if re.fullmatch(_FUSED, last):
            return _thirds(part, interleaved=last == "query_key_value")
        return next(({role: every} for role, names in _LINEARS.items() if re.search(rf"(^|\.)({names})$", path)), {})
    if re.fullmatch(_ACTIVATIONS, type(part).__name__.lower()) and not list(part.children()):
        return {"activation": every}
    return {}


def _thirds(part: nn.Module, interleaved: bool) -> dict[str, slice] | None:
    given, made = part.weight.shape if is_transposed(part) else part.weight.shape[::-1]
    names = {3: ("query", "key", "value"), 2: ("key", "value")}.get(made // given)
    if interleaved or made % given or names is None:
        return None
    return {role: slice(i * given, (i + 1) * given) for i, role in enumerate(names)}


def _torch_attention(owner: nn.Module | None, name: str, part: nn.MultiheadAttention) -> Iterator[Site]:
    if part.in_proj_weight is not None:
        d = part.embed_dim
        rows = {role: slice(i * d, (i + 1) * d) for i, role in enumerate(("query", "key", "value"))}
        yield Site(owner, name, part, rows, "in_proj_weight")
    else:
        for role in ("query", "key", "value"):
            yield Site(owner, name, part, {role: slice(None)}, f"{role[0]}_proj_weight")


def _is_torch_attention(part: nn.Module) -> bool:
    return isinstance(part, nn.MultiheadAttention)


def _is_norm(part: nn.Module) -> bool:
    name = type(part).__name__
    if getattr(part, "data_format", "") == "channels_first" or name.endswith("2d"):
        return False
    if isinstance(part, nn.LayerNorm | nn.RMSNorm):
        return len(part.normalized_shape) == 1
    stored = _own_gain(part)
    return name.endswith(("LayerNorm", "RMSNorm")) and stored is not None and stored.ndim == 1


def _own_gain(norm: nn.Module) -> Tensor | None:
    own = dict(norm.named_parameters(recurse=False))
    return own.get("weight", own.get("gain"))
