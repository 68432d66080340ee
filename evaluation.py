"""The multi-view test: scores of all views, fused per video and merged over ranks; accuracies; result files."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from augment import Colours, normalize, to_pixels
from clips.lists import VideoList
from engine_for_finetuning import until_stopped
from runs.console import Console
from runs.engine import Engine
from runs.faults import TrainingDiverged
from runs.processes import wait_for_all
from runs.signals import SAVED, Stopped, StopSignals
from utils import CSV_TEXT, World, counted, gather_from_ranks, sum_over_ranks, whole_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FUSIONS = ("softmax", "logits")


class Scores(NamedTuple):
    """The scores of n videos; the arrays are on the host."""

    index: np.ndarray  # int64 (n,), the video's place in its list
    label: np.ndarray  # int64 (n,)
    fused: np.ndarray  # float32 (n,K), the mean over the views
    view_hits: np.ndarray  # int64 (n,2), how many of the views are right in their top 1 and top 5
    num_views: int
    bad: list[tuple[int, str, str]]  # (index, path, reason) of the unreadable videos


def test(
    engine: Engine,
    loader: DataLoader,
    *,
    tested: str,
    class_names: list[str] | None,
    fusion: str,
    skip_unreadable: bool,
    output_dir: str,
    signals: StopSignals,
    world: World,
    **scoring,
) -> int:
    """The multi-view test of the engine's weights; writes test.json and the files of `write_results`.

    Args:
        tested: name of the weights, for messages and test.json.
        class_names: of the confusion matrix; None numbers the classes.
        fusion: which of `FUSIONS` decides; the accuracies of all are reported.
        output_dir: folder of the files; '' writes none.
        scoring: further arguments of `score_views`.

    Returns:
        The exit status, 1 where videos could not be read (unless `skip_unreadable`).

    Raises:
        Stopped: a signal came.
        TrainingDiverged: no score is finite.
    """
    console = Console(total_steps=len(loader), show=world.is_main)
    console.say(
        f"testing {tested}: {counted(len(loader.dataset), 'video')} x {counted(len(loader.dataset.views), 'view')}"
    )
    fused = score_views(engine, loader, stop=lambda: bool(signals.status), console=console, **scoring)
    scores = fused[fusion]
    if sum_over_ranks(signals.status, world.device):
        raise Stopped("stopped during the test: rerun the same command to repeat it", signals.status or SAVED)
    if len(scores.index) and not is_finite(scores).any():
        raise TrainingDiverged(f"{tested}: no video has finite scores; its weights are unusable")
    videos = loader.dataset.videos
    every = {name: accuracies(fused[name], videos.labels, skip_unreadable=skip_unreadable) for name in FUSIONS}
    found = every[fusion] | {f"{top}_{name}": every[name][top] for name in FUSIONS for top in ("top1", "top5")}
    if world.is_main:
        console.say(
            "  ".join(f"{name} {value if isinstance(value, int) else f'{value:.2f}'}" for name, value in found.items())
        )
        if output_dir:
            summary = {"tested": tested, "view_fusion": fusion, **found}
            with whole_file(Path(output_dir) / "test.json", "w") as file:
                file.write(json.dumps(summary, indent=1) + "\n")
            write_results(Path(output_dir), scores, videos, class_names)
        for _, path, reason in scores.bad:
            print(f"unreadable test video: {path}: {reason}", file=sys.stderr)
    return 1 if scores.bad and not skip_unreadable else 0


def score_views(
    engine: Engine,
    loader: DataLoader,
    *,
    num_classes: int,
    colours: Colours,
    clips_at_once: int = 64,
    stop: Callable[[], bool] = lambda: False,
    console: Console,
) -> dict[str, Scores]:
    """The scores of every video of the loader's list by each of `FUSIONS`, merged over ranks.

    Args:
        loader: batches of `loaders.collate_views`, V views to a video.
        clips_at_once: views in one forward pass.
        stop: where it becomes true the loop ends early, and the result is meaningless.
    """
    num_views, bad, parts = len(loader.dataset.views), [], {name: [empty_scores(num_classes)] for name in FUSIONS}
    done = 0
    console.start(0)
    for number, batch in enumerate(until_stopped(loader, stop, "test")):
        bad += batch["bad"]
        if len(batch["label"]):
            views = batch["clips"].flatten(0, 1)  # (n*V,3,T,H,W) uint8
            logits = [
                engine.evaluate(normalize(to_pixels(part.to(engine.device, non_blocking=True)), *colours))
                for part in views.split(clips_at_once)
            ]
            logits = torch.cat(logits).unflatten(0, (-1, num_views))  # (n,V,K)
            labels, done = batch["label"].to(engine.device, non_blocking=True), done + len(logits)
            for name in FUSIONS:
                fused = fuse_views(logits, labels, name)  # (n,K), (n,2)
                parts[name].append([x.cpu().numpy() for x in (batch["index"], batch["label"], *fused)])
        console.advance()
        if (number + 1) % max(1, len(loader) // 20) == 0:
            console.report(number + 1, "test", videos=str(done))
    console.close()
    wait_for_all("test")
    return {
        name: merge_ranks(Scores(*map(np.concatenate, zip(*found)), num_views, bad)) for name, found in parts.items()
    }


def empty_scores(num_classes: int) -> list[np.ndarray]:
    """The arrays of `Scores` of no video: a rank may have none."""
    ints = np.zeros(0, np.int64)
    return [ints, ints, np.zeros((0, num_classes), np.float32), np.zeros((0, 2), np.int64)]


def fuse_views(logits: Tensor, labels: Tensor, fusion: str) -> tuple[Tensor, Tensor]:
    """Fuses the views of each video: logits (n,V,K), labels (n,) -> scores (n,K) float32, view hits (n,2) int64.

    A view with non-finite scores is never right, and makes its video's scores non-finite.

    Args:
        fusion: "softmax" averages probabilities (VideoMAE, MAE-ST), "logits" the raw logits (AdaMAE's code).
    """
    logits = logits.float()
    scores = logits.softmax(2) if fusion == "softmax" else logits
    top = logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[:, None, None]  # (n,V,5)
    top &= scores.isfinite().all(2, keepdim=True)
    hits = torch.stack([top[:, :, 0].sum(1), top.any(2).sum(1)], dim=1)  # (n,2)
    return scores.mean(1), hits


def merge_ranks(scores: Scores) -> Scores:
    """All processes' scores in every process, in the order of the list (all ranks call it together)."""
    parts = gather_from_ranks(scores)
    joined = [np.concatenate([getattr(p, name) for p in parts]) for name in Scores._fields[:4]]
    order = joined[0].argsort()
    bad = sorted(entry for p in parts for entry in p.bad)
    return Scores(*(values[order] for values in joined), scores.num_views, bad)


def is_finite(scores: Scores) -> np.ndarray:
    """Which videos have finite scores: bool (n,)."""
    return np.isfinite(scores.fused).all(1)


def accuracies(scores: Scores, labels: np.ndarray, *, skip_unreadable: bool = False) -> dict[str, float]:
    """Accuracies in per cent, of videos and of views, and numbers of videos.

    Each video counts once. In the videos' top-1, top-5 and mean per-class accuracy an unreadable one counts as
    wrong unless skipped, one with non-finite scores always.

    Args:
        labels: int64, of the whole list, from which those of the unreadable videos are taken.
    """
    n, num_classes = scores.fused.shape
    order = np.argsort(-scores.fused, axis=1, kind="stable")[:, : min(5, num_classes)]
    hit = (order == scores.label[:, None]) & is_finite(scores)[:, None]
    missed = np.array([] if skip_unreadable else [index for index, _, _ in scores.bad], np.int64)
    sizes = np.bincount(np.concatenate([scores.label, labels[missed]]), minlength=num_classes)
    right = np.bincount(scores.label[hit[:, 0]], minlength=num_classes)
    videos, views = max(1, n + len(missed)), max(1, n * scores.num_views)
    return {
        "top1": 100 * float(hit[:, 0].sum()) / videos,
        "top5": 100 * float(hit.any(1).sum()) / videos,
        "mean_class_accuracy": 100 * float((right[sizes > 0] / sizes[sizes > 0]).mean()) if sizes.any() else 0.0,
        "view_top1": 100 * float(scores.view_hits[:, 0].sum()) / views,
        "view_top5": 100 * float(scores.view_hits[:, 1].sum()) / views,
        "videos": videos,
        "unreadable": len(scores.bad),
        "not_finite": n - int(is_finite(scores).sum()),
    }


def confusion_matrix(scores: Scores) -> np.ndarray:
    """int64 (K,K): row the true class, column the predicted one, of the videos with finite scores."""
    num_classes, finite = scores.fused.shape[1], is_finite(scores)
    cells = scores.label[finite] * num_classes + scores.fused[finite].argmax(1)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


TOP = ("class_", "score_")  # columns of predictions.csv for each of the best classes


def write_results(folder: Path, scores: Scores, videos: VideoList, class_names: list[str] | None = None) -> None:
    """Writes predictions.csv, scores.npz, confusion.csv, confusion.png, and unreadable.csv if there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    names = class_names or [str(k) for k in range(scores.fused.shape[1])]
    paths = [videos[i].path for i in scores.index.tolist()]
    order = np.argsort(-scores.fused, axis=1, kind="stable")[:, :5]
    with whole_file(folder / "predictions.csv", "w", **CSV_TEXT) as file:
        table = csv.writer(file)
        table.writerow(["video", "label", *(f"{what}{k + 1}" for k in range(order.shape[1]) for what in TOP)])
        for path, label, best, row in zip(paths, scores.label.tolist(), order, scores.fused, strict=True):
            table.writerow([path, label, *(x for k in best for x in (k, f"{row[k]:.6g}"))])
    with whole_file(folder / "scores.npz") as file:
        np.savez(file, videos=np.array(paths), labels=scores.label, scores=scores.fused)
    confusion = confusion_matrix(scores)
    with whole_file(folder / "confusion.csv", "w", **CSV_TEXT) as file:
        table = csv.writer(file)
        table.writerow(["true \\ predicted", *names])
        table.writerows([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
    draw_confusion(confusion, names, folder / "confusion.png")
    if scores.bad:
        with whole_file(folder / "unreadable.csv", "w", **CSV_TEXT) as file:
            csv.writer(file).writerows([("video", "reason"), *(entry[1:] for entry in scores.bad)])


def draw_confusion(confusion: np.ndarray, names: list[str], path: Path) -> None:
    """Draws the confusion matrix, each row in shares of its class, with numbers where they fit."""
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    small = len(names) <= 25
    side = 2 + 0.45 * len(names) if small else 9
    figure, axes = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if small:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share:.0%}"[:-1], ha="center", va="center", color=colour, size=8)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    with whole_file(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)
