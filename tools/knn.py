"""Classifies videos by their nearest neighbours among features that tools/extract_features.py has written.

    python tools/extract_features.py --model checkpoint-799.pth --output features videos
    python tools/knn.py --features features --train train.csv --test val.csv

The features must be one vector for each clip (--pool mean, the default there); several clips of a video are averaged.
The lists are those of fine-tuning, with numbers or names of classes (DATASET.md); a video's features are those in whose
file its path, or the end of it, is written. As in DINO (Caron et al., 2021), similarity is the cosine, and each of the
k nearest training videos votes for its class with the weight exp(similarity / temperature).

A training video without features is left out; a test video without them counts as wrong, as in a test.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from clips.class_names import check_labels, number_lists
from clips.lists import VideoList, read_list
from tools.inference.feature_files import read_about, read_features
from tools.inference.trained import run_tool
from utils import SettingError, choose_device, whole_file

SIMILARITIES = 2**26  # at a time: 256 MiB


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("knn.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features", required=True, metavar="DIR", help="folder of the features, searched with its subfolders")
    add("--train", required=True, metavar="LIST", help="list of the training videos with labels")
    add("--test", required=True, metavar="LIST", help="list of the videos to classify, with labels")
    add("--data_root", metavar="DIR", help="folder that relative paths of the lists start from (default: the list's)")
    add("--k", type=int, default=20, help="neighbours (default: %(default)s)")
    add("--temperature", type=float, default=0.07, help="of the votes (default: %(default)s)")
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--json", metavar="FILE", help="JSON output file")
    return parser
# fmt: on


def vote(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int, temperature: float, num_classes: int, at_once: int
) -> Tensor:
    """The votes of the k nearest of n training videos for each class: (m,classes) float32.

    Args:
        train, test: unit vectors (n,D) and (m,D).
        labels: int64 (n,).
        at_once: similarities in memory at a time.
    """
    votes = []
    for part in test.split(max(1, at_once // len(train))):
        nearest = (part @ train.T).topk(k, dim=1)  # (r,k)
        weights = (nearest.values / temperature).exp()
        votes.append(weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest.indices], weights))
    return torch.cat(votes)


def find_features(folder: Path) -> tuple[dict[tuple[str, ...], Path], dict]:
    """Finds the files of features: by the parts of the video's path; and what all agree on.

    Raises:
        SettingError: there are none, they are not one vector a clip, or were made with different settings.
    """
    files, shared = {}, None
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.npy")]):
        about = read_about(path)
        if not about or "video" not in about:
            continue
        files[PurePath(about["video"]).parts] = path
        settings = {name: value for name, value in about.items() if name not in ("video", "model", "frames")}
        if settings.get("pool") != "mean":
            raise SettingError(f"{path} was made with --pool {settings.get('pool')}: extract features with --pool mean")
        if settings != (shared := shared or settings):
            name = next(name for name in settings if settings[name] != shared.get(name))
            both = f"{name} = {settings[name]}, others with {shared.get(name)}"
            raise SettingError(f"{path} was made with {both}: use one folder for each")
    if not files:
        raise SettingError(f"--features {folder}: no features of tools/extract_features.py in this folder")
    return files, shared


def load_features(videos: VideoList, files: dict[tuple[str, ...], Path]) -> tuple[Tensor, Tensor, list[str]]:
    """The features of a list's videos as unit vectors (n,D), their labels (n,), and the paths that have none.

    Raises:
        SettingError: two videos have the same features, or none has any.
    """
    rows, labels, missing, taken = [], [], [], {}
    for path, label in videos:
        parts = PurePath(path).parts
        file = next((files[end] for start in range(len(parts)) if (end := parts[start:]) in files), None)
        if file is None:
            missing.append(path)
            continue
        if file in taken:
            raise SettingError(f"{file} would be of both {taken[file]} and {path}: extract their common folder at once")
        taken[file] = path
        rows.append(read_features(file).astype(np.float32).mean(0))  # (W,D) -> (D)
        labels.append(label)
    if not rows:
        raise SettingError(f"none of {len(videos)} videos of {videos.list_path} ({missing[0]}) has features")
    return normalize(torch.from_numpy(np.stack(rows)), dim=1), torch.tensor(labels), missing


def run(args: argparse.Namespace) -> int:
    if args.k < 1 or not args.temperature > 0:
        raise SettingError(f"--k {args.k} must be at least 1, and --temperature {args.temperature} positive")
    device = choose_device(args.device)
    lists = {name: read_list(getattr(args, name), args.data_root) for name in ("train", "test")}
    number_lists(lists)
    num_classes = 1 + int(max(videos.labels.max() for videos in lists.values()))
    for videos in lists.values():
        check_labels(videos, max(1, num_classes))
    files, about = find_features(Path(args.features))
    train, labels, unused = load_features(lists["train"], files)
    test, truth, unread = load_features(lists["test"], files)
    if args.k > len(train):
        raise SettingError(f"--k {args.k} is more than the {len(train)} training videos with features")
    settings = {"k": args.k, "temperature": args.temperature}
    votes = vote(
        train.to(device), labels.to(device), test.to(device), num_classes=num_classes, at_once=SIMILARITIES, **settings
    ).cpu()
    hits = votes.topk(min(5, num_classes), dim=1).indices == truth[:, None]  # (m,5)
    total = len(lists["test"])
    found = {"top1": 100 * int(hits[:, 0].sum()) / total, "top5": 100 * int(hits.sum()) / total, "videos": total}
    report(args, {**found, **settings, "training_videos": len(train), "features": about}, unused, unread)
    return 0


def report(args: argparse.Namespace, found: dict, unused: Sequence[str], unread: Sequence[str]) -> None:
    for which, paths, happens in (("training", unused, "are left out"), ("test", unread, "count as wrong")):
        if paths:
            print(f"{len(paths)} {which} videos without features {happens}, e.g. {paths[0]}", file=sys.stderr)
    neighbours = f"{found['k']} neighbours of {found['training_videos']} training videos"
    print(f"top-1 {found['top1']:.2f}  top-5 {found['top5']:.2f}  of {found['videos']} videos, by {neighbours}")
    if args.json:
        with whole_file(args.json, "w") as file:
            file.write(json.dumps(found, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    run_tool("knn.py", lambda: run(args))


if __name__ == "__main__":
    main()
