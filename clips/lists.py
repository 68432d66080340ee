"""Lists of videos: reading them, and checking them before training starts."""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clips.isolation import Isolated
from clips.video import open_video
from clips.video_index import VideoError

SUFFIXES = "mp4|webm|avi|mkv|mov|m4v|mpg|mpeg|wmv|flv|3gp"
ENDS_AS_VIDEO = re.compile(rf"\.({SUFFIXES})$", re.IGNORECASE)
GOES_ON_AFTER_VIDEO = re.compile(rf"\.({SUFFIXES})(?P<rest>[\s,].*)$", re.IGNORECASE)
LABELLED = re.compile(r"(.*[^\s,])[\s,]+(-?[0-9]+)")  # a path, white space or a comma, an integer
NO_LABEL = -1
SPLITS = ("train", "val", "test")


class ListError(ValueError):
    """A list of videos that cannot be used; the message names the file and the line and says what to do."""


class Record(NamedTuple):
    """One video of a list: where it is, and its class (None where the list gives none)."""

    path: str
    label: int | None


class VideoList(Sequence):
    """The videos of one list file, read-only.

    Paths and labels are kept in flat buffers. A million Python strings would be copied, page by page, into
    every worker process as soon as their reference counts are touched.
    """

    def __init__(self, *, list_path: str, root: str, paths: list[str], labels: list[int], lines: list[int]):
        encoded = [os.fsencode(path) for path in paths]
        self.list_path = list_path
        self.root = root
        self.labels = np.array(labels, dtype=np.int64)  # NO_LABEL where there is none
        self.lines = np.array(lines, dtype=np.int64)  # where in the file each stands, from 1
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"video {index} of {len(self)}")
        start = self._ends[index - 1] if index > 0 else 0
        path = os.fsdecode(self._paths[start : self._ends[index]])
        label = int(self.labels[index])
        return Record(os.path.join(self.root, path), None if label == NO_LABEL else label)


def read_list(list_path: str | Path, data_root: str | Path | None = None) -> VideoList:
    """Read a list of videos: one a line, `path label`, the label being optional.

    - The label is the last field if that is an integer and something stands before it; white space of any
      kind and length, or a comma, separates the two. -1 means that the label is not known.
    - Everything before it is the path, which may hold spaces and commas. A path whose last word is an integer
      (`clip 3`) is written with its suffix (`clip 3.mp4`) or in double quotes.
    - A path without a dot in its last component gets ".mp4".
    - What looks like a video and something wrong after it (`a.mp4 dancing`) is refused; quotes let it pass.
    - A relative path is looked up in `data_root` if given, else in the folder of the list.
    - Empty lines and lines that begin with # are skipped.

    Raises ListError for a missing, empty or malformed list.
    """
    root = Path(list_path).parent if data_root is None else Path(data_root)
    if not Path(list_path).is_file():
        what = "is a folder" if Path(list_path).is_dir() else "does not exist"
        raise ListError(f"the list of videos {list_path} {what}: set --data_path to a text file of `path label`")
    if not root.is_dir():
        raise ListError(f"the folder of the videos {root} does not exist: set --data_root to it")
    paths, labels, numbers = [], [], []
    with open(list_path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            try:
                path, label = parse_line(line)
            except ValueError as error:
                raise ListError(f"{list_path}, line {number}: {error}") from None
            paths.append(path)
            labels.append(label)
            numbers.append(number)
    if not paths:
        raise ListError(f"the list of videos {list_path} is empty: write one `path label` a line")
    return VideoList(list_path=str(list_path), root=str(root), paths=paths, labels=labels, lines=numbers)


def parse_line(line: str) -> tuple[str, int]:
    """One stripped line of a list -> path as written (with its suffix), label or NO_LABEL; see `read_list`.

    Raises ValueError saying what is wrong with the line.
    """
    labelled = LABELLED.fullmatch(line)
    path, label = (labelled[1], int(labelled[2])) if labelled else (line, NO_LABEL)
    if label < NO_LABEL:
        raise ValueError(f"the label {label} is negative; labels count from 0")
    if len(path) > 1 and path[0] == path[-1] == '"':
        path = path[1:-1]
    else:
        refuse_doubtful_path(path)
    if not path.strip():
        raise ValueError("the path is empty")
    return (path if "." in os.path.basename(path) else path + ".mp4"), label


def refuse_doubtful_path(path: str) -> None:
    """Raise ValueError where a path without quotes more likely is a path and something wrong after it."""
    if "\0" in path:
        raise ValueError("this is no text; --data_path takes a list of videos, not a video")
    more = GOES_ON_AFTER_VIDEO.search(path)
    if more and not ENDS_AS_VIDEO.search(path):
        raise ValueError(
            f'after the video stands "{more["rest"].strip()}", where one integer label may stand; '
            "if it belongs to the path, put the path in double quotes"
        )
    if "," in path and "." not in os.path.basename(path):
        raise ValueError(
            f'"{path}" has a comma but no integer label after it; put # before a heading, '
            "and double quotes around a path that has commas"
        )


def read_splits(
    folder: str | Path,
    *,
    num_classes: int,
    splits: Sequence[str] = SPLITS,
    data_root: str | Path | None = None,
) -> dict[str, VideoList]:
    """The labelled lists of a data set: `folder`/train.csv, val.csv and test.csv, or those named by `splits`.

    Raises ListError for a missing folder or list, and for what `read_list` and `check_labels` refuse.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ListError(f"{folder} {what}: set --data_path to a folder of train.csv, val.csv and test.csv")
    missing = [f"{split}.csv" for split in splits if not (folder / f"{split}.csv").is_file()]
    if missing:
        raise ListError(
            f"{' and '.join(missing)} missing in the folder {folder} (--data_path); "
            "where there is no test set of its own, test.csv is a copy of val.csv"
        )
    lists = {split: read_list(folder / f"{split}.csv", data_root) for split in splits}
    for videos in lists.values():
        check_labels(videos, num_classes)
    return lists


def check_labels(videos: VideoList, num_classes: int) -> None:
    """Raise ListError, naming the first line at fault, unless every video has a label below `num_classes`."""
    wrong = np.flatnonzero((videos.labels < 0) | (videos.labels >= num_classes))
    if len(wrong) == 0:
        return
    label, where = videos.labels[wrong[0]], f"{videos.list_path}, line {videos.lines[wrong[0]]}"
    if label == NO_LABEL:
        raise ListError(
            f"{where}: no label; fine-tuning needs `path label` on every line, 0 to {num_classes - 1} "
            f"({(videos.labels == NO_LABEL).sum()} of {len(videos)} videos have none)"
        )
    raise ListError(
        f"{where}: the label {label} is out of range: there are {num_classes} classes (--nb_classes), "
        f"but the list has labels up to {videos.labels.max()}"
    )


def read_labels(path: str, num_classes: int) -> list[str]:
    """The names of the classes in a file, one a line from class 0 on.

    Raises ListError where it can't be read, or has more or fewer than `num_classes`.
    """
    try:
        names = Path(path).read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"--labels {path} can't be read: {error}") from error
    if len(names) != num_classes:
        raise ListError(
            f"--labels {path} has {len(names)} lines and the model {num_classes} classes: "
            "write one name a line, the first for class 0"
        )
    return [name.strip() for name in names]


def check_readable(
    videos: VideoList, decoder: str = "auto", *, decode_timeout: float = 0, limit: int = 1000
) -> str:
    """Path of the first video, of at most `limit` spread evenly over the list, whose first frame decodes.

    For a look before training starts. decode_timeout: as in `datasets`. Raises ListError with the first reasons
    when none does.
    """
    look = Isolated(partial(_decode_first_frame, decoder=decoder), decode_timeout)
    try:
        return _first_readable(videos, look, limit)
    finally:
        look.stop()


def _decode_first_frame(path: str, *, decoder: str) -> None:
    with open_video(path, decoder) as video:
        video.get_frames([0])


def _first_readable(videos: VideoList, look: Callable[[str], None], limit: int) -> str:
    failures = []
    for index in np.linspace(0, len(videos) - 1, min(len(videos), limit), dtype=int):
        try:
            path = videos[index].path
            look(path)
            return path
        except VideoError as error:
            failures.append(error)
    reasons = "".join(f"\n  {error.path}: {error.reason}" for error in failures[:3])
    raise ListError(
        f"none of {len(failures)} videos tried of {videos.list_path} can be read (relative paths start from "
        f"{videos.root}; --data_root changes that). The first:{reasons}"
    )
