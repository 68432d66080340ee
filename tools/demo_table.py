"""Compares the demo's fine-tuned models on the same test videos: a small table and a plot of the confusions.

    python tools/demo_table.py --output output/demo --runs "from AdaMAE=output/demo/finetuned_adaptive" \
        "from scratch=output/demo/finetuned_scratch"

Runs are output folders of run_class_finetuning.py. Each is compared with the last one, video by video. Prints the
table and writes finetuning.md, finetuning.json and finetuning.png.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from runs.checkpoints import epoch_checkpoints, read_checkpoint
from utils import SettingError, UserError, whole_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_hits(folder: Path) -> dict[str, bool]:
    """Whether the top-1 prediction of each test video is right, by the video's path, from predictions.csv."""
    with (folder / "predictions.csv").open(newline="") as file:
        return {row["video"]: row["class_1"] == row["label"] for row in csv.DictReader(file)}


def read_confusion(folder: Path) -> tuple[list[str], np.ndarray]:
    """Class names and confusion matrix, float (K,K), rows summing to 1, from confusion.csv."""
    with (folder / "confusion.csv").open(newline="") as file:
        (_, *names), *rows = csv.reader(file)
    counts = np.array([row[1:] for row in rows], dtype=float)
    return names, counts / np.maximum(1, counts.sum(1, keepdims=True))


def training_seconds(folder: Path) -> float:
    """Seconds of all epochs in log.txt; if an epoch was run twice, only the last run counts."""
    epochs = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return sum({e["epoch"]: e["seconds"] for e in epochs}.values())


def pretraining_seconds(folder: Path) -> float:
    """Seconds of the pre-training that a run started from; 0 for training from scratch."""
    start = read_checkpoint(epoch_checkpoints(folder)[0])["args"]["finetune"]
    return training_seconds(Path(start).parent) if start else 0.0


def summarise(hits: dict[str, bool], reference: dict[str, bool]) -> dict[str, float]:
    """Top-1 accuracy of a run and its gain over another run, in percent, with standard errors.

    The error of the gain is that of the paired difference, since both runs were tested on the same videos.

    Raises:
        SettingError: they were not.
    """
    if hits.keys() != reference.keys():
        raise SettingError("the runs were not tested on the same videos: test them again on one list")
    own = np.array(list(hits.values()), dtype=float)
    gain = own - np.array([reference[video] for video in hits], dtype=float)
    return {
        "top1": 100 * own.mean(),
        "top1_error": 100 * own.std() / math.sqrt(len(own)),
        "gain": 100 * gain.mean(),
        "gain_error": 100 * gain.std() / math.sqrt(len(gain)),
        "videos": len(own),
    }


def table(report: dict[str, dict]) -> str:
    """The runs as a Markdown table; the others are compared with the last one."""
    *_, last = report
    lines = [
        f"| method | top-1, % | over {last} | seconds of fine-tuning | and of pre-training |",
        "|---|---|---|---|---|",
    ]
    for name, r in report.items():
        gain = "-" if name == last else f"{r['gain']:+.1f} ± {r['gain_error']:.1f}"
        before = f"{r['pretraining_seconds']:.0f}" if r["pretraining_seconds"] else "-"
        lines.append(f"| {name} | {r['top1']:.1f} ± {r['top1_error']:.1f} | {gain} | {r['seconds']:.0f} | {before} |")
    return "\n".join(lines) + "\n"


def draw(report: dict[str, dict], folders: dict[str, Path], path: Path) -> None:
    """Plots the top-1 accuracy of the runs and their confusion matrices to a PNG file."""
    figure, (left, *others) = plt.subplots(1, 1 + len(folders), figsize=(3.2 + 3.4 * len(folders), 3.9))
    figure.set_layout_engine("constrained")
    top1, error = ([r[key] for r in report.values()] for key in ("top1", "top1_error"))
    colours = [f"C{k}" for k in range(len(report) - 1)] + ["grey"]
    bars = left.bar([name.replace(" ", "\n") for name in report], top1, yerr=error, capsize=4, color=colours)
    left.bar_label(bars, fmt="%.1f", padding=3)
    names, _ = read_confusion(folders[next(iter(folders))])
    left.axhline(100 / len(names), color="black", linestyle=":", label="chance")
    videos = next(iter(report.values()))["videos"]
    left.set(title="fine-tuned, the same steps", ylabel=f"top-1 of {videos} test videos, %", ylim=(0, 108))
    left.legend(frameon=False)
    for axes, (name, folder) in zip(others, folders.items(), strict=True):
        image = axes.imshow(read_confusion(folder)[1], cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names if axes is others[0] else [], fontsize=8)
        axes.set(title=name, xlabel="predicted", ylabel="true" if axes is others[0] else "")
    figure.colorbar(image, ax=others, label="share of the true class", shrink=0.8)
    with whole_file(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def compare(folders: dict[str, Path], output: Path) -> None:
    """Writes the table and the plot of the runs, and prints the table."""
    hits = {name: read_hits(folder) for name, folder in folders.items()}
    *_, last = hits
    report = {
        name: summarise(hits[name], hits[last])
        | {"seconds": training_seconds(folder), "pretraining_seconds": pretraining_seconds(folder)}
        for name, folder in folders.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, text in (("finetuning.md", table(report)), ("finetuning.json", json.dumps(report, indent=1) + "\n")):
        with whole_file(output / name, "w") as file:
            file.write(text)
    draw(report, folders, output / "finetuning.png")
    print(table(report), end="")


def named_folders(entries: list[str]) -> dict[str, Path]:
    """NAME=FOLDER, ... -> folders by name.

    Raises:
        SettingError: an entry has no "=", or there is no such folder.
    """
    folders = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not Path(folder or entry).is_dir() or not folder:
            raise SettingError(f"{entry!r} is not NAME=FOLDER with the output folder of a run")
        folders[name] = Path(folder)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="names and output folders of the runs"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the table and the plot")
    args = parser.parse_args()
    try:
        compare(named_folders(args.runs), args.output)
    except (UserError, OSError) as error:
        raise SystemExit(f"demo_table.py: error: {error}") from error


if __name__ == "__main__":
    main()
