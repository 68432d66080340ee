"""All that is wrong with lists of videos, line by line; reading them for training ends at the first fault."""

import os
from pathlib import Path
from typing import NamedTuple

from clips.lists import NO_LABEL, parse_line
from clips.video import open_video
from clips.video_index import VideoError
from tools.preparing.transcode import three_frames


def check_video(path: str, *, decoder: str) -> str | None:
    """Why the first, middle or last frame of a video can't be read; None if they can."""
    try:
        with open_video(path, decoder) as video:
            video.get_frames(three_frames(video.num_frames))
    except VideoError as error:
        return error.reason
    return None


class Line(NamedTuple):
    """A line of a list (0: the list as a whole), the path of its video ("": none) and what is wrong, or None."""

    file: str
    number: int
    path: str
    wrong: str | None


def check_lines(file: Path, data_root: Path | None, num_classes: int | None) -> list[Line]:
    """Every line of a list that holds a video, or should."""
    root, lines = data_root or file.parent, []
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as f:
        for number, text in enumerate(map(str.strip, f), start=1):
            if not text or text.startswith("#"):
                continue
            try:
                path, label = parse_line(text)
            except ValueError as error:
                lines.append(Line(str(file), number, "", str(error)))
                continue
            wrong = None
            if num_classes is not None and not 0 <= label < num_classes:
                shown = "no label" if label == NO_LABEL else f"the label {label}"
                wrong = f"{shown}, not one from 0 to {num_classes - 1}"
            lines.append(Line(str(file), number, os.path.join(root, path), wrong))
    return lines or [Line(str(file), 0, "", "the list is empty")]
