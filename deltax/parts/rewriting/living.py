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


Rows = tuple[slice, ...]  # of the output features of a linear map, in order
EVERY: Rows = (slice(None),)


@dataclass(frozen=True)
class Site:
    """A place in a module: `owner.name` holds `part`. `owner` is None where the part is the module itself.

    rows     for each role that the part plays, which of its output features do; None where their layout is not known
    raw      the part is nn.MultiheadAttention, and its parameter of this name is meant
    path     the dotted name of the part in the module
    roles    what the part may be, where its rows are not known
    unknown  why they are not
    """

    owner: nn.Module | None
    name: str
    part: Any
    rows: dict[str, Rows] | None
    raw: str | None = None
    path: str = ""
    roles: tuple[str, ...] = ()
    unknown: str = ""


def find(module: nn.Module, layouts: dict[str, dict[str, Rows] | str] | None = None) -> Iterator[Site]:
    """Every place that plays a role, shared modules once for each place, the insides of nn.MultiheadAttention never.

    layouts  for the path of a fused projection, the rows of each role, or why they are not known
    """
    every = dict(module.named_modules(remove_duplicate=False))
    closed = {f"{path}.{name}" for path, m in every.items() if _is_torch_attention(m) for name, _ in m.named_children()}
    for path, part in every.items():
        above, _, name = path.rpartition(".")
        owner = every[above] if path else None
        if _is_torch_attention(part):
            yield from _torch_attention(owner, name, part, path)
        elif path in closed:
            continue
        elif is_fused(path, part):
            layout = (layouts or {}).get(path, "its layout was not probed")
            if isinstance(layout, str):
                yield Site(owner, name, part, None, None, path, ("query", "key", "value"), layout)
            else:
                yield Site(owner, name, part, layout, None, path)
        elif rows := _rows(path.lower(), part):
            reason = not_a_norm(part) if set(rows) & {"norm", "qk_norm"} else ""
            yield Site(owner, name, part, None if reason else rows, None, path, tuple(rows), reason)
        function = vars(part).get("activation")
        if callable(function) and not isinstance(function, type):
            yield Site(part, "activation", function, {"activation": EVERY}, None, f"{path}.activation".lstrip("."))


def is_fused(path: str, part: Any) -> bool:
    """Whether it is a linear map that is called as one of several projections is."""
    return _is_linear(part) and bool(re.fullmatch(_FUSED, path.lower().rpartition(".")[2]))


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

    Some classes store the gain, some the gain less one (Gemma's). The norm's own output decides.
    """
    stored = _own_gain(norm)
    if stored is None or stored.is_meta:
        return stored
    seen, normed = _normed(norm)
    near = lambda there: torch.allclose(seen, there.float() * normed, rtol=0.02, atol=0.02)
    return next((there for there in (stored, 1 + stored) if near(there)), None)


def not_a_norm(norm: nn.Module) -> str:
    """Why a part that is called a norm is none: gain * normalised(x) + bias over the last axis. Empty where it is."""
    stored = _own_gain(norm)
    if stored is not None and stored.is_meta:
        return ""
    try:
        if stored is not None:
            known = gain(norm) is not None
        else:
            seen, normed = _normed(norm)
            known = torch.allclose(seen, normed, rtol=0.02, atol=0.02)
    except Exception as error:  # somebody else's forward may raise anything
        return f"{type(norm).__name__} does not take x (B, T, D) alone: {said(error)}"
    return "" if known else f"{type(norm).__name__} is no LayerNorm or RMSNorm of the last axis"


def said(error: BaseException) -> str:
    """The first line of an error, after its class."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _normed(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm gives for x of mean zero, less its bias, and x normalised. (1, 2, D) both."""
    stored = _own_gain(norm)
    like = torch.empty(()) if stored is None else stored
    x = torch.randn(1, 2, width(norm), generator=torch.Generator().manual_seed(0))
    x = 8 * (x - x.mean(-1, keepdim=True))  # so large that eps does not matter, of mean zero for both kinds of norm
    x = x.to(like.device, like.dtype)
    seen = (norm.forward(x) - norm.forward(-x)).float() / 2
    if seen.shape != x.shape:
        raise ValueError(f"it gives {tuple(seen.shape)} for {tuple(x.shape)}")
    return seen, x.float() * x.float().square().mean(-1, keepdim=True).rsqrt()


def taken(x: Tensor, rows: Rows, dim: int = -1) -> Tensor:
    """These features of x, a view where they are adjacent."""
    pieces = [x.narrow(dim, start, stop - start) for start, stop in _runs(rows, x.shape[dim])]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def replaced(x: Tensor, rows: Rows, new: Tensor, dim: int = -1) -> Tensor:
    """x, but with `new` in the place of these features."""
    pieces, at, used = [], 0, 0
    for start, stop in _runs(rows, x.shape[dim]):
        pieces += [x.narrow(dim, at, start - at), new.narrow(dim, used, stop - start)]
        at, used = stop, used + stop - start
    return torch.cat([*pieces, x.narrow(dim, at, x.shape[dim] - at)], dim)


def as_rows(indices: list[int]) -> Rows:
    """Ascending indices as slices."""
    starts = [i for n, i in enumerate(indices) if not n or indices[n - 1] != i - 1]
    stops = [i + 1 for n, i in enumerate(indices) if n + 1 == len(indices) or indices[n + 1] != i + 1]
    return tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))


class Slice(nn.Module):
    """Some of the output features of a linear map that another module holds, as a linear map. Holds no parameters.

    `weight` (out, in) and `bias` are those rows, views where the rows are adjacent; `write` writes the weight.
    """

    def __init__(self, owner: nn.Module, name: str, bias: str, rows: Rows):
        super().__init__()
        self._owner = (owner,)  # in a tuple its parameters do not become ours
        self._names, self._rows = (name, bias), rows

    @property
    def weight(self) -> Tensor:
        weight = self._stored(self._names[0])
        return taken(weight.T if is_transposed(self._owner[0]) else weight, self._rows, 0)

    @property
    def bias(self) -> Tensor | None:
        bias = self._stored(self._names[1])
        return bias if bias is None else taken(bias, self._rows, 0)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def holder(self) -> tuple[nn.Module, str]:
        """The module that holds the whole weight, and its name there."""
        owner, name = self._owner[0], self._names[0]
        if parametrize.is_parametrized(owner, name):
            return owner.parametrizations[name], "original"
        return owner, name

    @torch.no_grad()
    def write(self, new: Tensor) -> None:
        """Write these rows of the weight (out, in) in place."""
        whole = self._stored(self._names[0])
        whole = whole.T if is_transposed(self._owner[0]) else whole
        at = 0
        for start, stop in _runs(self._rows, len(whole)):
            whole[start:stop].copy_(new[at : at + stop - start])
            at += stop - start

    def _stored(self, name: str) -> Tensor | None:
        owner = self._owner[0]
        if parametrize.is_parametrized(owner, name):
            return owner.parametrizations[name].original
        return getattr(owner, name, None)


class Fused(nn.Module):
    """A linear map whose output features play several roles, some of them handed to other parts. (..., D) -> (..., F).

    A part that has `adapt(x, y)` is told what the map gave where it stands; another is given x alone.
    """

    def __init__(self, inner: nn.Module, rows: dict[str, Rows], parts: dict[str, nn.Module]):
        super().__init__()
        self.inner, self.rows, self.parts = inner, rows, nn.ModuleDict(parts)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        for role, part in self.parts.items():
            rows = self.rows[role]
            y = replaced(y, rows, part.adapt(x, taken(y, rows)) if hasattr(part, "adapt") else part(x))
        return y


class FusedWeight(nn.Module):
    """The weight (F, D) that nn.MultiheadAttention reads, the rows of some roles as `merged(rows)` of their parts."""

    def __init__(self, rows: dict[str, Rows], parts: dict[str, nn.Module]):
        super().__init__()
        self.rows, self.parts = rows, nn.ModuleDict(parts)

    def forward(self, weight: Tensor) -> Tensor:
        for role, part in self.parts.items():
            weight = replaced(weight, self.rows[role], part.merged(taken(weight, self.rows[role], 0)), 0)
        return weight


def _runs(rows: Rows, size: int) -> list[tuple[int, int]]:
    return [s.indices(size)[:2] for s in rows]


def _rows(path: str, part: nn.Module) -> dict[str, Rows]:
    """The rows of each role of a part that plays one, none where it plays no role."""
    last = path.rpartition(".")[2]
    if _is_norm(part):
        return {"qk_norm" if re.fullmatch(_QK_NORMS, last) else "norm": EVERY}
    if _is_linear(part):
        return next(({role: EVERY} for role, names in _LINEARS.items() if re.search(rf"(^|\.)({names})$", path)), {})
    if re.fullmatch(_ACTIVATIONS, type(part).__name__.lower()) and not list(part.children()):
        return {"activation": EVERY}
    return {}


def _is_linear(part: Any) -> bool:
    return isinstance(part, nn.Linear) or is_transposed(part)


def _torch_attention(owner: nn.Module | None, name: str, part: nn.MultiheadAttention, path: str) -> Iterator[Site]:
    if part.in_proj_weight is not None:
        d = part.embed_dim
        rows = {role: (slice(i * d, (i + 1) * d),) for i, role in enumerate(("query", "key", "value"))}
        yield Site(owner, name, part, rows, "in_proj_weight", path)
    else:
        for role in ("query", "key", "value"):
            yield Site(owner, name, part, {role: EVERY}, f"{role[0]}_proj_weight", path)


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
