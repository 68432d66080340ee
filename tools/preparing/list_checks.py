"""Checks every line of a list and every video in it, where training would stop at the first error."""

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clips.lists import NO_LABEL, SPLITS, find_videos, parse_line
from clips.video import open_video
from clips.video_index import VideoError
from tools.preparing.transcode import three_frames
from tools.preparing.workers import Failure, failure_file, run_tasks


class Line(NamedTuple):
    """A line of a list (0: the whole list), the path of its video ("": none) and what is wrong, or None."""

    file: str
    number: int
    path: str
    wrong: str | None


def find_lines(given: Path, data_root: Path | None, num_classes: int | None) -> tuple[list[Path], list[Line]]:
    """The lists that `given` is or has, with all their lines; a folder without lists has a line for each video."""
    lists = [given] if given.is_file() else [given / f"{split}.csv" for split in SPLITS]
    lists = [file for file in lists if file.exists()]
    if lists:
        return lists, [line for file in lists for line in check_lines(file, data_root, num_classes)]
    return [], [Line("", 0, str(given / path), None) for path in find_videos(given)]


def check_lines(file: Path, data_root: Path | None, num_classes: int | None) -> list[Line]:
    """Every line of a list that has a video, or should have one."""
    root, lines, first = data_root or file.parent, [], None
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as f:
        for number, text in enumerate(map(str.strip, f), start=1):
            if not text or text.startswith("#"):
                continue
            try:
                path, label = parse_line(text)
            except ValueError as error:
                lines.append(Line(str(file), number, "", str(error)))
                continue
            first = first or (label != NO_LABEL and (label, number)) or None
            lines.append(Line(str(file), number, os.path.join(root, path), wrong_label(label, first, num_classes)))
    return lines or [Line(str(file), 0, "", "the list is empty")]


def wrong_label(label: int | str, first: tuple[int | str, int] | None, num_classes: int | None) -> str | None:
    """What is wrong with a label, if anything; `first` is the list's first one and its line."""
    if first and label != NO_LABEL and isinstance(label, str) != isinstance(first[0], str):
        return f"the label {label!r}, where line {first[1]} has {first[0]!r}"
    if num_classes is not None and isinstance(label, int) and not 0 <= label < num_classes:
        shown = "no label" if label == NO_LABEL else f"the label {label}"
        return f"{shown}, not one from 0 to {num_classes - 1}"
    return None


def check_videos(lines: Sequence[Line], report: Path, *, decoder: str, workers: int, timeout: float) -> list[Line]:
    """Decodes three frames of every video, writes all errors to a CSV file and returns the lines that have one."""
    by_path = defaultdict(list)
    for line in lines:
        by_path[line.path].append(line)
    paths = [path for path in by_path if path]
    bad = [line for line in lines if line.wrong]
    outcomes = run_tasks(partial(check_video, decoder=decoder), paths, workers=workers, timeout=timeout)
    with closing(outcomes), failure_file(report, "list,line,path,reason") as write:
        for line in bad:
            write(line)
        for number, failure in outcomes:
            for line in by_path[paths[number]] if failure else ():
                bad.append(line._replace(wrong=failure.reason))
                write(bad[-1])
    return bad


def check_video(path: str, *, decoder: str) -> Failure | None:
    """Why the first, middle or last frame of a video can't be read, if so."""
    try:
        with open_video(path, decoder) as video:
            video.get_frames(three_frames(video.num_frames))
    except VideoError as error:
        return Failure(error.reason)
