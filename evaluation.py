"""The multi-view test: scores of all views, fused per video and merged over ranks; accuracies; result files."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from augment import Colours, normalize, to_pixels
from clips.lists import VideoList
from engine_for_finetuning import until_stopped
from pictures.plots import confused_pairs, confusions, to_picture
from runs.console import Console
from runs.engine import Engine
from runs.faults import TrainingDiverged
from runs.logs import RunLog
from runs.processes import wait_for_all
from runs.signals import SAVED, Stopped, StopSignals
from utils import CSV_TEXT, World, counted, gather_from_ranks, sum_over_ranks, whole_file

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
    class_names: Sequence[str],
    fusion: str,
    skip_unreadable: bool,
    output_dir: str,
    signals: StopSignals,
    world: World,
    log: RunLog,
    **scoring,
) -> int:
    """The multi-view test of the engine's weights; writes test.json and the files of `write_results`.

    Args:
        tested: name of the weights, for messages and test.json.
        class_names: of the files and pictures; () numbers the classes.
        fusion: which of `FUSIONS` decides; the accuracies of all are reported.
        output_dir: folder of the files; '' writes none.
        log: gets the numbers and the confusion picture too.
        scoring: further arguments of `score_views`.

    Returns:
        The exit status, 1 where videos could not be read (unless `skip_unreadable`).

    Raises:
        Stopped: a signal came.
        TrainingDiverged: no score is finite.
    """
    console = Console(total_steps=len(loader), show=world.is_main)
    views = counted(len(loader.dataset.views), "view")
    console.say(f"testing {tested}: {counted(len(loader.dataset), 'video')} x {views}")
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
        console.say("  ".join(f"{name} {rounded(value)}" for name, value in found.items()))
        picture = show_confusions(scores, class_names or numbers(scores), console)
        log.results(found, picture)
        if output_dir:
            folder = Path(output_dir)
            write_results(folder, scores, videos, class_names, skip_unreadable=skip_unreadable)
            with whole_file(folder / "confusion.png") as file:
                Image.fromarray(picture).save(file, "png")
            with whole_file(folder / "test.json", "w") as file:
                file.write(json.dumps({"tested": tested, "view_fusion": fusion, **found}, indent=1) + "\n")
        for _, path, reason in scores.bad:
            print(f"unreadable test video: {path}: {reason}", file=sys.stderr)
    return 1 if scores.bad and not skip_unreadable else 0


def rounded(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


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
    sizes, right = class_counts(scores, labels, skip_unreadable=skip_unreadable)
    videos, views = max(1, int(sizes.sum())), max(1, n * scores.num_views)
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


def class_counts(scores: Scores, labels: np.ndarray, *, skip_unreadable: bool) -> tuple[np.ndarray, np.ndarray]:
    """How many videos each class has, and how many of them are right in their top 1: int64 (K,) each.

    What counts is said in `accuracies`.
    """
    num_classes = scores.fused.shape[1]
    missed = np.array([] if skip_unreadable else [index for index, _, _ in scores.bad], np.int64)
    sizes = np.bincount(np.concatenate([scores.label, labels[missed]]), minlength=num_classes)
    hit = (scores.fused.argmax(1) == scores.label) & is_finite(scores)
    return sizes, np.bincount(scores.label[hit], minlength=num_classes)


def confusion_matrix(scores: Scores) -> np.ndarray:
    """int64 (K,K): row the true class, column the predicted one, of the videos with finite scores."""
    num_classes, finite = scores.fused.shape[1], is_finite(scores)
    cells = scores.label[finite] * num_classes + scores.fused[finite].argmax(1)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def numbers(scores: Scores) -> list[str]:
    """What the classes are called that have no names."""
    return [str(k) for k in range(scores.fused.shape[1])]


def show_confusions(scores: Scores, names: Sequence[str], console: Console) -> np.ndarray:
    """Prints the most confused pairs of classes; returns the picture of all, uint8 (H,W,3)."""
    confusion = confusion_matrix(scores)
    for true, predicted, videos, share in confused_pairs(confusion)[:PAIRS_SHOWN]:
        number = counted(videos, "video")
        console.say(f"confused: {names[true]} taken for {names[predicted]}: {number}, {share:.0%} of the class")
    return to_picture(confusions(confusion, names))


TOP = ("class_", "score_")  # columns of predictions.csv for each of the best classes
PAIRS_SHOWN = 5  # on the console


def write_results(
    folder: Path, scores: Scores, videos: VideoList, class_names: Sequence[str] = (), *, skip_unreadable: bool = False
) -> None:
    """Writes predictions.csv, scores.npz, the files of `write_classes`, and unreadable.csv if there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [videos[i].path for i in scores.index.tolist()]
    order = np.argsort(-scores.fused, axis=1, kind="stable")[:, :5]
    header = ["video", "label", *(f"{what}{k + 1}" for k in range(order.shape[1]) for what in TOP)]
    rows = []
    for path, label, best, row in zip(paths, scores.label.tolist(), order.tolist(), scores.fused, strict=True):
        named = [class_names[k] for k in (label, best[0])] if class_names else []
        rows.append([path, label, *(x for k in best for x in (k, f"{row[k]:.6g}")), *named])
    write_csv(folder / "predictions.csv", header + ["true", "predicted"] * bool(class_names), rows)
    with whole_file(folder / "scores.npz") as file:
        np.savez(file, videos=np.array(paths), labels=scores.label, scores=scores.fused)
    sizes, right = class_counts(scores, videos.labels, skip_unreadable=skip_unreadable)
    write_classes(folder, confusion_matrix(scores), sizes, right, class_names or numbers(scores))
    if scores.bad:
        write_csv(folder / "unreadable.csv", ["video", "reason"], [entry[1:] for entry in scores.bad])


def write_classes(
    folder: Path, confusion: np.ndarray, sizes: np.ndarray, right: np.ndarray, names: Sequence[str]
) -> None:
    """Writes confusion.csv, confused_pairs.csv and classes.csv.

    Args:
        confusion: int64 (K,K), see `confusion_matrix`.
        sizes, right: int64 (K,), see `class_counts`.
    """
    table = [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
    write_csv(folder / "confusion.csv", ["true \\ predicted", *names], table)
    pairs = confused_pairs(confusion)
    table = [[names[true], names[predicted], videos, f"{share:.4f}"] for true, predicted, videos, share in pairs]
    write_csv(folder / "confused_pairs.csv", ["true", "predicted", "videos", "share"], table)
    wrong = {pair.true: names[pair.predicted] for pair in reversed(pairs)}  # the first pair of a class stays
    table = [
        [name, size, hits, f"{100 * hits / size:.2f}" if size else "", wrong.get(k, "")]
        for k, (name, size, hits) in enumerate(zip(names, sizes.tolist(), right.tolist(), strict=True))
    ]
    write_csv(folder / "classes.csv", ["class", "videos", "correct", "accuracy", "most_common_wrong"], table)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with whole_file(path, "w", **CSV_TEXT) as file:
        csv.writer(file).writerows([header, *rows])
