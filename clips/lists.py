"""Videos in lists and folders: finding them, reading lists, checking them before training starts."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from clips.isolation import Isolated
from clips.video import open_video
from clips.video_index import VideoError
from utils import SettingError

SUFFIXES = "mp4|webm|avi|mkv|mov|m4v|mpg|mpeg|wmv|flv|3gp"
ENDS_AS_VIDEO = re.compile(rf"\.({SUFFIXES})$", re.IGNORECASE)
GOES_ON_AFTER_VIDEO = re.compile(rf"\.({SUFFIXES})(?P<rest>[\s,].*)$", re.IGNORECASE)
LABELLED = re.compile(r"(.*[^\s,])[\s,]+(-?[0-9]+)")  # a path, white space or a comma, an integer
NAMED = re.compile(rf'("[^"]+"|(?!").*\.(?:{SUFFIXES}))[\s,]+(.+)', re.IGNORECASE)  # a path, ..., perhaps a class name
NO_LABEL = -1
SPLITS = ("train", "val", "test")


class ListError(SettingError):
    """A list of videos that cannot be used; the message names the file and the line."""


class Record(NamedTuple):
    """One video of a list: its path, and its class (None where the list gives none)."""

    path: str
    label: int | None


class VideoList(Sequence):
    """The videos of one list file, read-only.

    Paths and labels are kept in flat buffers: touching the reference counts of a million Python strings would copy
    their pages into every worker process.

    Attributes:
        class_names: what the labels count, where the list names its classes: its own names, sorted, until
            `ClassNames.number` has put those of the run in their place. () where it has integers.
    """

    def __init__(
        self,
        *,
        list_path: str,
        root: str,
        paths: Sequence[str],
        labels: Sequence[int],
        lines: Sequence[int],
        class_names: Sequence[str] = (),
    ):
        encoded = [os.fsencode(path) for path in paths]
        self.list_path, self.root, self.class_names = list_path, root, tuple(class_names)
        self.labels = np.array(labels, dtype=np.int64)  # NO_LABEL where there is none
        self.lines = np.array(lines, dtype=np.int64)  # the line of the file, from 1
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"video {index} of {len(self)}")
        path = os.path.join(self.root, self._path(index))
        return Record(path, None if self.labels[index] == NO_LABEL else int(self.labels[index]))

    def _path(self, index: int) -> str:
        start = self._ends[index - 1] if index > 0 else 0
        return os.fsdecode(self._paths[start : self._ends[index]])

    def subset(self, indices: Sequence[int]) -> "VideoList":
        """The videos at these places of the list, in this order."""
        paths = [self._path(index) for index in indices]
        place = {"list_path": self.list_path, "root": self.root}
        labels, lines = self.labels[indices], self.lines[indices]
        return VideoList(**place, paths=paths, labels=labels, lines=lines, class_names=self.class_names)


def read_list(list_path: str | Path, data_root: str | Path | None = None) -> VideoList:
    """Reads a list of videos: one a line, `path label` or `path,class name`, the label being optional.

    - The label is the last field if that is an integer with something before it; white space of any kind and
      length, or a comma, separates the two. -1 means that the label is not known.
    - Everything before it is the path, which may hold spaces and commas. A path whose last word is an integer
      (`clip 3`) is written with its suffix (`clip 3.mp4`) or in double quotes.
    - A path without a dot in its last component gets ".mp4".
    - Behind a path with the suffix of a video, or in double quotes, anything with a letter in it is the name of a
      class (`a.mp4,level 2`), and so is anything in double quotes that is no integer. A list has either names or
      integers.
    - Empty lines and lines that begin with # are skipped.

    Args:
        data_root: folder that relative paths start from; by default the folder of the list.

    Raises:
        ListError: the list is missing, empty or malformed.
    """
    root = Path(list_path).parent if data_root is None else Path(data_root)
    if not Path(list_path).is_file():
        what = "is a folder" if Path(list_path).is_dir() else "does not exist"
        flag = "--data_path, or the flag that names it,"
        raise ListError(f"the list of videos {list_path} {what}: set {flag} to a text file of `path label`")
    if not root.is_dir():
        raise ListError(f"the folder of the videos {root} does not exist: set --data_root to it")
    rows = []
    with open(list_path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            try:
                rows.append((*parse_line(line), number))
            except ValueError as error:
                raise ListError(f"{list_path}, line {number}: {error}") from None
    if not rows:
        raise ListError(f"the list of videos {list_path} is empty: write one `path label` a line")
    paths, labels, numbers = zip(*rows)
    names = sorted({label for label in labels if isinstance(label, str)})
    if names:
        labels = number_names(labels, names, numbers, list_path)
    about = {"list_path": str(list_path), "root": str(root), "class_names": names}
    return VideoList(paths=paths, labels=labels, lines=numbers, **about)


def number_names(
    labels: Sequence[int | str], names: list[str], lines: Sequence[int], list_path: str | Path
) -> list[int]:
    """Replaces class names by their places in `names`.

    Raises:
        ListError: there are integers too; names the first line that is unlike those before it.
    """
    known = [(label, line) for label, line in zip(labels, lines, strict=True) if label != NO_LABEL]
    for label, line in known:
        if isinstance(label, str) != isinstance(known[0][0], str):
            raise ListError(
                f"{list_path}, line {line}: the label {label!r}, where line {known[0][1]} has {known[0][0]!r}: write "
                "either class names or integers on every line"
            )
    place = {name: number for number, name in enumerate(names)}
    return [place[label] if isinstance(label, str) else NO_LABEL for label in labels]


def parse_line(line: str) -> tuple[str, int | str]:
    """Parses one stripped line (see `read_list`) into a path with suffix and a label, class name or NO_LABEL.

    Raises:
        ValueError: the line is malformed.
    """
    path, label = split_label(line)
    if isinstance(label, int) and label < NO_LABEL:
        raise ValueError(f"the label {label} is negative; labels count from 0")
    if len(path) > 1 and path[0] == path[-1] == '"':
        path = path[1:-1]
    else:
        refuse_doubtful_path(path)
    if not path.strip():
        raise ValueError("the path is empty")
    return (path if "." in os.path.basename(path) else path + ".mp4"), label


def split_label(line: str) -> tuple[str, int | str]:
    """Splits a stripped line into what stands for the path and the label, class name or NO_LABEL.

    Raises:
        ValueError: the class name is no UTF-8.
    """
    named = None if ENDS_AS_VIDEO.search(line) else NAMED.fullmatch(line)
    if named:
        path, text = named.groups()
        quoted = len(text) > 2 and text[0] == text[-1] == '"'
        name = text[1:-1].replace('""', '"').strip() if quoted else text  # as CSV files write them
        if re.fullmatch("-?[0-9]+", name):
            return path, int(name)
        if name and (quoted or any(character.isalpha() for character in name)):
            if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in name):
                raise ValueError(f"the class name {name!a} is not UTF-8: save the list as UTF-8")
            return path, name
    labelled = LABELLED.fullmatch(line)
    return (labelled[1], int(labelled[2])) if labelled else (line, NO_LABEL)


def refuse_doubtful_path(path: str) -> None:
    """Refuses a path without quotes that probably is a path with something wrong after it.

    Raises:
        ValueError: says what to change.
    """
    if "\0" in path:
        raise ValueError("this is not text; give a list of videos, not a video")
    more = GOES_ON_AFTER_VIDEO.search(path)
    if more and not ENDS_AS_VIDEO.search(path):
        raise ValueError(
            f'the video is followed by "{more["rest"].strip()}" instead of one integer label or class name; '
            "if that belongs to the path, put the path in double quotes"
        )
    if "," in path and "." not in os.path.basename(path):
        raise ValueError(
            f'"{path}" has a comma but no integer label after it; put # before a heading, and double quotes around '
            "a path that has commas, or that has no suffix and a class name after it"
        )


def find_videos(root: Path, *, skip: Path | None = None) -> list[PurePath]:
    """Finds the videos below a folder, following links: sorted paths relative to `root`.

    Hidden files and folders, and the folder `skip`, are left out.
    """
    videos, seen = [], set()
    for folder, names, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen or (skip is not None and here == os.path.realpath(skip)):
            names.clear()
            continue
        seen.add(here)
        names[:] = sorted(name for name in names if not name.startswith("."))
        below = PurePath(os.path.relpath(folder, root))
        videos += [below / name for name in files if ENDS_AS_VIDEO.search(name) and not name.startswith(".")]
    return sorted(videos)


def read_splits(
    folder: str | Path, *, splits: Sequence[str] = SPLITS, data_root: str | Path | None = None
) -> dict[str, VideoList]:
    """Reads the lists of a data set: train.csv, val.csv and test.csv, or those named by `splits`.

    Raises:
        ListError: the folder or a list is missing, or `read_list` refuses one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ListError(f"{folder} {what}: set --data_path to a folder of train.csv, val.csv and test.csv")
    missing = [f"{split}.csv" for split in splits if not (folder / f"{split}.csv").is_file()]
    if missing:
        raise ListError(
            f"{' and '.join(missing)} missing in the folder {folder} (--data_path); "
            "without a separate test set, test.csv is a copy of val.csv"
        )
    return {split: read_list(folder / f"{split}.csv", data_root) for split in splits}


def draw_fraction(videos: VideoList, fraction: float, seed: int) -> VideoList:
    """Draws a fraction of the videos of each class, rounded, but at least one; they stay in the list's order.

    Which ones depends on the list, the seed and the class alone, and those of a smaller fraction are among those of a
    larger one.
    """
    chosen = []
    for label in np.unique(videos.labels):
        members = np.flatnonzero(videos.labels == label)
        order = np.random.default_rng([seed, label]).permutation(members)
        chosen.append(order[: max(1, round(fraction * len(members)))])
    return videos.subset(np.sort(np.concatenate(chosen)))


def check_readable(videos: VideoList, decoder: str = "auto", *, decode_timeout: float = 0, limit: int = 1000) -> str:
    """Returns the path of a video whose first frame decodes, of at most `limit` spread evenly over the list.

    Args:
        decode_timeout: seconds, see `ClipSettings`.

    Raises:
        ListError: there is none; with the first three reasons.
    """

    def decode_first_frame(path: str) -> None:
        with open_video(path, decoder) as video:
            video.get_frames([0])

    look, failures = Isolated(decode_first_frame, decode_timeout), []
    try:
        for index in np.linspace(0, len(videos) - 1, min(len(videos), limit), dtype=int):
            try:
                look(videos[index].path)
                return videos[index].path
            except VideoError as error:
                failures.append(error)
    finally:
        look.stop()
    reasons = "".join(f"\n  {error.path}: {error.reason}" for error in failures[:3])
    raise ListError(
        f"none of {len(failures)} videos tried of {videos.list_path} can be read (relative paths start from "
        f"{videos.root}; --data_root changes that). The first errors:{reasons}"
    )
