"""From views to numbers in a table: fusing the views of a video, accuracies, and files that tell of them."""

import csv
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clips.lists import VideoList

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


def fuse_views(logits: Tensor, labels: Tensor, fusion: str) -> tuple[Tensor, Tensor]:
    """Logits (n,V,K) and labels (n,) -> fused scores (n,K) float32 and hits of the views (n,2) int64.

    fusion: "softmax" averages probabilities (VideoMAE, MAE-ST), "logits" the raw logits (AdaMAE's code).
    A view whose scores are not finite is never right, and its video's scores are not finite.
    """
    logits = logits.float()
    scores = logits.softmax(2) if fusion == "softmax" else logits
    top = logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[:, None, None]  # (n,V,5)
    top &= scores.isfinite().all(2, keepdim=True)
    hits = torch.stack([top[:, :, 0].sum(1), top.any(2).sum(1)], dim=1)  # (n,2)
    return scores.mean(1), hits


def merge_ranks(scores: Scores) -> Scores:
    """All processes' scores in every process, in the order of the list (every process must call it)."""
    parts = [scores]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, scores)
    joined = [np.concatenate([getattr(p, name) for p in parts]) for name in Scores._fields[:4]]
    order = joined[0].argsort()
    bad = sorted(entry for p in parts for entry in p.bad)
    return Scores(*(values[order] for values in joined), scores.num_views, bad)


def is_finite(scores: Scores) -> np.ndarray:
    """bool (n,): the videos whose scores are numbers."""
    return np.isfinite(scores.fused).all(1)


def accuracies(scores: Scores, labels: np.ndarray, *, skip_unreadable: bool = False) -> dict[str, float]:
    """Accuracies in per cent, of videos and of views, and numbers of videos.

    Each video counts once. An unreadable one counts as wrong in the videos' top-1, top-5 and mean per-class
    accuracy, unless skipped; one whose scores are not finite always does.

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


def write_results(folder: Path, scores: Scores, videos: VideoList, class_names: list[str] | None = None) -> None:
    """predictions.csv, scores.npz, confusion.csv, confusion.png, and unreadable.csv where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    names = class_names or [str(k) for k in range(scores.fused.shape[1])]
    paths = [videos[i].path for i in scores.index.tolist()]
    order = np.argsort(-scores.fused, axis=1, kind="stable")[:, :5]
    with (folder / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["video", "label", *(f"{what}{k + 1}" for k in range(order.shape[1]) for what in TOP)])
        for path, label, best, row in zip(paths, scores.label.tolist(), order, scores.fused, strict=True):
            table.writerow([path, label, *(x for k in best for x in (k, f"{row[k]:.6g}"))])
    np.savez(folder / "scores.npz", videos=np.array(paths), labels=scores.label, scores=scores.fused)
    confusion = confusion_matrix(scores)
    with (folder / "confusion.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["true \\ predicted", *names])
        table.writerows([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
    draw_confusion(confusion, names, folder / "confusion.png")
    if scores.bad:
        with (folder / "unreadable.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("video", "reason"), *(entry[1:] for entry in scores.bad)])


TOP = ("class_", "score_")


def draw_confusion(confusion: np.ndarray, names: list[str], path: Path) -> None:
    """The confusion matrix as a picture, each row in shares of its class; numbers where they can be read."""
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
    figure.savefig(path, dpi=110)
    plt.close(figure)
