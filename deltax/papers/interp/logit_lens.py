"""interpreting GPT: the logit lens. nostalgebraist, 2020.

A GPT, but its last norm and unembedding are put to the stream after every block, not only after the last.

Blocks add to one stream, so what the stream holds half way up is written in the coordinates that the head reads. Read
there, it is a guess at the next token, and the guesses come nearer to the last one block by block. Where a model keeps
another basis in its early layers the lens sees nothing: that is a result about the model and a limit of the lens.

Some released models scale their logits (Cohere, Granite) or cap them by a tanh (Gemma 2, NanoChat) after the head. The
lens does the same at every layer: it is found by comparing what it reads last with the model's own output.
"""

from collections.abc import Callable, Iterable
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
    """The blocks that write to a model's stream, first to last, and its last norm and head as one function."""

    blocks: list[nn.Module]
    read: Callable[[Stream], Logits]


# Where the causal language models of `transformers` keep their blocks and their last norm.
_HF = {
    "transformer.h": "transformer.ln_f",
    "model.layers": "model.norm",
    "gpt_neox.layers": "gpt_neox.final_layer_norm",
}


def anatomy(model: nn.Module) -> Anatomy:
    """Of a `LanguageModel`, or of a `transformers` model laid out as GPT-2, Llama or GPT-NeoX is.

    Raises UserError for any other.
    """
    if isinstance(model, LanguageModel) and hasattr(model.stack, "blocks"):
        return Anatomy(list(model.stack.blocks), model.read)
    modules = dict(model.named_modules())
    for blocks, norm in _HF.items():
        if blocks in modules and norm in modules:
            return Anatomy(list(modules[blocks]), nn.Sequential(modules[norm], model.get_output_embeddings()))
    raise UserError(
        f"the lens cannot find blocks and a last norm in {type(model).__name__}: give a LanguageModel, or a causal "
        f"language model of transformers with {', '.join(_HF)}"
    )


def streams(model: nn.Module, tokens: Tokens) -> list[Stream]:
    """The stream before the first block and after each one, L + 1 of (B, T, D), in the order in which blocks run."""
    return _watched(model, tokens)[0]


def _watched(model: nn.Module, tokens: Tokens) -> tuple[list[Stream], Logits]:
    """The streams of one forward pass, and its logits."""
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
    return found, out if isinstance(out, Tensor) else out.logits


def _after_the_head(model: nn.Module, raw: Logits, logits: Logits) -> Callable[[Tensor], Tensor]:
    """What the model does to the logits of its head: nothing, or a scale or a soft cap by a number of its config.

    raw     norm and head of the last stream
    logits  the model's output. Raises UserError where no such function makes it of `raw`
    """
    config = getattr(model, "config", None)
    values = config.get_text_config().to_dict().values() if hasattr(config, "get_text_config") else ()
    numbers = {float(v) for v in values if isinstance(v, int | float) and v not in (0, 1)}
    functions: list[Callable[[Tensor], Tensor]] = [lambda x: x]
    for n in sorted(numbers):
        functions += [lambda x, n=n: x * n, lambda x, n=n: x / n, lambda x, n=n: n * torch.tanh(x / n)]
    if raw.shape == logits.shape:
        if torch.equal(raw, logits):
            return functions[0]
        # the nearest: while logits are small, a cap is nearly the identity
        gap = lambda function: float((function(raw) - logits).detach().abs().max())
        nearest = min(functions, key=gap)
        # the same operations on the same stream: what is left is rounding
        if gap(nearest) <= 8 * torch.finfo(raw.dtype).eps * float(logits.detach().abs().max()):
            return nearest
    raise UserError(
        f"the logits of {type(model).__name__} are not its head of its last norm of its stream, scaled or capped by a "
        "number of its config: the lens would read its layers otherwise than the model reads the last one"
    )


@paper(on=gpt, year=2020, url="https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens")
def logit_lens(model: nn.Module, tokens: Tokens) -> Lens:
    """Log-probabilities of the next token, read before the first block and after each. (B, T) -> (L + 1, B, T, V).

    The last layer is the model's own output, which is checked. The model stays in the mode, training or evaluation,
    that it is in. Raises UserError for a model whose blocks cannot be found, and for one whose logits are not
    norm and head of its last stream, be they scaled or capped.
    """
    found, output = _watched(model, tokens)
    raw = torch.stack([anatomy(model).read(x) for x in found])
    logits = _after_the_head(model, raw[-1], output)(raw)
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
