"""Turn videos into files that train fast, write the lists of a data set, and check both.

    python tools/prepare_videos.py --input raw --output prepared                    # videos
    python tools/prepare_videos.py --output prepared --lists_only \\
        --data_set SSV2 --annotations labels                                        # their lists
    python tools/prepare_videos.py --check --input prepared --nb_classes 174        # before training

Videos. --input is a folder, searched with all below it, or a list of videos as DATASET.md describes it. Each
video becomes H.264 in MP4 below --output, in the same folders: upright, short side --short_side unless it is
smaller, the mean frame rate of the source as a constant one, a key frame every --gop frames, no sound. It gets
its name only once it's complete and its first, middle and last frame were read back; so a run that was stopped
goes on where it was. `a.avi` beside `a.mp4` become `a.avi.mp4` and `a.mp4.mp4`. A video that can't be read,
crashes the decoder or takes longer than --timeout is a line `path,reason` in bad_videos.csv in --output, and
the others go on; the next run tries it again.

Array jobs. --shard 3/16 takes the third sixteenth of the videos, and writes bad_videos-03-of-16.csv. When all
are done, one run with --lists_only writes the lists.

Lists. train.csv, val.csv, test.csv and labels.txt in --output name the videos that lie below it: with
--data_set and --annotations those of a published data set, with --data_set folders those in folders named as
classes. missing_videos.csv names annotated videos that aren't there. If --input is a list, a list of the same
name in --output has its labels and the new paths. Without --lists_only lists are written after the videos.

Check. --check reads the lists in the folder --input (train.csv, val.csv, test.csv), or the list --input, or,
in a folder without lists, all videos: every line, and of every video the first, middle and last frame. What is
wrong is a line in check.csv, in --output or beside the lists, and the exit status is 1.

Exit status of the other runs: 0; 1 if no video could be read, no list be written, or on an error; with --strict
also if any video is bad or missing. Stopped by a signal: 128 + its number.
"""

import argparse
import json
import os
import signal
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePath

import av
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from clips.decoders import resolve_decoder
from clips.lists import SPLITS, find_videos, read_list
from tools.preparing.annotations import (
    READERS,
    Found,
    match,
    read_class_folders,
    write_lists,
    write_text,
)
from tools.preparing.list_checks import Line, check_lines, check_video
from tools.preparing.transcode import (
    PRESETS,
    Encoding,
    Job,
    WritingFailed,
    make_video,
    refuse_overwriting,
    sweep,
    target_names,
)
from tools.preparing.workers import BadFile, Failure, run_tasks, summarise


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, metavar="PATH", help="folder of videos, or list of videos")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the new videos, and of their lists")
    parser.add_argument("--data_root", type=Path, metavar="DIR", help="where relative paths of a list start")
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes, each on one core (default: "
        "one for each core, here %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
        help="the most that one video may take (default: %(default)s)")
    parser.add_argument("--shard", type=parse_shard, metavar="I/N", help="do the I-th of N parts, I from 1 to N")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if any video is bad or missing")

    add = parser.add_argument_group("videos").add_argument
    add("--short_side", type=int, default=320, metavar="PIXELS", help="even (default: %(default)s)")
    add("--enlarge", action="store_true", help="enlarge smaller videos to --short_side, too")
    add("--gop", type=int, default=16, metavar="FRAMES",
        help="the most from one key frame to the next; 1: only key frames (default: %(default)s)")
    add("--crf", type=int, default=20, help="quality of H.264, 0 to 51: lower is better (default: %(default)s)")
    add("--preset", choices=PRESETS, default="veryfast",
        help="of x264: slower ones make smaller files (default: %(default)s)")

    add = parser.add_argument_group("lists").add_argument
    add("--data_set", choices=[*READERS, "folders"], help="which annotations; folders: class/x.mp4, or "
        "train/class/x.mp4 and so on, below --output")
    add("--annotations", type=Path, metavar="DIR", help="folder of the official annotation files")
    add("--split", type=int, default=1, choices=[1, 2, 3], help="of UCF101 and HMDB51 (default: %(default)s)")
    add("--official_test", action="store_true", help="SSV2, Kinetics: test.csv is the test set "
        "(default: a copy of val.csv, which published results are on)")
    add("--val_fraction", type=float, default=0.1, metavar="SHARE",
        help="of each class for val, where folders have no val or test (default: %(default)s)")
    add("--lists_only", action="store_true", help="write the lists of the videos in --output and no videos")

    add = parser.add_argument_group("check").add_argument
    add("--check", action="store_true", help="only check the lists and videos of --input")
    add("--nb_classes", type=int, metavar="C", help="every label must be there, from 0 to C - 1")
    add("--decoder", choices=["auto", "torchcodec", "decord", "pyav"], default="auto",
        help="that reads the videos")
    return parser
# fmt: on


def num_cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_shard(text: str) -> tuple[int, int]:
    """`3/16` -> (3, 16)."""
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        number, count = 0, 0
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as 1/16 or 16/16")
    return number, count


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError, saying what to change, for what can be told wrong before anything is read."""
    makes_videos = not (args.check or args.lists_only)
    input_is_list = args.input is not None and args.input.is_file()
    for wrong, message in (
        (args.workers < 1, "--workers must be at least 1"),
        (args.timeout <= 0, "--timeout must be more than 0"),
        (args.short_side < 16 or args.short_side % 2, "--short_side must be even and at least 16"),
        (args.gop < 1, "--gop must be at least 1"),
        (not 0 <= args.crf <= 51, "--crf must be 0 to 51"),
        (not 0 <= args.val_fraction < 1, "--val_fraction must be 0 or more and below 1"),
        (args.check and (args.lists_only or args.data_set), "--check goes without --lists_only and --data_set"),
        (args.input is None and not args.lists_only, "--input is missing: a folder or a list of videos"),
        (args.input is not None and not args.input.exists(), f"--input {args.input} does not exist"),
        (args.output is None and not args.check, "--output is missing: the folder to write to"),
        (args.lists_only and args.shard, "--lists_only goes without --shard: run it once, after all shards"),
        (args.data_set and args.shard, "--data_set goes without --shard: when all shards are done, run it once "
         "with --lists_only"),
        (args.lists_only and not args.data_set and not input_is_list, "--lists_only needs --data_set, or a list "
         "as --input"),
        (args.lists_only and args.input is not None and not input_is_list, "--lists_only lists what is below "
         "--output: leave --input out, unless it is a list"),
        (args.data_set and input_is_list, "--data_set goes with a folder as --input: a list has its own labels"),
        ((args.data_set in READERS) != (args.annotations is not None), "--annotations, a folder, goes with "
         f"--data_set {', '.join(READERS)}"),
        (args.annotations is not None and not args.annotations.is_dir(), f"--annotations {args.annotations} is "
         "no folder"),
        (args.annotations and args.annotations.resolve() == args.output.resolve(), "--annotations and --output "
         "are one folder: the lists may take the annotations' names, so keep them apart"),
        (args.nb_classes is not None and not args.check, "--nb_classes goes with --check"),
        (makes_videos and "libx264" not in av.codecs_available, "this PyAV has no H.264 encoder (libx264)"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)


# --- which videos, and what they are called -----------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[Job]:
    """A job for every video of the input, done or not, sorted by name.

    Raises ValueError where two would get one name, and where a new video would take the place of an old one.
    """
    if args.input.is_dir():
        root, output = args.input.resolve(), args.output.resolve()
        if output in (root, *root.parents):
            raise ValueError(f"--input {args.input} is in --output {args.output}: choose another --output")
        paths = find_videos(args.input, skip=args.output)
        sources = [str(args.input / path) for path in paths]
    else:
        videos = read_list(args.input, args.data_root)
        sources = list(dict.fromkeys(os.path.abspath(videos[k].path) for k in range(len(videos))))
        root = os.path.abspath(videos.root)
        if not all(PurePath(source).is_relative_to(root) for source in sources):
            root = os.path.commonpath([os.path.dirname(source) for source in sources])
        paths = [PurePath(os.path.relpath(source, root)) for source in sources]
    if not sources:
        raise ValueError(f"--input {args.input}: no videos in this folder")
    names = target_names(paths)
    jobs = [Job(source, name, str(args.output / name)) for source, name in zip(sources, names, strict=True)]
    refuse_overwriting(jobs, args.output)
    return sorted(jobs, key=lambda job: job.name)


def check_settings(folder: Path, encoding: Encoding) -> None:
    """Leaves the settings in the folder of the videos. Raises ValueError where it holds some of others."""
    file = folder / "prepare_videos.json"
    for name, old in json.loads(file.read_text()).items() if file.exists() else ():
        new = encoding._asdict().get(name)
        if new != old:
            raise ValueError(
                f"{folder} has videos made with --{name} {old}, this run has {new}: choose another --output, "
                f"or remove that folder"
            )
    write_text(file, [json.dumps(encoding._asdict())])


# --- making videos ------------------------------------------------------------------------------------------


def make_videos(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Makes what is missing, and the list of bad videos; returns how many those are."""
    encoding = Encoding(*(getattr(args, name) for name in Encoding._fields))
    check_settings(args.output, encoding)
    todo = [job for job in share(jobs, args.shard) if not os.path.exists(job.target)]
    tag = f"{socket.gethostname()}-{os.getpid()}"
    outcomes = run_tasks(
        partial(make_video, encoding=encoding, tag=tag), todo, workers=args.workers, timeout=args.timeout
    )
    bad = []
    try:
        with closing(outcomes), BadFile(args.output / shard_name("bad_videos", args.shard), "path,reason") as file:
            for number, outcome in progress(outcomes, len(todo)):
                if isinstance(outcome, WritingFailed):
                    raise OSError(
                        f"writing failed: {outcome.reason}; what is done stays: make room and start again"
                    )
                if outcome is not None:
                    bad.append((todo[number].source, reason_of(outcome)))
                    file.add(*bad[-1])
    finally:
        sweep(args.output, tag)
    num_mine = len(share(jobs, args.shard))
    print(f"{num_mine} videos: {len(todo) - len(bad)} made, {num_mine - len(todo)} there already, {len(bad)} bad")
    summarise(bad, file.path)
    if todo and len(bad) == num_mine:
        raise ValueError("no video could be read")
    return len(bad)


# --- what both ways of running share ------------------------------------------------------------------------


def share(items: Sequence, shard: tuple[int, int] | None) -> Sequence:
    """Of N parts the I-th: every N-th item."""
    return items if shard is None else items[shard[0] - 1 :: shard[1]]


def shard_name(name: str, shard: tuple[int, int] | None) -> str:
    return f"{name}.csv" if shard is None else f"{name}-{shard[0]:02d}-of-{shard[1]:02d}.csv"


def reason_of(outcome: str | Failure) -> str:
    return outcome.reason if isinstance(outcome, Failure) else outcome


def progress(outcomes: Iterable, total: int) -> Iterator:
    return tqdm(outcomes, total=total, unit="video", mininterval=1 if sys.stderr.isatty() else 60, smoothing=0.05)


# --- lists --------------------------------------------------------------------------------------------------


def make_lists(args: argparse.Namespace) -> int:
    """Writes the lists of the videos below the output; returns how many are missing."""
    classes = None
    if args.data_set is None:
        found = new_list(args)
    elif args.data_set == "folders":
        found, classes, left_out = read_class_folders(find_videos(args.output), val_fraction=args.val_fraction)
        if left_out:
            print(f"{len(left_out)} videos are in no folder of a class ({left_out[0]})")
    else:
        annotations = READERS[args.data_set](args.annotations, split=args.split, official_test=args.official_test)
        found, classes = match(annotations, find_videos(args.output)), annotations.classes
    if not any(found.listed.values()):
        example = f" ({found.missing[0][1]})" if found.missing else ""
        raise ValueError(f"no list written: none of {len(found.missing)} videos{example} is below {args.output}")
    write_lists(args.output, found, classes)
    missing = Counter(split for split, _ in found.missing)
    for split, videos in found.listed.items():
        print(f"{split}.csv: {len(videos)} videos, {missing[split]} missing{'' if videos else ': not written'}")
    if classes:
        print(f"labels.txt: {len(classes)} classes")
    if found.doubtful:
        split, name = found.doubtful[0]
        print(f"{len(found.doubtful)} are there more than once, the first is listed ({split}: {name})")
    with BadFile(args.output / "missing_videos.csv", "split,video") as file:
        for row in found.missing:
            file.add(*row)
    return len(found.missing)


def new_list(args: argparse.Namespace) -> Found:
    """The list --input with the paths of those of its videos that were made."""
    videos = read_list(args.input, args.data_root)
    names = {job.source: job.name for job in plan(args)}
    found = Found({args.input.stem: []}, [], [])
    for k, label in enumerate(videos.labels.tolist()):
        source = os.path.abspath(videos[k].path)
        if (args.output / names[source]).exists():
            found.listed[args.input.stem].append((names[source], label))
        else:
            found.missing.append((args.input.stem, source))
    return found


# --- checking -----------------------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    """Checks lists and videos; returns 1 if anything is wrong."""
    resolve_decoder(args.decoder)
    lists = [args.input] if args.input.is_file() else [args.input / f"{split}.csv" for split in SPLITS]
    lists = [file for file in lists if file.exists()]
    lines = [line for file in lists for line in check_lines(file, args.data_root, args.nb_classes)]
    if not lists:
        lines = [Line("", 0, str(args.input / path), None) for path in find_videos(args.input)]
    if not lines:
        raise ValueError(f"--input {args.input}: neither lists (train.csv, val.csv, test.csv) nor videos")
    lines = share(lines, args.shard)
    by_path = defaultdict(list)
    for line in lines:
        by_path[line.path].append(line)
    paths = [path for path in by_path if path]
    folder = args.output or (args.input.parent if args.input.is_file() else args.input)
    folder.mkdir(parents=True, exist_ok=True)
    bad = [line for line in lines if line.wrong]
    check = partial(check_video, decoder=args.decoder)
    with BadFile(folder / shard_name("check", args.shard), "list,line,path,reason") as file:
        for line in bad:
            file.add(*line)
        with closing(run_tasks(check, paths, workers=args.workers, timeout=args.timeout)) as outcomes:
            for number, outcome in progress(outcomes, len(paths)):
                if outcome is not None:
                    for line in by_path[paths[number]]:
                        bad.append(line._replace(wrong=reason_of(outcome)))
                        file.add(*bad[-1])
    print(f"{len(lists)} lists, {len(lines)} lines, {len(paths)} videos: {len(bad)} faults")
    summarise([(f"{line.file}, line {line.number}: {line.path}", line.wrong) for line in bad], file.path)
    return 1 if bad else 0


# --- the program --------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    check_flags(args)
    if args.check:
        return run_check(args)
    args.output.mkdir(parents=True, exist_ok=True)
    bad = 0 if args.lists_only else make_videos(args, plan(args))
    from_list = args.input is not None and args.input.is_file()
    missing = make_lists(args) if args.data_set or (from_list and not args.shard) else 0
    return 1 if args.strict and (bad or missing) else 0


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"prepare_videos.py: error: {error}") from error


def stop(number: int, _frame) -> None:
    """For signals: leave through every `finally`, so that no process and no unfinished file stays."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    sys.exit(main())
