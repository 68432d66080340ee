"""Lists of videos from the annotation files of the published data sets, or from folders named as classes.

    annotations = READERS["SSV2"](Path("labels"), split=1, official_test=False)
    found = match(annotations, find_videos(Path("ssv2")))
    write_lists(Path("ssv2"), found, annotations.classes)

Annotations name a video; where it lies below the folder, and with which suffix, does not matter.
"""

import csv
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from clips.lists import NO_LABEL, SPLITS, parse_line


class AnnotationError(ValueError):
    """Annotations that cannot be used; the message names the file and says what to do."""


class Entry(NamedTuple):
    """One annotated video: the last parts of its path, without suffix (`wave/clip 1`), and its class."""

    name: str
    label: int


class Annotations(NamedTuple):
    """The class names in the order of their labels, and the videos of train, val and, often, test."""

    classes: list[str]
    splits: dict[str, list[Entry]]


class Found(NamedTuple):
    """Which annotated videos are there.

    listed: for each split the (path, label) of those found. missing: (split, name) of the others.
    doubtful: (split, name) of those found more than once; the first is listed.
    """

    listed: dict[str, list[tuple[PurePath, int]]]
    missing: list[tuple[str, str]]
    doubtful: list[tuple[str, str]]


# --- the formats --------------------------------------------------------------------------------------------
# Every reader takes the folder of the annotation files, the number of the split (UCF101, HMDB51) and whether
# the test list is the official test set. If not it is a copy of val, which is what the papers report on.


def read_ssv2(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """Something-Something V2: labels.json, train.json, validation.json, and for the test test-answers.csv.

    With or without `something-something-v2-` before the names. Labels are those of labels.json.
    """

    def find(name):
        return find_file(folder, f"something-something-v2-{name}", name)

    labels_file = find("labels.json")
    labels = {plain(name): int(label) for name, label in json.loads(labels_file.read_text("utf-8")).items()}
    if sorted(labels.values()) != list(range(len(labels))):
        raise AnnotationError(f"{labels_file}: the labels are not 0 to {len(labels) - 1}, each once")

    def entries(file, rows):
        for video, template in rows:
            if plain(template) not in labels:
                raise AnnotationError(f"{file}: video {video}: the class {template!r} is not in {labels_file}")
            yield Entry(str(video), labels[plain(template)])

    splits = {}
    for name, part in (("train", "train.json"), ("val", "validation.json")):
        file = find(part)
        rows = ((item["id"], item["template"]) for item in json.loads(file.read_text("utf-8")))
        splits[name] = list(entries(file, rows))
    splits["test"] = splits["val"]
    if official_test:
        file = find("test-answers.csv")
        rows = (line.split(";", 1) for line in text_lines(file))
        splits["test"] = list(entries(file, rows))
    return Annotations(sorted(labels, key=labels.get), splits)


def plain(template: str) -> str:
    """`Pushing [something] off` -> `Pushing something off`."""
    return template.replace("[", "").replace("]", "")


KINETICS_COLUMNS = {"youtube_id", "time_start", "time_end", "split"}
KINETICS_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}


def read_kinetics(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """Kinetics-400, -600 and -700: every .csv file with columns label, youtube_id, time_start, time_end, split.

    Videos are called {youtube_id}_{start:06d}_{end:06d}. Labels number the training classes alphabetically.
    """
    rows = defaultdict(dict)  # split -> name -> class; a video may stand in two files
    for file in sorted(folder.glob("*.csv")):
        with file.open(encoding="utf-8-sig", newline="") as f:
            table = csv.DictReader(f)
            if not set(table.fieldnames or ()) >= KINETICS_COLUMNS:
                continue
            for row in table:
                if row["split"] not in KINETICS_SPLITS:
                    raise AnnotationError(f"{file}, line {table.line_num}: the split is {row['split']!r}")
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
                name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
                rows[KINETICS_SPLITS[row["split"]]][name] = row.get("label")
    if not rows["train"]:
        raise AnnotationError(f"{folder} holds no .csv file with training videos of Kinetics (train.csv)")
    classes = sorted(set(rows["train"].values()))
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {}
    for name in ("train", "val", "test") if official_test else ("train", "val"):
        unknown = set(rows[name].values()) - set(classes)
        if unknown:
            raise AnnotationError(f"{folder}: {name} videos of the class {unknown.pop()!r}, which train has not")
        splits[name] = [Entry(video, numbers[label]) for video, label in rows[name].items()]
    splits.setdefault("test", splits["val"])
    return Annotations(classes, splits)


def read_ucf101(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """UCF101: classInd.txt, trainlist0{split}.txt and testlist0{split}.txt; val and test are both the latter."""
    refuse_official_test("UCF101", official_test)
    index = find_file(folder, "classInd.txt")
    numbers = {name: int(number) - 1 for number, name in (line.split() for line in text_lines(index))}

    def entries(file):
        for line in text_lines(file):
            video = line.rsplit(" ", 1)[0] if re.search(r" [0-9]+$", line) else line
            name = PurePath(video).with_suffix("")
            if name.parent.name not in numbers:
                raise AnnotationError(f"{file}: {line}: the class is not in {index}")
            yield Entry(name.as_posix(), numbers[name.parent.name])

    train = list(entries(find_file(folder, f"trainlist{split:02d}.txt")))
    test = list(entries(find_file(folder, f"testlist{split:02d}.txt")))
    return Annotations(sorted(numbers, key=numbers.get), {"train": train, "val": test, "test": test})


def read_hmdb51(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """HMDB51: {class}_test_split{split}.txt, 1 for train, 2 for test, 0 for neither; val and test are alike."""
    refuse_official_test("HMDB51", official_test)
    ending = f"_test_split{split}.txt"
    files = {file.name.removesuffix(ending): file for file in folder.rglob(f"*{ending}")}
    if not files:
        raise AnnotationError(f"{folder} holds no files *{ending}")
    parts = {"0": [], "1": [], "2": []}
    for label, name in enumerate(sorted(files)):
        for line in text_lines(files[name]):
            video, _, part = line.rpartition(" ")
            if part not in parts:
                raise AnnotationError(f"{files[name]}: {line!r} does not end in 0, 1 or 2")
            parts[part].append(Entry(f"{name}/{PurePath(video).stem}", label))
    return Annotations(sorted(files), {"train": parts["1"], "val": parts["2"], "test": parts["2"]})


READERS = {
    "SSV2": read_ssv2,
    "Kinetics-400": read_kinetics,
    "Kinetics-600": read_kinetics,
    "Kinetics-700": read_kinetics,
    "UCF101": read_ucf101,
    "HMDB51": read_hmdb51,
}


def refuse_official_test(data_set: str, official_test: bool) -> None:
    if official_test:
        raise AnnotationError(f"--official_test: {data_set} has no test set beside the one that val is, too")


def find_file(folder: Path, *names: str) -> Path:
    """The only file in or below a folder that has one of the names, the first name that there is.

    Raises AnnotationError where there is none, or more than one of a name.
    """
    for name in names:
        files = [folder / name] if (folder / name).is_file() else sorted(folder.rglob(name))
        if len(files) > 1:
            raise AnnotationError(f"{files[0]} and {files[1]}: name the folder of one of them")
        if files:
            return files[0]
    raise AnnotationError(f"{' or '.join(names)} is missing in the folder of the annotations {folder}")


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a text file that are not empty, stripped."""
    return (line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())


# --- folders named as classes -------------------------------------------------------------------------------

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_class_folders(
    videos: Iterable[PurePath], *, val_fraction: float
) -> tuple[Found, list[str], list[PurePath]]:
    """Paths `class/.../x.mp4`, or `train/class/.../x.mp4` -> lists, class names, paths left out.

    Classes are numbered alphabetically. Where there is neither a folder val nor one test, val gets
    `val_fraction` of each class, the same videos in whatever order they were found. Of val and test, the one
    that is not there is a copy of the other. Left out are paths without a class, and with folders for splits
    those in other folders.
    """
    videos = list(videos)
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
    drawn = {split for split, _ in members} == {"train"}
    listed = defaultdict(list)
    for (split, name), paths in members.items():
        paths.sort(key=lambda path: (zlib.crc32(os.fsencode(path.as_posix())), path))
        held_out = round(len(paths) * val_fraction) if drawn else 0
        label = classes.index(name)
        listed[split] += [(path, label) for path in paths[held_out:]]
        listed["val"] += [(path, label) for path in paths[:held_out]]
    listed["val"] = listed["val"] or listed["test"]
    listed["test"] = listed["test"] or listed["val"]
    return Found({split: sorted(listed[split]) for split in SPLITS}, [], []), classes, left_out


# --- videos on the disk -------------------------------------------------------------------------------------


def match(annotations: Annotations, videos: Iterable[PurePath]) -> Found:
    """Find each annotated video among paths by the last parts of its path, without suffix.

    Of more than one, the one in a folder of the split's name comes first.
    """
    by_stem = defaultdict(list)
    for path in videos:
        by_stem[path.stem].append(path)
    found = Found({}, [], [])
    for split, entries in annotations.splits.items():
        found.listed[split] = []
        for name, label in entries:
            parts = PurePath(name).parts
            paths = [path for path in by_stem.get(parts[-1], ()) if ends_with(path.parts[:-1], parts[:-1])]
            if len(paths) > 1:
                paths.sort(key=lambda path: split not in [SPLIT_FOLDERS.get(part) for part in path.parts])
                found.doubtful.append((split, name))
            if paths:
                found.listed[split].append((paths[0], label))
            else:
                found.missing.append((split, name))
    return found


def ends_with(parts: tuple[str, ...], end: tuple[str, ...]) -> bool:
    return parts[len(parts) - len(end) :] == end


# --- writing ------------------------------------------------------------------------------------------------


def format_line(path: PurePath, label: int) -> str:
    """A line that `parse_line` reads as this path and label, in quotes where it must be.

    Raises AnnotationError for a path that no line can hold.
    """
    number = "" if label == NO_LABEL else f" {label}"
    for line in (f"{path.as_posix()}{number}", f'"{path.as_posix()}"{number}'):
        try:
            whole = line == line.strip() and len(line.splitlines()) == 1 and not line.startswith("#")
            if whole and parse_line(line) == (path.as_posix(), label):
                return line
        except ValueError:
            continue
    raise AnnotationError(f"{str(path)!r} can't stand in a list of videos: rename it")


def write_text(file: Path, lines: Iterable[str]) -> None:
    """Write lines so that the file stands under its name whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape") as f:
            f.writelines(f"{line}\n" for line in lines)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_lists(folder: Path, found: Found, classes: list[str] | None) -> None:
    """Write a list for each split, as train.csv, and labels.txt where there are classes; paths are below `folder`.

    A split of which no video was found gets no list.
    """
    for split, videos in found.listed.items():
        if videos:
            write_text(folder / f"{split}.csv", (format_line(path, label) for path, label in videos))
    if classes:
        write_text(folder / "labels.txt", classes)
