"""Turns annotations or folders named after classes into lists of the videos on disk.

Annotated videos are matched by name: their folder below the root and their suffix don't matter.
"""

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from clips.lists import NO_LABEL, SPLITS, parse_line, read_list
from tools.preparing.annotations import AnnotationError, Annotations
from tools.preparing.planning import plan_jobs
from utils import whole_file

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Found(NamedTuple):
    """Which videos of a data set are on disk."""

    listed: dict[str, list[tuple[PurePath, int | str]]]  # (path, label or class name) of the videos found, by split
    missing: list[tuple[str, str]]  # (split, name) of the others
    doubtful: list[tuple[str, str]]  # (split, name) of those found more than once; the first one is listed


def match(annotations: Annotations, videos: Iterable[PurePath]) -> Found:
    """Finds each annotated video among paths by the last parts of its path, without the suffix.

    If there are several, one in a folder named after the split is preferred.
    """
    by_stem = defaultdict(list)
    for path in videos:
        by_stem[path.stem].append(path)
    found = Found({}, [], [])
    for split, entries in annotations.splits.items():
        found.listed[split] = []
        for name, label in entries:
            parts = PurePath(name).parts
            paths = [path for path in by_stem.get(parts[-1], ()) if path.parts[-len(parts) : -1] == parts[:-1]]
            if len(paths) > 1:
                paths.sort(key=lambda path: split not in [SPLIT_FOLDERS.get(part) for part in path.parts])
                found.doubtful.append((split, name))
            if paths:
                found.listed[split].append((paths[0], label))
            else:
                found.missing.append((split, name))
    return found


def match_list(file: Path, output: Path, data_root: Path | None) -> Found:
    """Finds the videos of a list among those made from them in the folder `output`.

    Raises:
        ListError: the list is missing, empty or malformed.
    """
    videos, split = read_list(file, data_root), file.stem
    names = {job.source: job.name for job in plan_jobs(file, output, data_root)}
    found = Found({split: []}, [], [])
    for video, label in zip(videos, videos.labels.tolist(), strict=True):
        source = os.path.abspath(video.path)
        if (output / names[source]).exists():
            named = videos.class_names and label != NO_LABEL
            found.listed[split].append((names[source], videos.class_names[label] if named else label))
        else:
            found.missing.append((split, source))
    return found


def read_class_folders(
    videos: Sequence[PurePath], *, val_fraction: float, test_fraction: float = 0.0
) -> tuple[Found, list[str], list[PurePath]]:
    """Reads splits and classes from paths such as `class/.../x.mp4` or `train/class/.../x.mp4`.

    Classes are numbered alphabetically. If there are neither val nor test folders, `val_fraction` of each class
    becomes val and `test_fraction` test: the same videos, whatever order they come in. If only one of val and test has
    videos, the other is a copy of it.

    Returns:
        The videos by split, the names of the classes, and the paths left out: those without a class and, where
        there are folders for splits, those elsewhere.
    """
    has_splits = any(len(path.parts) > 2 and path.parts[0] == "train" for path in videos)
    members, left_out = defaultdict(list), []  # (split, class) -> paths
    for path in videos:
        parts = path.parts if not has_splits else path.parts[1:]
        split = SPLIT_FOLDERS.get(path.parts[0]) if has_splits else "train"
        if split is None or len(parts) < 2:
            left_out.append(path)
        else:
            members[split, parts[0]].append(path)
    classes = sorted({name for _, name in members})
    draws = {split for split, _ in members} == {"train"}
    listed = defaultdict(list)
    for (split, name), paths in members.items():
        paths.sort(key=lambda path: (zlib.crc32(os.fsencode(path.as_posix())), path))  # random, yet repeatable
        label, fractions = classes.index(name), {"val": val_fraction, "test": test_fraction} if draws else {}
        for drawn, fraction in fractions.items():
            number = round(len(paths) * fraction)
            listed[drawn] += [(path, label) for path in paths[:number]]
            paths = paths[number:]
        listed[split] += [(path, label) for path in paths]
    listed["val"] = listed["val"] or listed["test"]
    listed["test"] = listed["test"] or listed["val"]
    return Found({split: sorted(listed[split]) for split in SPLITS}, [], []), classes, left_out


def write_lists(folder: Path, found: Found, classes: list[str] | None) -> None:
    """Writes a list for each split with videos, such as train.csv, and labels.txt if there are classes.

    The lists go to the folder that the paths of `found` start from.

    Raises:
        AnnotationError: a path can't be written to a list.
    """
    files = {f"{split}.csv": [format_line(*video) for video in videos] for split, videos in found.listed.items()}
    for name, lines in {**files, "labels.txt": classes}.items():
        if lines:
            with whole_file(folder / name, "w", errors="surrogateescape") as file:
                file.writelines(f"{line}\n" for line in lines)


def format_line(path: PurePath, label: int | str) -> str:
    """A line that `parse_line` reads as this path and label, with quotes around what needs them.

    Raises:
        AnnotationError: no line can hold this path.
    """
    after = "" if label == NO_LABEL else f" {label}"
    if isinstance(label, str):
        doubled = label.replace('"', '""')
        after = f',"{doubled}"'
    for line in (f"{path.as_posix()}{after}", f'"{path.as_posix()}"{after}'):
        try:
            whole = line == line.strip() and len(line.splitlines()) == 1 and not line.startswith("#")
            if whole and parse_line(line) == (path.as_posix(), label):
                return line
        except ValueError:
            continue
    raise AnnotationError(f"{str(path)!r} can't be written to a list of videos: rename it")
