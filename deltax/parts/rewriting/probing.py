"""Forward passes of a module that somebody else wrote: an input for it, its outputs, and a way back to how it was."""

import contextlib
import copy
import inspect
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deltax.errors import UserError
from deltax.parts.rewriting.living import Rows, as_rows, is_transposed, said


@dataclass(frozen=True)
class Given:
    """The arguments of a forward pass."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class ForwardFailed(Exception):
    """A forward pass raised; `path` is the module in which it did."""

    def __init__(self, path: str, error: BaseException):
        super().__init__(f"{path}: {said(error)}" if path else said(error))
        self.path = path


class Snapshot:
    """A module as it is now: its tree, attributes, modes, flags and buffers. `restore` brings all of it back.

    The values of parameters are not copied: `forward` copies those that a pass writes.
    """

    def __init__(self, module: nn.Module):
        self.modules = list(module.modules())
        self.classes = [type(m) for m in self.modules]
        self.attributes = [dict(vars(m)) for m in self.modules]
        self.containers = [
            (held, copy.copy(held))
            for m in self.modules
            for held in vars(m).values()
            if isinstance(held, dict | list | set) and hasattr(held, "clear")
        ]
        self.trained = [(p, p.requires_grad) for p in module.parameters()]
        self.buffers = [(b, b.detach().clone()) for b in module.buffers() if not b.is_meta]

    @torch.no_grad()
    def restore(self) -> None:
        for module, kind, attributes in zip(self.modules, self.classes, self.attributes, strict=True):
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        for held, was in self.containers:
            if isinstance(held, list):
                held[:] = was
            else:
                held.clear()
                held.update(was)
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)
        for buffer, value in self.buffers:
            buffer.copy_(value)


def find(module: nn.Module, example: Any = None) -> Given | None:
    """Arguments with which the module's forward pass runs in evaluation; None where none are found.

    `example` is a tensor, a tuple of arguments or a dict of keyword arguments. Raises UserError where it does not run.
    """
    if example is not None:
        given = _as_given(example)
        try:
            forward(module, given, training=False)
        except ForwardFailed as error:
            raise UserError(f"the example does not run in {type(module).__name__}: {error}") from error
        return given
    if any(p.is_meta for p in module.parameters()):
        return None
    for given in _candidates(module):
        try:
            if forward(module, given, training=False):
                return given
        except ForwardFailed:
            continue
    return None


def forward(module: nn.Module, given: Given, *, training: bool) -> list[Tensor]:
    """The floating-point tensors that the module returns. It is left as it was, the random state too."""
    with _run(module, given, training=training), torch.no_grad():
        return _floats(_called(module, given))


def calls(module: nn.Module, given: Given, *, training: bool, of: Iterable[nn.Module]) -> set[int]:
    """The ids of those modules that a pass calls."""
    seen: set[int] = set()
    handles = [m.register_forward_hook(lambda m, *_: seen.add(id(m))) for m in of]
    try:
        forward(module, given, training=training)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def layouts(module: nn.Module, given: Given | None, paths: Iterable[str]) -> dict[str, dict[str, Rows] | str]:
    """Which rows of each fused projection are query, key and value, or why that is not known.

    The projection's output is replaced by numbers u, and gradients of its owner's output at one position are taken. In
    softmax attention, out_i = W sum_j a_ij v_j + b with sum_j a_ij = 1, so that

    - a query feature at position j moves out_j alone, a key or a value moves the output of several positions;
    - where u is equal at all positions, out_i = W v + b, and a value has a gradient and a key has none;
    - where only values are equal at all positions, neither queries nor keys have a gradient.

    A projection of which one of these does not hold has another layout or another attention, and is not known.
    """
    paths = list(paths)
    if given is None and any(p.is_meta for p in module.parameters()):
        return dict.fromkeys(paths, "no pass can be made on the meta device; load the weights first")
    if given is None:
        return dict.fromkeys(paths, "no input for the module was found; hand one in with example=")
    try:
        free = _gradients(module, given, paths, {})
        equal = _gradients(module, given, paths, dict.fromkeys(paths, slice(None)))
        found = {path: _roles(free[path], equal[path]) for path in paths}
        values = {path: rows["value"] for path, rows in found.items() if isinstance(rows, dict)}
        checked = _gradients(module, given, list(values), values)
    except ForwardFailed as error:
        return dict.fromkeys(paths, f"the probe of its layout failed, {error}")
    except RuntimeError as error:
        return dict.fromkeys(paths, f"the probe of its layout failed, {said(error)}")
    for path, value in values.items():
        others = torch.ones(free[path].shape[-1], dtype=torch.bool)
        others[value] = False
        share = _size(checked[path])[others] / _size(free[path])[others]
        if share.max() > _tolerance(checked[path].dtype):
            found[path] = "its output is not softmax attention over its rows"
    return {
        path: rows if isinstance(rows, str) else {role: as_rows(at.tolist()) for role, at in rows.items()}
        for path, rows in found.items()
    }


class Before:
    """Within it the module is as it was before the rewrite."""

    def __init__(self, intact: Snapshot, now: Snapshot):
        self.intact, self.now = intact, now

    def __enter__(self) -> None:
        self.intact.restore()

    def __exit__(self, *_: Any) -> None:
        self.intact.restore()
        self.now.restore()


class randomised:
    """Within it each of these wraps has random parameters of its own."""

    def __init__(self, wraps: Iterable[nn.Module]):
        own = {id(p): p for w in wraps for p in w.parameters(recurse=False)}
        self.saved = [(p, p.detach().clone()) for p in own.values()]

    @torch.no_grad()
    def __enter__(self) -> None:
        for p, _ in self.saved:
            p.copy_(random_like(p))

    @torch.no_grad()
    def __exit__(self, *_: Any) -> None:
        for p, value in self.saved:
            p.copy_(value)


def random_like(value: Tensor) -> Tensor:
    """Random numbers of its shape."""
    generator = torch.Generator().manual_seed(value.numel())
    return torch.randn(value.shape, generator=generator).mul(0.3).to(value.device, value.dtype)


def near(ours: list[Tensor] | None, theirs: list[Tensor], base: list[Tensor]) -> bool:
    """Whether outputs agree, up to rounding and to a small share of what changed against the base."""
    if ours is None or [t.shape for t in ours] != [t.shape for t in theirs]:
        return False
    for a, b, was in zip(ours, theirs, base, strict=True):
        half = a.dtype in (torch.bfloat16, torch.float16)
        a, b, was = a.double(), b.double(), was.double()
        finite = a.isfinite() & b.isfinite() & was.isfinite()
        if not finite.any():
            continue
        change = (b - was)[finite].abs().max()
        size = b[finite].abs().max()
        if (a - b)[finite].abs().max() > (0.3 if half else 0.01) * change + (0.02 if half else 1e-5) * size:
            return False
    return True


def _gradients(module: nn.Module, given: Given, paths: list[str], equal: dict[str, Any]) -> dict[str, Tensor | None]:
    """For each projection the gradients (4, positions, rows) of four random sums of its owner's output at the last
    position, on the CPU. None where the pass does not call it.

    equal  rows whose value is the same at all positions
    """
    drawn: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def draw(path: str) -> Any:
        def hook(_module: Any, _args: Any, y: Tensor) -> Tensor:
            u = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
            if path in equal:
                u[..., equal[path]] = u.flatten(0, -2)[0][equal[path]]
            drawn[path] = u.requires_grad_()
            return drawn[path]

        return hook

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            outputs[path] = _floats(out)[0]

        return hook

    handles = []
    for path in paths:
        handles.append(module.get_submodule(path).register_forward_hook(draw(path)))
        handles.append(module.get_submodule(path.rpartition(".")[0]).register_forward_hook(keep(path)))
    gradients: dict[str, Tensor | None] = {}
    try:
        with _run(module, given, training=False), torch.enable_grad(), _Linears(module, {p: draw(p) for p in paths}):
            _called(module, given)
            for path in paths:
                if path not in drawn or path not in outputs or not outputs[path].requires_grad:
                    gradients[path] = None
                    continue
                last = outputs[path].flatten(0, -2)[-1]
                weights = torch.randn(4, *last.shape, generator=torch.Generator().manual_seed(1)).to(last)
                each = [torch.autograd.grad(last, drawn[path], w, True, allow_unused=True)[0] for w in weights]
                gradients[path] = None if each[0] is None else torch.stack(each).flatten(1, -2).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return gradients


def _roles(free: Tensor | None, equal: Tensor | None) -> dict[str, Tensor] | str:
    """The rows of each role by the first two rules of `layouts`."""
    if free is None or equal is None:
        return "the forward pass does not call it"
    positions = (free != 0).any(0).sum(0)
    acts = _size(equal) > _tolerance(free.dtype) * _size(free)
    roles = {"query": (positions == 1) & ~acts, "key": (positions > 1) & ~acts, "value": (positions > 1) & acts}
    if not torch.stack(list(roles.values())).any(0).all() or not roles["key"].any() or not roles["value"].any():
        return "its rows are not those of queries, keys and values"
    return {role: mask.nonzero()[:, 0] for role, mask in roles.items() if mask.any()}


def _size(gradients: Tensor) -> Tensor:
    """How large the gradients of each row are."""
    return gradients.double().square().sum((0, 1)).sqrt()


def _tolerance(dtype: torch.dtype) -> float:
    return 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-3


@contextlib.contextmanager
def _run(module: nn.Module, given: Given, *, training: bool) -> Iterator[None]:
    snapshot, kept = Snapshot(module), _KeepWritten(module)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            random.seed(0)  # wav2vec 2's masks are drawn by numpy, layers are dropped by Python's own
            np.random.seed(0)
            module.train(training)
            with kept:
                yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        snapshot.restore()
        kept.restore()


def _called(module: nn.Module, given: Given) -> Any:
    """module(...), where an exception becomes ForwardFailed with the path of the module that raised."""
    names = {id(m): path for path, m in module.named_modules()}
    entered: list[int] = []
    before = nn.modules.module.register_module_forward_pre_hook(lambda m, _: entered.append(id(m)))
    after = nn.modules.module.register_module_forward_hook(lambda *_: (entered.pop(), None)[1])
    try:
        return module(*given.args, **given.kwargs)
    except Exception as error:  # somebody else's forward may raise anything
        path = next((names[i] for i in reversed(entered) if names.get(i)), "")
        raise ForwardFailed(path, error) from error
    finally:
        before.remove(), after.remove()


class _Linears(TorchFunctionMode):
    """Draws the output of `linear` with a projection's weight too, which some owners call themselves."""

    def __init__(self, module: nn.Module, hooks: dict[str, Any]):
        super().__init__()
        self.hooks = {id(module.get_submodule(path).weight): hook for path, hook in hooks.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if id(weight) in self.hooks:
                return self.hooks[id(weight)](None, None, out)
        return out


class _KeepWritten(TorchDispatchMode):
    """Copies a parameter before its first write in place, so that a pass that rescales weights can be undone."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.watched = {p.untyped_storage()._cdata: p for p in module.parameters() if not p.is_meta}
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            for argument in func._schema.arguments:
                written = named.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(written, Tensor):
                    self._keep(written)
        return func(*args, **(kwargs or {}))

    def _keep(self, written: Tensor) -> None:
        key = written.untyped_storage()._cdata
        if key in self.watched and key not in self.copies:
            parameter = self.watched[key]
            self.copies[key] = (parameter, parameter.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in self.copies.values():
            parameter.copy_(value)


def _floats(out: Any) -> list[Tensor]:
    """The floating-point tensors in an output, in order."""
    if isinstance(out, Tensor):
        return [out.detach() if not out.requires_grad else out] if out.is_floating_point() else []
    if isinstance(out, Mapping):
        return [t for value in out.values() for t in _floats(value)]
    if isinstance(out, list | tuple):
        return [t for value in out for t in _floats(value)]
    return []


def _as_given(example: Any) -> Given:
    if isinstance(example, Mapping):
        return Given((), dict(example))
    return Given(tuple(example) if isinstance(example, tuple | list) else (example,))


def _candidates(module: nn.Module) -> Iterator[Given]:
    """Inputs to try, the likeliest first."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(()))
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(like.device, like.dtype)
    if hasattr(module, "main_input_name") and hasattr(module, "config"):
        yield from _transformers_inputs(module, normal, generator)
    copies = _required(module)
    for x in _first_inputs(module, normal, generator):
        for count in dict.fromkeys((copies, 1)):
            yield Given((x,) * count)


def _first_inputs(module: nn.Module, normal: Any, generator: torch.Generator) -> Iterator[Tensor]:
    """For each kind of part that may come first, what it takes."""
    seen = set()
    for part in module.modules():
        own = next(iter(part.parameters(recurse=False)), None)
        if own is None or type(part) in seen:
            continue
        seen.add(type(part))
        if isinstance(part, nn.Embedding):
            yield _tokens(part.num_embeddings, own.device, generator)
        elif isinstance(part, nn.Conv2d):
            for size in dict.fromkeys((*_image_sizes(module), 32, 64, 224)):
                yield normal(2, part.in_channels, size, size)
        elif isinstance(part, nn.Conv1d):
            yield normal(2, part.in_channels, 64)
        elif isinstance(part, nn.MultiheadAttention):
            yield normal(2, 6, part.embed_dim)
        elif own.ndim in (1, 2):
            width = own.shape[0] if own.ndim == 1 or is_transposed(part) else own.shape[1]
            yield from (normal(2, 6, width), normal(2, width))
            if own.ndim == 2 and not isinstance(part, nn.Linear):
                yield _tokens(own.shape[0], own.device, generator)
        if len(seen) > 4:
            return


def _transformers_inputs(module: Any, normal: Any, generator: torch.Generator) -> Iterator[Given]:
    config = module.config
    device = next(module.parameters()).device
    text = getattr(config, "text_config", None) or config
    vocabulary = getattr(text, "vocab_size", None) or 2
    taken = {v for c in (config, text) for k, v in vars(c).items() if k.endswith(("token_id", "token_index"))
             if isinstance(v, int)}  # fmt: skip
    tokens: dict[str, Any] = {"input_ids": _tokens(vocabulary, device, generator, taken)}
    decoder = {}
    if getattr(config, "is_encoder_decoder", False):
        decoder = {"decoder_input_ids": _tokens(vocabulary, device, generator, taken)}
    if "use_cache" in inspect.signature(module.forward).parameters:
        tokens["use_cache"] = False
    if module.main_input_name == "input_ids":
        yield Given((), {**tokens, **decoder})
    vision = getattr(config, "vision_config", None) or config
    channels = getattr(vision, "num_channels", 3)
    for size in dict.fromkeys((*_image_sizes(vision), 64, 224)):
        pixels = {"pixel_values": normal(2, channels, size, size)}
        yield Given((), {**pixels, **decoder})
        yield Given((), {**tokens, **pixels})
    bins = getattr(config, "num_mel_bins", 80)
    for length in (2 * getattr(config, "max_source_positions", 30), 60):
        yield Given((), {"input_features": normal(2, bins, length), **decoder})
    yield Given((), {"input_values": normal(2, 4000)})


def _tokens(vocabulary: int, device: torch.device, generator: torch.Generator, taken: Iterable[int] = ()) -> Tensor:
    """(2, 6), none of them a special token's id where others are left."""
    plain = [i for i in range(min(vocabulary, 4096)) if i not in set(taken)] or list(range(vocabulary))
    at = torch.randint(len(plain), (2, 6), generator=generator)
    return torch.tensor(plain)[at].to(device)


def _image_sizes(holder: Any) -> list[int]:
    """The sizes of square images that a module or its config names."""
    named = [getattr(holder, name, None) for name in ("image_size", "img_size")]
    for name in ("pretrained_cfg", "default_cfg"):
        named.append((getattr(holder, name, None) or {}).get("input_size"))
    named.append(getattr(getattr(holder, "patch_embed", None), "img_size", None))
    sizes = [n[-1] if isinstance(n, list | tuple) and n else n for n in named]
    return [n for n in sizes if isinstance(n, int) and n > 0]


def _required(module: nn.Module) -> int:
    """How many arguments the forward pass requires, between 1 and 3."""
    with contextlib.suppress(TypeError, ValueError):
        parameters = inspect.signature(module.forward).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return max(1, min(3, sum(p.default is p.empty for p in positional)))
    return 1
