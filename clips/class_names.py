"""The classes of lists: their names, where those come from, the numbers they give, and what labels are valid."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clips.lists import NO_LABEL, ListError, VideoList


class ClassNames(NamedTuple):
    """The names of classes, by number, () where only numbers are known; and where they come from, for messages."""

    names: tuple[str, ...] = ()
    source: str = ""

    def check_count(self, num_classes: int) -> None:
        """Checks that there is a name for each of `num_classes` classes.

        Raises:
            ListError: there are more or fewer.
        """
        if len(self.names) != num_classes:
            raise ListError(
                f"{self.source} has {len(self.names)} class names for {num_classes} classes: give a file --labels with "
                "one name a line, from class 0, or as many classes as there are names"
            )

    def number(self, videos: VideoList) -> None:
        """Gives the videos of a list the numbers of their classes, in place.

        Raises:
            ListError: names the first line with an unknown class, and the known name that is nearest to it.
        """
        place = {name: number for number, name in enumerate(self.names)}
        if len(place) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ListError(f'{self.source} has the class name "{twice}" twice, so a list can\'t be numbered by it')
        ours = np.array([place.get(name, NO_LABEL) for name in videos.class_names], np.int64)
        known = videos.labels != NO_LABEL
        unknown = np.flatnonzero(known & (ours[videos.labels] == NO_LABEL))
        if len(unknown):
            name = videos.class_names[videos.labels[unknown[0]]]
            (nearest,) = get_close_matches(name, self.names, n=1, cutoff=0)
            raise ListError(
                f'{videos.list_path}, line {videos.lines[unknown[0]]}: {self.source} has no class "{name}"; the '
                f'nearest is "{nearest}"'
            )
        videos.labels, videos.class_names = np.where(known, ours[videos.labels], NO_LABEL), self.names


def number_lists(
    lists: Mapping[str, VideoList],
    *,
    labels: str | None = None,
    trained: ClassNames = ClassNames(),  # noqa: B008
) -> ClassNames:
    """Numbers the classes of a run's lists; returns the names that it goes by.

    They are those of the file --labels, else those of the checkpoint to test, else those of the training list, sorted.
    --labels may replace the names of a checkpoint, but where lists have names it may not renumber them.

    Args:
        labels: the file --labels.
        trained: those of the checkpoint that is tested.

    Raises:
        ListError: a list has names and another numbers, or a name is unknown or differs in its number.
    """
    given = read_labels(labels) if labels else trained
    named = [videos for videos in lists.values() if videos.class_names]
    if not named:
        return given
    if not given.names and "train" not in lists:
        raise ListError(f"{named[0].list_path} has class names and the checkpoint has none: set --labels")
    if plain := [videos for videos in lists.values() if not videos.class_names]:
        raise ListError(f"{plain[0].list_path} has no class names, and {named[0].list_path} has: write names in all")
    if not given.names:
        given = ClassNames(lists["train"].class_names, f"the training list {lists['train'].list_path}")
    if labels:
        check_same_numbers(given, trained)
    for videos in named:
        given.number(videos)
    return given


def check_classes(lists: Mapping[str, VideoList], names: ClassNames, num_classes: int) -> None:
    """Checks that every video has a label below `num_classes`, and every class a name if any has.

    Raises:
        ListError: as `check_labels` and `ClassNames.check_count`.
    """
    if names.names:
        names.check_count(num_classes)
    for videos in lists.values():
        check_labels(videos, num_classes)


def check_labels(videos: VideoList, num_classes: int) -> None:
    """Checks that every video has a label below `num_classes`.

    Raises:
        ListError: names the first line at fault.
    """
    wrong = np.flatnonzero((videos.labels < 0) | (videos.labels >= num_classes))
    if len(wrong) == 0:
        return
    label, where = videos.labels[wrong[0]], f"{videos.list_path}, line {videos.lines[wrong[0]]}"
    if label == NO_LABEL:
        raise ListError(
            f"{where}: no label; fine-tuning needs `path label` on every line, 0 to {num_classes - 1}, or a class "
            f"name ({(videos.labels == NO_LABEL).sum()} of {len(videos)} videos have none)"
        )
    raise ListError(
        f"{where}: the label {label} is out of range: there are {num_classes} classes (--nb_classes), "
        f"but the list has labels up to {videos.labels.max()}"
    )


def warn_of_empty_classes(lists: Mapping[str, VideoList], num_classes: int, warn: Callable[[str], None]) -> None:
    """In a data set of one's own, more classes than labels are more often a mistake than intended."""
    found = len(np.unique(np.concatenate([videos.labels for videos in lists.values()])))
    if found < num_classes:
        warn(f"--nb_classes or --labels gives {num_classes} classes, but the lists contain only {found} classes")


def check_same_numbers(given: ClassNames, trained: ClassNames) -> None:
    """Checks that no class has another number than in a checkpoint.

    Raises:
        ListError: names the class and both numbers.
    """
    for number, name in enumerate(given.names):
        if name in trained.names and trained.names.index(name) != number:
            raise ListError(
                f'{given.source} has "{name}" as class {number}, {trained.source} as class '
                f"{trained.names.index(name)}: leave out --labels"
            )


def names_beside(folder: str, num_classes: int | None) -> ClassNames:
    """Those in labels.txt beside the lists, which tools/prepare_videos.py writes, if as many as there are classes."""
    file = Path(folder) / "labels.txt"
    names = read_labels(str(file)) if file.is_file() else ClassNames()
    return names if num_classes in (None, len(names.names)) else ClassNames()


def read_labels(path: str, num_classes: int | None = None) -> ClassNames:
    """Reads the names of the classes, of `num_classes` if given, from a file, one a line from class 0 on.

    Raises:
        ListError: the file can't be read, or has more or fewer lines.
    """
    try:
        names = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"--labels {path} can't be read: {error}") from error
    found = ClassNames(tuple(name.strip() for name in names), f"--labels {path}")
    if num_classes is not None:
        found.check_count(num_classes)
    return found
