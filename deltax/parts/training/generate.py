"""Text from a language model, one token at a time."""

import torch
from jaxtyping import Float, Int
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
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: Generator | None = None,
) -> Int[Tensor, "B T+{length}"]:
    """The prompt and `length` tokens more. Tokens (B, T) -> (B, T + length).

    Each token is drawn from softmax(logits / temperature), among the `top_k` likeliest where that is given; at
    temperature 0 it is the likeliest. The model reads every token once and keeps a decoding state, which gives what
    the full pass at every step would. `generator` lives on the prompt's device; without one torch's own is drawn from.

    Raises UserError where the model learned fewer positions than the tokens it would have to read, which are all but
    the last: a window that slides would change every position, and with it all that was kept.
    """
    _check(model, prompt, length, temperature, top_k)
    ctx = Context(state=DecodingState())
    tokens, new = prompt, prompt
    for _ in range(length):
        new = choose(model(new, ctx)[:, -1], temperature=temperature, top_k=top_k, generator=generator)
        tokens = torch.cat([tokens, new], 1)
    return tokens


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


def _check(model: nn.Module, prompt: Tokens, length: int, temperature: float, top_k: int | None) -> None:
    if prompt.ndim != 2 or not prompt.shape[1] or prompt.is_floating_point():
        raise UserError(f"a prompt is whole numbers (B, T) with T of at least 1, not a tensor {tuple(prompt.shape)}")
    for name, value, least in (("length", length, 0), ("temperature", temperature, 0), ("top_k", top_k, 1)):
        if value is not None and not value >= least:  # nor is NaN
            raise UserError(f"{name} must be at least {least}, not {value}")
    known = min((len(m.table) for m in model.modules() if isinstance(m, Learned)), default=None)
    needed = prompt.shape[1] + length - 1
    if known is not None and length and needed > known:
        raise UserError(
            f"the model learned {known} positions; a prompt of {prompt.shape[1]} with {length} more needs {needed}: "
            f"shorten one of them, or train with a larger context or with positions that are not a table, as rope's"
        )
