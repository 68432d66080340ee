"""Plots of a run: its curves over the epochs, and which classes a test confuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DRAWN_WHOLE = 25  # classes that fit in a matrix with names and numbers
PAIRS_DRAWN = 25  # bars beside the matrix of more classes


def to_picture(figure: Figure) -> np.ndarray:
    """Renders a figure: uint8 (H,W,3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# --- curves ---


def read_epochs(log: Path) -> list[dict]:
    """The entries of a log.txt, by epoch; of an epoch that was trained twice, and all after it, only the last."""
    epochs = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        while epochs and epochs[-1]["epoch"] >= entry["epoch"]:
            epochs.pop()
        epochs.append(entry)
    return epochs


def curves(epochs: Sequence[dict]) -> Figure:
    """Draws loss, validation or the sampler's entropy, and learning rate, over the entries of `read_epochs`."""
    loss = "loss_reconstruction" if "loss_reconstruction" in epochs[0] else "loss"
    panels = {"loss": {"training": [e.get(loss) for e in epochs]}}
    for source in epochs[-1].get("validation") or {}:
        found = [(e.get("validation") or {}).get(source, {}) for e in epochs]
        name = "validation" if source == "model" else f"validation, {source.upper()}"
        panels["loss"][name] = [values.get("loss") for values in found]
        accuracy = panels.setdefault("validation accuracy (%)", {})
        for top in ("top1", "top5"):
            accuracy[f"top-{top[-1]}" + f", {source.upper()}" * (source != "model")] = [v.get(top) for v in found]
    if "probs_entropy" in epochs[-1]:
        panels["entropy of P / log N"] = {"sampler": [e.get("probs_entropy") for e in epochs]}
    panels["learning rate"] = {"": [e.get("lr") for e in epochs]}
    figure = Figure(figsize=(4.2 * len(panels), 3.2))
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        draw_lines(axes, title, [e["epoch"] + 1 for e in epochs], lines)
    figure.subplots_adjust(left=0.17 / len(panels), right=0.985, top=0.89, bottom=0.15, wspace=0.25)
    return figure


def draw_lines(axes: Axes, title: str, x: Sequence[int], lines: dict[str, list]) -> None:
    for name, values in lines.items():
        y = np.array(values, np.float64)  # None, of an epoch without this value, becomes nan: a gap
        axes.plot(x, y, label=name, marker="." if len(x) < 30 else None, linewidth=1.5)
    axes.set(xlabel="epochs", title=title)
    axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)


# --- confusions ---


class Pair(NamedTuple):
    """Videos of class `true` that were taken for class `predicted`, and their share of the class."""

    true: int
    predicted: int
    videos: int
    share: float


def confused_pairs(confusion: np.ndarray) -> list[Pair]:
    """The cells beside the diagonal of a confusion matrix int (K,K) that are not empty, most videos first."""
    sizes = confusion.sum(1)
    rows, columns = np.nonzero(confusion - np.diag(confusion.diagonal()))
    pairs = [
        Pair(true, predicted, int(confusion[true, predicted]), float(confusion[true, predicted] / sizes[true]))
        for true, predicted in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.videos, -pair.share))


def confusions(confusion: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws a confusion matrix int (K,K), rows in shares of their class.

    Up to `DRAWN_WHOLE` classes have their names and numbers at it; of more, the most confused pairs are beside it.
    """
    small, names = len(names) <= DRAWN_WHOLE, [name.replace("$", r"\$") for name in names]  # $ would start a formula
    side = 2 + 0.45 * len(names) if small else 9
    figure = Figure(figsize=(side + 0.6 if small else 2.1 * side, side), layout="constrained")
    axes, *right = np.atleast_1d(figure.subplots(1, 1 if small else 2))
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if small:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share:.0%}"[:-1], ha="center", va="center", color=colour, size=8)
    for beside in right:
        draw_pairs(beside, confused_pairs(confusion)[:PAIRS_DRAWN], names)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def draw_pairs(axes: Axes, pairs: Sequence[Pair], names: Sequence[str]) -> None:
    """Draws pairs of classes as bars, the first on top."""
    y = range(len(pairs))
    bars = axes.barh(y, [pair.videos for pair in pairs], color="tab:blue")
    axes.bar_label(bars, [f"{pair.videos}  ({pair.share:.0%})" for pair in pairs], padding=3, size=8)
    axes.set_yticks(y, [f"{shorten(names[p.true])} → {shorten(names[p.predicted])}" for p in pairs], size=8)
    axes.set(title="most confused: true → predicted", xlabel="videos (share of the true class)")
    axes.set_ylim(max(PAIRS_DRAWN, len(pairs)) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def shorten(name: str, length: int = 32) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
