"""Pictures of a comparison as inline SVG, in the colour of the text around them: they suit light and dark."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

COLOURS = ("#7c8594", "#2f7fd6", "#e07020", "#1f9d6b", "#a05bd0", "#d64550", "#a88a10", "#2aa0b0")
INK = "#010203"  # stands for the text's colour until the SVG is written
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.grid": True,
}


def curves(record: dict[str, Any]) -> str:
    """Training loss over tokens, the mean over pairs in a band from the lowest to the highest."""

    def draw(axes: Axes) -> None:
        for row, colour in _rows(record):
            if not row["curve"]:
                continue
            tokens, mean, low, high = zip(*row["curve"], strict=True)
            axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(tokens, mean, color=colour, label=row["name"], linewidth=1.5)
        axes.set(xlabel="training tokens", ylabel="training loss, nats")
        axes.legend()

    return _svg("curves", draw)


def loss(losses: Sequence[tuple[int, float]]) -> str | None:
    """One run's training loss over its steps."""
    if not losses:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*losses, strict=True), color=COLOURS[1], linewidth=1.5)
        axes.set(xlabel="step", ylabel="training loss")

    return _svg("loss", draw)


def strips(record: dict[str, Any]) -> str:
    """Held-out loss over the learning rate's factor on the tuning seed; dots mark each optimum, crosses divergence."""

    def draw(axes: Axes) -> None:
        for row, colour in _rows(record):
            strip = row["strip"]
            points = [(f, v) for f, v in zip(strip["factors"], strip["losses"], strict=True) if v is not None]
            lost = [f for f, v in zip(strip["factors"], strip["losses"], strict=True) if v is None]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, marker="o", markersize=4, color=colour, label=row["name"])
            axes.axvline(row["rate"], color=colour, linestyle=":", linewidth=1)
            axes.plot(lost, [0.97] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform())
        _log2(axes, record["rows"][0]["strip"]["factors"])
        axes.set(xlabel="multiple of the declared learning rate", ylabel=f"{record['unit']}, tuning seed")
        axes.legend()

    return _svg("strips", draw)


def ladder(record: dict[str, Any]) -> str | None:
    """X's held-out loss at each budget, a line for each seed, and where the others lie at the common one."""
    found = record["ladder"]
    if "budgets" not in found:
        return None

    def draw(axes: Axes) -> None:
        x, *others = _rows(record)
        for i, losses in enumerate(found["losses"]):
            label = f"{x[0]['name']}, each seed" if i == 0 else None
            axes.plot(found["budgets"], losses, marker=".", color=x[1], linewidth=1, label=label)
        for row, colour in others:
            scores = [score for score in row["scores"] if score is not None]
            axes.plot([1] * len(scores), scores, "_", markersize=16, color=colour, label=row["name"])
        _log2(axes, found["budgets"])
        axes.set(xlabel="multiple of the training budget", ylabel=record["unit"])
        axes.legend()

    return _svg("ladder", draw)


def pairs(record: dict[str, Any]) -> str:
    """Each pair's difference from X, with the mean and its interval."""

    def draw(axes: Axes) -> None:
        others = _rows(record)[1:]
        for at, (row, colour) in enumerate(others):
            against = row["against"]
            values = [v for v in against["differences"] if v is not None]
            axes.plot(values, [at] * len(values), "o", color=colour, alpha=0.5, markersize=5)
            if against["mean"] is not None and against["low"] is not None and against["high"] is not None:
                error = [[against["mean"] - against["low"]], [against["high"] - against["mean"]]]
                axes.errorbar([against["mean"]], [at + 0.2], xerr=error, fmt="D", color=colour, capsize=4, markersize=5)
        axes.axvline(0, color=INK, linewidth=1)
        x = record["rows"][0]["name"]
        axes.set(xlabel=f"difference from {x}, {record['unit']} (left is better)", ylim=(-0.5, len(others)))
        axes.set_yticks(range(len(others)), [row["name"] for row, _ in others])

    return _svg("pairs", draw, height=1.2 + 0.6 * len(record["rows"]))


def _rows(record: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [(row, COLOURS[i % len(COLOURS)]) for i, row in enumerate(record["rows"])]


def _log2(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _svg(name: str, draw: Callable[[Axes], None], *, width: float = 6.4, height: float = 3.6) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        return inline(figure, name)


def inline(figure: Figure, name: str) -> str:
    """A figure drawn in `STYLE` as SVG for a page. The same drawing gives the same text; ids are the figure's own, so
    that several share a page."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*;", "font-family: inherit;", text)
    # Groups and images are numbered alike in every figure, and nothing refers to them.
    text = re.sub(r'(<(?:g|image)\b[^>]*?) id="[^"]*"', r"\1", text)
    return re.sub(
        r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*"', r'\1\2role="img"', text, count=1
    )
