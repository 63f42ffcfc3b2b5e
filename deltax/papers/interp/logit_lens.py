"""interpreting GPT: the logit lens. nostalgebraist, 2020.

A GPT, but its last norm and unembedding are put to the stream after every block, not only after the last.

Blocks add to one stream, so what the stream holds half way up is written in the coordinates that the head reads. Read
there, it is a guess at the next token, and the guesses come nearer to the last one block by block. Where a model keeps
another basis in its early layers the lens sees nothing: that is a result about the model and a limit of the lens.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltax import UserError, paper
from deltax.papers.language.models.gpt import gpt
from deltax.parts.model.language_model import LanguageModel
from deltax.shapes import Logits, Stream, Tokens

Lens = Float[Tensor, "layers B T V"]


class Anatomy(NamedTuple):
    """The blocks that write to a model's stream, first to last, and how the model reads the stream after them."""

    blocks: list[nn.Module]
    read: Callable[[Stream], Logits]


# Where the causal language models of `transformers` keep their blocks and their last norm.
_HF = {
    "transformer.h": "transformer.ln_f",
    "model.layers": "model.norm",
    "gpt_neox.layers": "gpt_neox.final_layer_norm",
}
# How they change the head's logits, by the field of their configuration.
_TAILS: tuple[tuple[str, Callable[[Tensor, float], Tensor]], ...] = (
    ("logits_scaling", lambda logits, scale: logits / scale),  # Granite
    ("logits_scaling", lambda logits, scale: logits * scale),  # HyperCLOVA X
    ("logit_scale", lambda logits, scale: logits * scale),  # Cohere
    ("final_logit_softcapping", lambda logits, cap: cap * torch.tanh(logits / cap)),  # Gemma 2, NanoChat
)


def anatomy(model: nn.Module) -> Anatomy:
    """Of a `LanguageModel`, or of a `transformers` model laid out as GPT-2, Llama or GPT-NeoX is.

    What such a model does to its logits after the head is left to `reading`. Raises UserError for any other model.
    """
    if isinstance(model, LanguageModel) and hasattr(model.stack, "blocks"):
        return Anatomy(list(model.stack.blocks), model.read)
    modules = dict(model.named_modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for blocks, norm in _HF.items():
        if blocks in modules and norm in modules and head is not None:
            return Anatomy(list(modules[blocks]), nn.Sequential(modules[norm], head))
    raise UserError(
        f"the lens cannot find blocks and a last norm in {type(model).__name__}: give a LanguageModel, or a causal "
        f"language model of transformers with {', '.join(_HF)}"
    )


def streams(model: nn.Module, tokens: Tokens) -> list[Stream]:
    """The stream before the first block and after each one, L + 1 of (B, T, D), in the order in which blocks run."""
    return _pass(model, tokens)[0]


def reading(model: nn.Module, last: Stream, logits: Logits) -> Callable[[Stream], Logits]:
    """How the model reads its stream: norm, head, and the scale or cap of its configuration if its logits have one.

    Of the stream `last` it gives `logits`, which are the model's own. Raises UserError for a model where it does not.
    """
    read = anatomy(model).read
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = ((tail, getattr(config, field, None)) for field, tail in _TAILS)
    tails = [lambda x: x, *(partial(_applied, tail, value) for tail, value in named if value)]
    if last.shape[:-1] == logits.shape[:-1] and (plain := read(last)).shape == logits.shape:
        gap = lambda tail: (tail(plain) - logits).abs().max().item()
        tail = min(tails, key=gap)
        # the same operations on the same stream: what is left is the rounding of its dtype
        if gap(tail) <= 8 * torch.finfo(plain.dtype).eps * max(1.0, logits.abs().max().item()):
            return lambda x: tail(read(x))
    raise UserError(
        f"the logits of {type(model).__name__} are not its head of its last norm of its last block's output, neither "
        f"plain nor by {', '.join(dict(_TAILS))}: the lens cannot read it"
    )


def _applied(tail: Callable[[Tensor, float], Tensor], value: float, logits: Logits) -> Logits:
    return tail(logits, value)


def _pass(model: nn.Module, tokens: Tokens) -> tuple[list[Stream], Logits]:
    """The streams of `streams`, and the model's logits."""
    found: list[Stream] = []

    def entering(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not found:
            found.append(args[0] if args else kwargs["hidden_states"])

    def leaving(module: nn.Module, args: tuple, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    blocks = anatomy(model).blocks
    hooks = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    hooks += [block.register_forward_hook(leaving) for block in dict.fromkeys(blocks)]
    try:
        out = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found, out[0] if isinstance(out, tuple) else getattr(out, "logits", out)


@paper(on=gpt, year=2020, url="https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens")
def logit_lens(model: nn.Module, tokens: Tokens) -> Lens:
    """Log-probabilities of the next token, read before the first block and after each. (B, T) -> (L + 1, B, T, V).

    The last layer is the model's own output. The model stays in the mode, training or evaluation, that it is in.
    Raises UserError for a model whose blocks cannot be found, and for one whose last layer is not its output.
    """
    found, own = _pass(model, tokens)
    read = reading(model, found[-1], own)
    logits = torch.stack([read(x) for x in found])
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def distance_to_last(lens: Lens) -> Float[Tensor, "layers B T"]:
    """KL(p_L || p_l) in nats for each layer l, at each position. That of the last layer is zero."""
    return (lens[-1].exp() * (lens[-1] - lens)).sum(-1)


def picture(lens: Lens, tokens: Tokens, decode: Callable[[Iterable[int]], str]) -> Any:
    """A matplotlib Figure of one example: layers upwards, tokens rightwards, each cell the likeliest next token.

    Colour is the probability of that token. `decode` is a task's or a tokeniser's.
    """
    from matplotlib.figure import Figure

    chance, best = lens[:, 0].exp().max(-1)
    figure = Figure(figsize=(1 + 0.3 * best.shape[1], 1 + 0.3 * best.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(chance.tolist(), origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for layer, row in enumerate(best.tolist()):
        for at, token in enumerate(row):
            color = "white" if chance[layer, at] > 0.6 else "black"
            axes.text(at, layer, _shown(decode([token])), ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(best.shape[1]), [_shown(decode([token])) for token in tokens[0].tolist()])
    axes.set_yticks(range(best.shape[0]), ["embedding", *range(1, best.shape[0])])
    axes.set(xlabel="what was read", ylabel="block")
    figure.colorbar(image, label="probability")
    return figure


def _shown(token: str) -> str:
    """A token as one line of text that matplotlib does not take for mathematics."""
    return "".join(c if c.isprintable() else "·" for c in token).replace("$", r"\$").replace(" ", "␣")
