"""Reads the official annotation files of the published data sets.

A reader takes the folder of the annotation files, the number of the split (UCF101 and HMDB51 have three) and
whether the test list is the official test set; if not, it is a copy of val, on which papers report results.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import NamedTuple

from clips.lists import parse_line
from utils import SettingError


class AnnotationError(SettingError):
    """Annotations that can't be used; the message names the file and says what to do."""


class Entry(NamedTuple):
    """One annotated video: the last parts of its path, without suffix (`wave/clip 1`), and its class."""

    name: str
    label: int


class Annotations(NamedTuple):
    """The names of the classes, in the order of their labels, and the videos of train, val and test."""

    classes: list[str]
    splits: dict[str, list[Entry]]


def read_ssv2(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """Something-Something V2: labels.json, train.json, validation.json, and test-answers.csv for the test set.

    File names may start with `something-something-v2-`. Labels are those of labels.json.

    Raises:
        AnnotationError: a file is missing or malformed, or names an unknown class.
    """

    def find(name: str) -> Path:
        return find_file(folder, f"something-something-v2-{name}", name)

    def entries(file: Path) -> list[Entry]:
        with malformed(file):
            if file.suffix == ".json":
                rows = [(item["id"], item["template"]) for item in json.loads(file.read_text("utf-8"))]
            else:
                rows = [line.split(";", 1) for line in text_lines(file)]
            for video, template in rows:
                if plain(template) not in labels:
                    raise AnnotationError(f"{file}: video {video}: the class {template!r} is not in {labels_file}")
            return [Entry(str(video), labels[plain(template)]) for video, template in rows]

    labels_file = find("labels.json")
    with malformed(labels_file):
        labels = {plain(name): int(label) for name, label in json.loads(labels_file.read_text("utf-8")).items()}
    if sorted(labels.values()) != list(range(len(labels))):
        raise AnnotationError(f"{labels_file}: the labels are not 0 to {len(labels) - 1}, each once")
    splits = {"train": entries(find("train.json")), "val": entries(find("validation.json"))}
    splits["test"] = entries(find("test-answers.csv")) if official_test else splits["val"]
    return Annotations(sorted(labels, key=labels.get), splits)


def plain(template: str) -> str:
    """`Pushing [something] off` -> `Pushing something off`."""
    return template.replace("[", "").replace("]", "")


KINETICS_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}


def read_kinetics(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """Kinetics-400, -600 and -700: every .csv file with columns label, youtube_id, time_start, time_end, split.

    Videos are named {youtube_id}_{start:06d}_{end:06d}. Labels number the training classes alphabetically.

    Raises:
        AnnotationError: there are no training videos, a file is malformed, or a class is not in train.
    """
    rows = defaultdict(dict)  # split -> name -> class; a dict, since a video may be listed in two files
    for file in sorted(folder.glob("*.csv")):
        with malformed(file), file.open(encoding="utf-8-sig", newline="") as f:
            table = csv.DictReader(f)
            if not set(table.fieldnames or ()) >= {"youtube_id", "time_start", "time_end", "split"}:
                continue
            for row in table:
                if row["split"] not in KINETICS_SPLITS:
                    raise AnnotationError(f"{file}, line {table.line_num}: the split is {row['split']!r}")
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
                name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
                rows[KINETICS_SPLITS[row["split"]]][name] = row.get("label")
    if not rows["train"]:
        raise AnnotationError(f"{folder} has no .csv file with training videos of Kinetics (train.csv)")
    numbers = {name: number for number, name in enumerate(sorted(set(rows["train"].values())))}
    splits = {}
    for name in ("train", "val", "test") if official_test else ("train", "val"):
        unknown = set(rows[name].values()) - numbers.keys()
        if unknown:
            raise AnnotationError(f"{folder}: {name} has videos of the class {unknown.pop()!r}, train has none")
        splits[name] = [Entry(video, numbers[label]) for video, label in rows[name].items()]
    splits.setdefault("test", splits["val"])
    return Annotations(list(numbers), splits)


def read_ucf101(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """UCF101: classInd.txt, trainlist0{split}.txt and testlist0{split}.txt; val and test are both the latter.

    Raises:
        AnnotationError: a file is missing or malformed, or names an unknown class.
    """
    refuse_official_test("UCF101", official_test)
    index = find_file(folder, "classInd.txt")
    with malformed(index):
        numbers = {name: int(number) - 1 for number, name in (line.split() for line in text_lines(index))}

    def entries(file: Path) -> Iterator[Entry]:
        for line in text_lines(file):
            video = line.rsplit(" ", 1)[0] if re.search(r" [0-9]+$", line) else line
            name = PurePath(video).with_suffix("")
            if name.parent.name not in numbers:
                raise AnnotationError(f"{file}: {line}: the class is not in {index}")
            yield Entry(name.as_posix(), numbers[name.parent.name])

    train, test = (list(entries(find_file(folder, f"{part}list{split:02d}.txt"))) for part in ("train", "test"))
    return Annotations(sorted(numbers, key=numbers.get), {"train": train, "val": test, "test": test})


def read_hmdb51(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """HMDB51: {class}_test_split{split}.txt, with 1 for train, 2 for test, 0 for neither; val is a copy of test.

    Raises:
        AnnotationError: there are no such files, or one is malformed.
    """
    refuse_official_test("HMDB51", official_test)
    ending = f"_test_split{split}.txt"
    files = {file.name.removesuffix(ending): file for file in folder.rglob(f"*{ending}")}
    if not files:
        raise AnnotationError(f"{folder} has no files *{ending}")
    parts = {"0": [], "1": [], "2": []}
    for label, name in enumerate(sorted(files)):
        for line in text_lines(files[name]):
            video, _, part = line.rpartition(" ")
            if part not in parts:
                raise AnnotationError(f"{files[name]}: {line!r} does not end in 0, 1 or 2")
            parts[part].append(Entry(f"{name}/{PurePath(video).stem}", label))
    return Annotations(sorted(files), {"train": parts["1"], "val": parts["2"], "test": parts["2"]})


def read_kinetics710(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """Kinetics-710 (UniFormerV2): train.csv and val.csv of `path label`, and the class names, one a line.

    The classes of Kinetics-400, -600 and -700 are merged there, and so are their lists. Lines are as in the lists that
    training reads: a path, white space or a comma, a number from 0. Of the path the name of the file counts, with or
    without a suffix. The names are in label_map_k710.txt or labels.txt.

    Raises:
        AnnotationError: a file is missing or malformed, or a label has no name.
    """
    refuse_official_test("Kinetics-710", official_test)
    names = find_file(folder, "label_map_k710.txt", "labels.txt")
    classes = list(text_lines(names))

    def entries(file: Path) -> list[Entry]:
        found = {}  # a video may be in several of the merged data sets
        for number, line in enumerate(text_lines(file), start=1):
            with malformed(file):
                path, label = parse_line(line)
            if not 0 <= label < len(classes):
                raise AnnotationError(
                    f"{file}, line {number}: the label {label} is none of the {len(classes)} in {names}"
                )
            found.setdefault(PurePath(path).stem, label)
        return [Entry(*entry) for entry in found.items()]

    train, val = (entries(find_file(folder, f"{part}.csv")) for part in ("train", "val"))
    return Annotations(classes, {"train": train, "val": val, "test": val})


def read_diving48(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """Diving48: Diving48_V2_train.json, Diving48_V2_test.json, which is val and test, and Diving48_vocab.json.

    A list holds {"vid_name", "label", "start_frame", "end_frame"}. The frames span the published video, which is of one
    dive, so they are not read. The vocabulary is a list of four words for each class.

    Raises:
        AnnotationError: a file is missing or malformed, or a label is not in the vocabulary.
    """
    refuse_official_test("Diving48", official_test)
    vocabulary = find_file(folder, "Diving48_vocab.json")
    with malformed(vocabulary):
        classes = ["/".join(words) for words in json.loads(vocabulary.read_text("utf-8"))]

    def entries(file: Path) -> list[Entry]:
        with malformed(file):
            found = [Entry(str(item["vid_name"]), int(item["label"])) for item in json.loads(file.read_text("utf-8"))]
        for video, label in found:
            if not 0 <= label < len(classes):
                raise AnnotationError(f"{file}: video {video}: the label {label} is not in {vocabulary}")
        return found

    train, test = (entries(find_file(folder, f"Diving48_V2_{part}.json")) for part in ("train", "test"))
    return Annotations(classes, {"train": train, "val": test, "test": test})


def read_jester(folder: Path, *, split: int, official_test: bool) -> Annotations:
    """Jester: train.csv and validation.csv of `id;class`, and labels.csv, a class name a line, in the order of labels.

    File names may start with `jester-v1-`. The official test set is published without labels.

    Raises:
        AnnotationError: a file is missing or malformed, or names an unknown class.
    """
    refuse_official_test("Jester", official_test)

    def find(name: str) -> Path:
        return find_file(folder, f"jester-v1-{name}.csv", f"{name}.csv")

    names = find("labels")
    labels = {name: label for label, name in enumerate(text_lines(names))}

    def entries(file: Path) -> Iterator[Entry]:
        for line in text_lines(file):
            video, _, name = line.partition(";")
            if name not in labels:
                raise AnnotationError(f"{file}: video {video}: the class {name!r} is not in {names}")
            yield Entry(video, labels[name])

    train, val = (list(entries(find(part))) for part in ("train", "validation"))
    return Annotations(list(labels), {"train": train, "val": val, "test": val})


def refuse_official_test(data_set: str, official_test: bool) -> None:
    if official_test:
        raise AnnotationError(f"--official_test: {data_set} has no labelled test set other than the one used as val")


READERS = {
    "SSV2": read_ssv2,
    **dict.fromkeys(("Kinetics-400", "Kinetics-600", "Kinetics-700"), read_kinetics),
    "UCF101": read_ucf101,
    "HMDB51": read_hmdb51,
    "Kinetics-710": read_kinetics710,
    "Diving48": read_diving48,
    "Jester": read_jester,
}


@contextmanager
def malformed(file: Path) -> Iterator[None]:
    """Turns the errors that parsing a malformed file causes into an AnnotationError that names the file."""
    try:
        yield
    except AnnotationError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise AnnotationError(f"{file} is not in the official format: {type(error).__name__}: {error}") from error


def find_file(folder: Path, *names: str) -> Path:
    """The file in or below a folder with the first of the names that is there.

    Raises:
        AnnotationError: there is no such file, or several with the same name.
    """
    for name in names:
        files = [folder / name] if (folder / name).is_file() else sorted(folder.rglob(name))
        if len(files) > 1:
            raise AnnotationError(f"{files[0]} and {files[1]}: set --annotations to the folder of one of them")
        if files:
            return files[0]
    raise AnnotationError(f"{' or '.join(names)} is missing in the folder of the annotations {folder}")


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a text file that are not empty, stripped."""
    with malformed(file):
        text = file.read_text("utf-8-sig")
    return (line.strip() for line in text.splitlines() if line.strip())
