"""Transcodes videos into files that load fast in training, writes the lists of a data set, and checks both.

    python tools/prepare_videos.py --input raw --output prepared                    # videos
    python tools/prepare_videos.py --output prepared --lists_only \\
        --data_set SSV2 --annotations labels                                        # their lists
    python tools/prepare_videos.py --check --input prepared --nb_classes 174        # before training

Videos. --input is a folder, searched recursively, or a list of videos as described in DATASET.md. Each video
becomes H.264 in MP4 below --output, in the same subfolder: upright, with a short side of --short_side unless it
is smaller, the source's mean frame rate as a constant rate, a key frame at least every --gop frames, no sound.
A file gets its final name only when it is complete and its first, middle and last frame have been read back, so
a run that was stopped continues where it was. `a.avi` and `a.mp4` in one folder become `a.avi.mp4` and
`a.mp4.mp4`. A video that can't be read, crashes the decoder or takes longer than --timeout is a line
`path,reason` in bad_videos.csv in --output. The others continue, and the next run tries it again.

Array jobs. --shard 3/16 takes the third of 16 parts of the videos and writes bad_videos-03-of-16.csv. When all
are done, one run with --lists_only writes the lists.

Lists. train.csv, val.csv, test.csv and labels.txt in --output list the videos below it: those of a published
data set with --data_set and --annotations, or those in folders named after classes with --data_set folders, which
sets --val_fraction and --test_fraction of each class aside. missing_videos.csv names annotated videos that are not
there. If --input is a list, a list of the same name in --output has its labels and the new paths. Without
--lists_only, lists are written after the videos.

Check. --check reads the lists in the folder --input (train.csv, val.csv, test.csv), or the list --input, or all
videos of a folder without lists: every line, and the first, middle and last frame of every video. Each error is
a line in check.csv, in --output or next to the lists, and the exit status is 1.

Exit status of the other runs: 0; 1 if no video could be read, if no list could be written, or on an error; with
--strict also if any video is bad or missing. After a signal: 128 + its number.
"""

import argparse
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import av

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from clips.decoders import DECODERS, resolve_decoder
from clips.lists import find_videos
from tools.preparing.annotations import READERS
from tools.preparing.list_checks import check_videos, find_lines
from tools.preparing.listing import match, match_list, read_class_folders, write_lists
from tools.preparing.planning import Job, plan_jobs, record_settings, shard_name, take_shard
from tools.preparing.transcode import PRESETS, Encoding, WritingFailed, make_video, sweep
from tools.preparing.workers import failure_file, run_tasks, summarise
from utils import SettingError, UserError, counted

NO_TEST = (
    "prepare_videos.py: warning: val.csv and test.csv list the same videos, so the accuracy of the best epoch on them "
    "will be too high: set --val_fraction and --test_fraction, add folders val and test, or fine-tune with --test_last"
)


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, metavar="PATH", help="folder of videos, or list of videos")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the new videos and their lists")
    parser.add_argument("--data_root", type=Path, metavar="DIR", help="folder that the relative paths of a list "
        "start from (default: that of the list)")
    parser.add_argument("--workers", type=int, default=num_cores(), help="number of processes, each using one "
        "core (default: the number of cores, %(default)s here)")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
        help="time limit for one video (default: %(default)s)")
    parser.add_argument("--shard", type=parse_shard, metavar="I/N", help="do part I of N, I from 1 to N")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if any video is bad or missing")

    add = parser.add_argument_group("videos").add_argument
    add("--short_side", type=int, default=320, metavar="PIXELS", help="an even number (default: %(default)s)")
    add("--enlarge", action="store_true", help="also enlarge smaller videos to --short_side")
    add("--gop", type=int, default=16, metavar="FRAMES",
        help="largest distance between key frames; 1: key frames only (default: %(default)s)")
    add("--crf", type=int, default=20, help="H.264 quality, 0 to 51, lower is better (default: %(default)s)")
    add("--preset", choices=PRESETS, default="veryfast",
        help="x264 preset: slower ones give smaller files (default: %(default)s)")

    add = parser.add_argument_group("lists").add_argument
    add("--data_set", choices=[*READERS, "folders"], help="data set that the annotations are from; "
        "folders: none, since videos lie in folders named after classes, class/x.mp4 or train/class/x.mp4")
    add("--annotations", type=Path, metavar="DIR", help="folder of the official annotation files")
    add("--split", type=int, default=1, choices=[1, 2, 3], help="split of UCF101 or HMDB51 (default: %(default)s)")
    add("--official_test", action="store_true", help="SSV2 and Kinetics: test.csv is the official "
        "test set (default: a copy of val.csv, on which published results are reported)")
    add("--val_fraction", type=float, default=0.1, metavar="FRACTION",
        help="fraction of each class used for val if there are no val or test folders (default: %(default)s)")
    add("--test_fraction", type=float, default=0.1, metavar="FRACTION",
        help="the same for test; 0: test.csv is a copy of val.csv (default: %(default)s)")
    add("--lists_only", action="store_true", help="only write the lists of the videos in --output")

    add = parser.add_argument_group("check").add_argument
    add("--check", action="store_true", help="only check the lists and videos of --input")
    add("--nb_classes", type=int, metavar="C", help="require a label from 0 to C - 1 on every line")
    add("--decoder", choices=["auto", *DECODERS], default="auto",
        help="library that reads the videos (default: the first that works)")
    return parser
# fmt: on


def num_cores() -> int:
    """The number of cores that this process may use, or of all cores where the system doesn't say."""
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
    """Validates the settings before anything is read.

    Raises:
        SettingError: a setting is wrong; the message says what to change.
    """
    makes_videos = not (args.check or args.lists_only)
    input_is_list = args.input is not None and args.input.is_file()
    for wrong, message in (
        (args.workers < 1, "--workers must be at least 1"),
        (args.timeout <= 0, "--timeout must be more than 0"),
        (args.short_side < 16 or args.short_side % 2, "--short_side must be even and at least 16"),
        (args.gop < 1, "--gop must be at least 1"),
        (not 0 <= args.crf <= 51, "--crf must be 0 to 51"),
        (not 0 <= args.val_fraction < 1, "--val_fraction must be 0 or more and below 1"),
        (not 0 <= args.test_fraction < 1 - args.val_fraction, "--test_fraction must be 0 or more, and below 1 together "
         "with --val_fraction"),
        (args.check and (args.lists_only or args.data_set), "--check can't be combined with --lists_only or "
         "--data_set"),
        (args.input is None and not args.lists_only, "--input is missing: a folder or a list of videos"),
        (args.input is not None and not args.input.exists(), f"--input {args.input} does not exist"),
        (args.output is None and not args.check, "--output is missing: the folder to write to"),
        (args.lists_only and args.shard, "--lists_only can't be combined with --shard: run it once, "
         "after all shards"),
        (args.data_set and args.shard, "--data_set can't be combined with --shard: run it once with --lists_only, "
         "after all shards"),
        (args.lists_only and not args.data_set and not input_is_list, "--lists_only needs --data_set, or a list "
         "as --input"),
        (args.lists_only and args.input is not None and not input_is_list, "--lists_only lists the videos below "
         "--output: leave out --input unless it is a list"),
        (args.data_set and input_is_list, "--data_set needs a folder as --input: a list has its own labels"),
        ((args.data_set in READERS) != (args.annotations is not None), "--annotations, a folder, and "
         f"--data_set {', '.join(READERS)} need each other"),
        (args.annotations is not None and not args.annotations.is_dir(), f"--annotations {args.annotations} is "
         "not a folder"),
        (args.annotations and args.annotations.resolve() == args.output.resolve(), "--annotations and --output "
         "are the same folder: lists could overwrite annotations, so choose another --output"),
        (args.nb_classes is not None and not args.check, "--nb_classes needs --check"),
        (makes_videos and "libx264" not in av.codecs_available, "this PyAV has no H.264 encoder (libx264)"),
    ):  # fmt: skip
        if wrong:
            raise SettingError(message)


def make_videos(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Makes the videos that are not there yet and lists the bad ones; returns the number of the latter."""
    encoding = Encoding(**{field.name: getattr(args, field.name) for field in fields(Encoding)})
    record_settings(args.output / "prepare_videos.json", asdict(encoding))
    jobs = take_shard(jobs, args.shard)
    todo = [job for job in jobs if not os.path.exists(job.target)]
    tag = f"{socket.gethostname()}-{os.getpid()}"
    make = partial(make_video, encoding=encoding, tag=tag)
    outcomes = run_tasks(make, todo, workers=args.workers, timeout=args.timeout)
    bad, report = [], args.output / shard_name("bad_videos", args.shard)
    try:
        with closing(outcomes), failure_file(report, "path,reason") as write:
            for number, failure in outcomes:
                if isinstance(failure, WritingFailed):
                    raise UserError(f"writing failed: {failure.reason}; finished videos stay: make room and run again")
                if failure:
                    bad.append((todo[number].source, failure.reason))
                    write(bad[-1])
    finally:
        sweep(args.output, tag)
    made, there = len(todo) - len(bad), len(jobs) - len(todo)
    print(f"{counted(len(jobs), 'video')}: {made} made, {there} there already, {len(bad)} bad")
    summarise(bad, report)
    if todo and len(bad) == len(jobs):
        raise UserError("no video could be read")
    return len(bad)


def make_lists(args: argparse.Namespace) -> int:
    """Writes the lists of the videos below the output; returns the number of missing videos."""
    classes = None
    if args.data_set is None:
        found = match_list(args.input, args.output, args.data_root)
    elif args.data_set == "folders":
        fractions = {"val_fraction": args.val_fraction, "test_fraction": args.test_fraction}
        found, classes, left_out = read_class_folders(find_videos(args.output), **fractions)
        if left_out:
            print(f"{counted(len(left_out), 'video')} in no class folder, the first is {left_out[0]}")
        if found.listed["test"] and found.listed["test"] == found.listed["val"]:
            print(NO_TEST, file=sys.stderr)
    else:
        annotations = READERS[args.data_set](args.annotations, split=args.split, official_test=args.official_test)
        found, classes = match(annotations, find_videos(args.output)), annotations.classes
    if not any(found.listed.values()):
        example = f" ({found.missing[0][1]})" if found.missing else ""
        raise UserError(f"no list written: none of {len(found.missing)} videos{example} is below {args.output}")
    write_lists(args.output, found, classes)
    missing = Counter(split for split, _ in found.missing)
    for split, videos in found.listed.items():
        print(
            f"{split}.csv: {counted(len(videos), 'video')}, {missing[split]} missing{'' if videos else ': not written'}"
        )
    if classes:
        print(f"labels.txt: {counted(len(classes), 'class')}")
    if found.doubtful:
        split, name = found.doubtful[0]
        print(f"{len(found.doubtful)} were found more than once, the first file is listed ({split}: {name})")
    with failure_file(args.output / "missing_videos.csv", "split,video") as write:
        for row in found.missing:
            write(row)
    return len(found.missing)


def run_check(args: argparse.Namespace) -> int:
    """Checks lists and videos; returns 1 if anything is wrong."""
    resolve_decoder(args.decoder)
    lists, lines = find_lines(args.input, args.data_root, args.nb_classes)
    if not lines:
        raise SettingError(f"--input {args.input}: neither lists (train.csv, val.csv, test.csv) nor videos")
    lines = take_shard(lines, args.shard)
    folder = args.output or (args.input.parent if args.input.is_file() else args.input)
    folder.mkdir(parents=True, exist_ok=True)
    report, limits = folder / shard_name("check", args.shard), {"workers": args.workers, "timeout": args.timeout}
    bad = check_videos(lines, report, decoder=args.decoder, **limits)
    num_videos = len({line.path for line in lines if line.path})
    found = [(len(lists), "list"), (len(lines), "line"), (num_videos, "video")]
    print(f"{', '.join(counted(*entry) for entry in found)}: {counted(len(bad), 'fault')}")
    summarise([(f"{line.file}, line {line.number}: {line.path}", line.wrong) for line in bad], report)
    return 1 if bad else 0


def run(args: argparse.Namespace) -> int:
    check_flags(args)
    if args.check:
        return run_check(args)
    args.output.mkdir(parents=True, exist_ok=True)
    bad = 0 if args.lists_only else make_videos(args, plan_jobs(args.input, args.output, args.data_root))
    from_list = args.input is not None and args.input.is_file()
    missing = make_lists(args) if args.data_set or (from_list and not args.shard) else 0
    return 1 if args.strict and (bad or missing) else 0


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    try:
        return run(args)
    except (UserError, OSError) as error:
        raise SystemExit(f"prepare_videos.py: error: {error}") from error


def stop(number: int, _frame) -> None:
    """Handles signals: leaves through every `finally`, so that no process and no unfinished file stays behind."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    sys.exit(main())
