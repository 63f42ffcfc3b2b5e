"""Text from a language model, one token at a time."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from deltax.errors import UserError
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.model.language_model import Learned
from deltax.shapes import Tokens


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tokens,
    *,
    length: int,
    mask: Bool[Tensor, "B T"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: Generator | None = None,
) -> Int[Tensor, "B T+{length}"]:
    """The prompt and `length` tokens more. Tokens (B, T) -> (B, T + length).

    Each token is drawn from softmax(logits / temperature), among the `top_k` likeliest where that is given; at
    temperature 0 it is the likeliest. The model reads every token once and keeps a decoding state, which gives what
    the full pass at every step would. `generator` lives on the prompt's device; without one torch's own is drawn from.

    mask    true at tokens, false at padding; a row is padded on the left, on the right, or on both sides, has the
            logits that it has alone, and is continued after its last token. The padding stays in the result

    Raises UserError where the model learned fewer positions than the tokens it would have to read, which are all but
    the last: a window that slides would change every position, and with it all that was kept.
    """
    _check(model, prompt, length, mask, temperature, top_k)
    ctx, last = _start(prompt, mask)
    rows = torch.arange(len(prompt), device=prompt.device)
    tokens, new = prompt, prompt
    for _ in range(length):
        new = choose(model(new, ctx)[rows, last], temperature=temperature, top_k=top_k, generator=generator)
        tokens = torch.cat([tokens, new], 1)
        if ctx.positions is not None:
            at = ctx.positions[rows, last][:, None] + 1
            ctx = replace(ctx, positions=at, segments=torch.zeros_like(at))
        last = torch.full_like(rows, -1)
    return tokens


def _start(prompt: Tokens, mask: Tensor | None) -> tuple[Context, Int[Tensor, "B"]]:
    """The context of a prompt, its padding a segment of its own, and where each row has its last token."""
    last = prompt.new_full((len(prompt),), prompt.shape[1] - 1)
    if mask is None or bool(mask.all()):
        return Context(state=DecodingState()), last
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ctx = Context(positions=positions, segments=(~mask).long(), state=DecodingState())
    return ctx, last - mask.flip(1).long().argmax(1)


def choose(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: Generator | None = None,
) -> Int[Tensor, "B 1"]:
    """One token for each row. Logits (B, V) -> tokens (B, 1). See `generate`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), -1)
    chances = torch.softmax(logits.float() / temperature, -1)
    return ids.gather(-1, torch.multinomial(chances, 1, generator=generator))


def _check(
    model: nn.Module, prompt: Tokens, length: int, mask: Tensor | None, temperature: float, top_k: int | None
) -> None:
    if prompt.ndim != 2 or not prompt.shape[1] or prompt.is_floating_point():
        raise UserError(f"a prompt is whole numbers (B, T) with T of at least 1, not a tensor {tuple(prompt.shape)}")
    for name, value, least in (("length", length, 0), ("temperature", temperature, 0), ("top_k", top_k, 1)):
        if value is not None and not value >= least:  # nor is NaN
            raise UserError(f"{name} must be at least {least}, not {value}")
    count = prompt.shape[1] if mask is None else _longest(prompt, mask)
    known = min((len(m.table) for m in model.modules() if isinstance(m, Learned)), default=None)
    needed = count + length - 1
    if known is not None and length and needed > known:
        raise UserError(
            f"the model learned {known} positions; a prompt of {count} with {length} more needs {needed}: "
            f"shorten one of them, or train with a larger context or with positions that are not a table, as rope's"
        )


def _longest(prompt: Tokens, mask: Tensor) -> int:
    """The tokens of the longest row."""
    if mask.shape != prompt.shape or mask.dtype is not torch.bool:
        raise UserError(
            f"a mask is boolean and of the prompt's shape {tuple(prompt.shape)}, true at tokens, not "
            f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}: write mask.bool()"
        )
    if empty := (~mask.any(1)).nonzero().flatten().tolist():
        raise UserError(f"row {empty[0]} of the mask has no token: leave that prompt out")
    return int(mask.sum(1).max())
