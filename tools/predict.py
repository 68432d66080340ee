"""Predicts the classes of videos with a fine-tuned model.

    python tools/predict.py --model output/checkpoint-best.pth video.mp4
    python tools/predict.py --model output/checkpoint-best.pth folder --json predictions.json

Works with classifiers and probes of this repository and of the published AdaMAE, VideoMAE and MAE-ST code. The
softmax scores of --segments x --crops views of each video are averaged; by default these are the views of the
model's test. Folders are searched for videos, with their subfolders.

Unreadable videos are reported and skipped; the exit status is then 1.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from clips.class_names import read_labels
from clips.lists import NO_LABEL, VideoList
from datasets import ClipSettings, EvalDataset
from evaluation import fuse_views
from loaders import LoadSettings, build_evaluation_loader
from tools.inference.trained import Trained, check_flags, find_videos, inference_parser, load_trained, run_tool
from utils import counted, whole_file


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = inference_parser("predict.py", __doc__)
    add = parser.add_argument_group("prediction").add_argument
    add("--segments", type=int, help="temporal views of a video (default: those of the model's test)")
    add("--crops", type=int, help="spatial views (default: those of the model's test)")
    add("--labels", metavar="FILE", help="file of class names, one per line, from class 0 (default: the checkpoint's)")
    add("--topk", type=int, default=5, help="classes per video (default: %(default)s)")
    add("--json", metavar="FILE", help="JSON output file; -: standard output, instead of the table")
    return parser
# fmt: on


def build_loader(
    trained: Trained, paths: Sequence[str], *, batch_size: int, decoder: str, num_workers: int
) -> DataLoader:
    """Returns a loader of all views of each video, in batches of `batch_size` clips or one video."""
    clips, n = trained.clips, len(paths)
    videos = VideoList(list_path="", root="", paths=list(paths), labels=[NO_LABEL] * n, lines=list(range(1, n + 1)))
    settings = ClipSettings(
        sampling=clips.sampling, num_frames=clips.num_frames, sampling_rate=clips.sampling_rate, decoder=decoder
    )
    crops = clips.make_crops(clips.crops)
    dataset = EvalDataset(videos=videos, crops=crops, settings=settings, num_segments=clips.segments)
    workers = min(num_workers, n) if n > 1 else 0
    return build_evaluation_loader(dataset, LoadSettings(batch_size=batch_size, num_workers=workers))


def score_videos(
    trained: Trained, loader: DataLoader, *, clips_at_once: int
) -> Iterator[tuple[int, Tensor | None, str]]:
    """Yields the number of each video, its mean softmax scores (K,) or None, and why it can't be read or ""."""
    for batch in loader:
        for index, _, reason in batch["bad"]:
            yield index, None, reason
        if not len(batch["index"]):
            continue
        views = batch["clips"].flatten(0, 1)  # (n*V,3,T,S,S)
        logits = torch.cat([trained.run(trained.model, part) for part in views.split(clips_at_once)])
        logits = logits.unflatten(0, (len(batch["index"]), -1))  # (n,V,K)
        scores, _ = fuse_views(logits, batch["label"], "softmax")  # (n,K)
        for index, row in zip(batch["index"].tolist(), scores, strict=True):
            yield index, row, ""


def best_classes(scores: Tensor, topk: int, names: Sequence[str]) -> list[dict]:
    """Returns class, label (None without names) and score of the highest of the scores (K,), best first."""
    top = scores.topk(min(topk, len(scores)))
    return [
        {"class": k, "label": names[k] if names else None, "score": round(score, 6)}
        for score, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def as_table(video: str, top: Sequence[dict]) -> str:
    """Formats a video and its best classes as lines of text."""
    lines = [f"{100 * c['score']:7.2f} %  {c['label'] or 'class ' + str(c['class'])}" for c in top]
    return "\n".join([video, *lines])


def predict(args: argparse.Namespace) -> int:
    """Predicts every video; returns the number of unreadable ones."""
    check_flags(args, "segments", "crops", "topk")
    paths = list(find_videos(args.videos))
    trained = load_trained(args, lambda text: print(text, file=sys.stderr), headless=False)
    clips, num_classes = trained.clips, trained.model.head.out_features
    names = read_labels(args.labels, num_classes).names if args.labels else trained.class_names
    print(f"{counted(len(paths), 'video')} x {clips.segments} x {clips.crops} views", file=sys.stderr)
    loader = build_loader(
        trained, paths, batch_size=args.batch_size, decoder=args.decoder, num_workers=args.num_workers
    )

    predictions, unreadable = [], []
    scored = score_videos(trained, loader, clips_at_once=args.batch_size)
    for index, scores, reason in tqdm(scored, total=len(paths), unit="video", disable=None):
        if scores is None:
            unreadable.append({"video": paths[index], "reason": reason})
            tqdm.write(f"predict.py: {paths[index]}: {reason}", file=sys.stderr)
            continue
        predictions.append({"video": paths[index], "top": best_classes(scores, args.topk, names)})
        if args.json != "-":
            tqdm.write(as_table(**predictions[-1]))

    views = {"segments": clips.segments, "crops": clips.crops}
    found = {"model": args.model, **views, "predictions": predictions, "unreadable": unreadable}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(args.json, "w") as file:
            file.write(text)
    return len(unreadable)


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    run_tool("predict.py", lambda: predict(args))


if __name__ == "__main__":
    main()
