"""Extracts features of videos with a pre-trained or fine-tuned model.

    python tools/extract_features.py --model output/checkpoint-799.pth --output features folder
    python tools/extract_features.py --model output/checkpoint-799.pth --output features --window 16 video.mp4

By default the model sees the middle clip of each video, as in a test on one view. With --window it sees all clips
of --num_frames frames, --sampling_rate apart, that start --window frames after one another and end within the
video; in a video shorter than a clip the last frame is repeated. Clips are centre crops. --pool chooses what is
kept of each of the W clips:

    mean      (W,D)          the vector that the head classifies: the mean of all tokens, normalised (the first
                             token in a model that classifies it, all slots in one with --slot_pooling, the
                             input of the linear layer in a probe)
    frame     (W,T',D)       the same for each time slot of a tubelet, commonly 2 frames
    tokens    (W,T',H',W',D) every token after the last block, not normalised, without the class token

AdaMAE and VideoMAE normalise tokens in pre-training, but their mean in a classifier. For their pre-training
checkpoints the final norm is therefore a new one: it standardises the mean, without weights.

The names of a classifier's classes, where its checkpoint has them, are written to class_names.txt in --output.

Each video gets a file below --output, named after its path below the folder that all arguments share. A
safetensors file holds `features` and `frames`, the frames (W,T) int64 in each clip, with the settings as JSON in
the metadata `about`. For an `.npy` file the settings and frames are in a `.json` beside it.

An interrupted run can be continued with the same command: files appear only once they are complete, and videos
that have one are skipped. A file made with other settings or weights is an error, unless --overwrite is given.
Unreadable videos are reported and skipped; the exit status is then 1.
"""

import argparse
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from tools.inference.feature_files import Features, is_done, write_features
from tools.inference.trained import (
    Trained,
    check_flags,
    encoder_of,
    find_videos,
    inference_parser,
    load_trained,
    run_tool,
)
from tools.inference.windows import Unreadable, Windows, collate
from tools.preparing.planning import target_names
from utils import counted, whole_file

POOLS = ("mean", "frame", "tokens")


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = inference_parser("extract_features.py", __doc__)
    add = parser.add_argument_group("features").add_argument
    add("--output", required=True, metavar="DIR", help="folder for the files")
    add("--window", type=int, metavar="FRAMES",
        help="frames from the start of a clip to the start of the next (default: the middle clip only)")
    add("--pool", choices=POOLS, default="mean", help="what to keep of a clip (default: %(default)s)")
    add("--format", choices=["safetensors", "npy"], default="safetensors", help="of files (default: %(default)s)")
    add("--dtype", choices=["float32", "float16"], default="float32", help="of features (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace existing files")
    return parser
# fmt: on


def clip_features(clips: Tensor, *, model: nn.Module, pool: str) -> Tensor:
    """Computes what `pool` keeps of normalised clips: (B,3,T,H,W) -> (B,D), (B,T',D) or (B,T',H',W',D)."""
    if pool == "mean":
        return model.forward_pooled(clips)  # (B,D)
    encoder = encoder_of(model)
    tokens = encoder.forward_tokens(clips).unflatten(1, encoder.window)  # (B,T',H',W',D)
    return tokens if pool == "tokens" else encoder.final_norm(tokens.mean((2, 3)))  # (B,T',D)


def extract(trained: Trained, loader: DataLoader, *, pool: str, dtype: str) -> Iterator[tuple[int, Features | str]]:
    """Yields the number of each video and its features, or the reason why it can't be read."""
    function = partial(clip_features, model=trained.model, pool=pool)
    under_way = defaultdict(list)  # (frames, features) of the windows so far, by video
    for items, clips in loader:
        rows = iter(() if clips is None else trained.run(function, clips).numpy().astype(dtype))
        for item in items:
            if isinstance(item, Unreadable):
                under_way.pop(item.video, None)
                yield item.video, item.reason
                continue
            under_way[item.video].append((item.frames, next(rows)))
            if item.last:
                frames, features = zip(*under_way.pop(item.video))
                yield item.video, Features(np.stack(features), np.stack(frames))


def checksum(model: nn.Module) -> str:
    """Computes the CRC-32 of all weights, which detects other weights in a file of the same name."""
    crc = 0
    for value in model.state_dict().values():
        crc = zlib.crc32(value.cpu().contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def settings_of(args: argparse.Namespace, trained: Trained) -> dict:
    """Returns the settings on which the features depend, for the metadata of their files."""
    asked = {name: getattr(args, name) for name in ("pool", "window", "dtype")}
    amp = str(trained.amp or torch.float32).removeprefix("torch.")
    clips = {name: value for name, value in trained.clips._asdict().items() if name not in ("segments", "crops")}
    return {**asked, "amp": amp, "weights": checksum(trained.model), **clips}


def run(args: argparse.Namespace) -> int:
    """Extracts the missing features; returns the number of unreadable videos."""
    check_flags(args, "window")
    videos, output = find_videos(args.videos), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    trained = load_trained(args, lambda text: print(text, file=sys.stderr), headless=True)
    settings = settings_of(args, trained)
    if trained.class_names:
        with whole_file(output / "class_names.txt", "w") as file:
            file.writelines(f"{name}\n" for name in trained.class_names)
    todo = []
    for (path, name), file in zip(videos.items(), target_names(list(videos.values()), args.format), strict=True):
        about = {"video": name.as_posix(), **settings}
        if args.overwrite or not is_done(output / file, about):
            todo.append((path, output / file, about))

    paths = [path for path, _, _ in todo]
    dataset = Windows(paths=paths, clips=trained.clips, stride=args.window, decoder=args.decoder)
    workers = min(args.num_workers, len(todo)) if len(todo) > 1 else 0
    pin = trained.device.type == "cuda"
    loader = DataLoader(dataset, args.batch_size, collate_fn=collate, num_workers=workers, pin_memory=pin)
    failed = 0
    extracted = extract(trained, loader, pool=args.pool, dtype=args.dtype)
    for number, found in tqdm(extracted, total=len(todo), unit="video", disable=None):
        path, file, about = todo[number]
        if isinstance(found, str):
            failed += 1
            tqdm.write(f"extract_features.py: {path}: {found}", file=sys.stderr)
            continue
        write_features(file, found, {"model": args.model, **about})
    made, there = len(todo) - failed, len(videos) - len(todo)
    print(f"{counted(len(videos), 'video')}: {made} written, {there} there already, {failed} unreadable")
    return failed


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    run_tool("extract_features.py", lambda: run(args))


if __name__ == "__main__":
    main()
