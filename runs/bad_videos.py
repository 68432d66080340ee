"""The record of unreadable videos: each one once in bad_videos.csv, and the limit at which a run stops.

bad = BadVideos(output_dir=..., num_videos=len(videos), limit=0.01, is_main=world.is_main)
bad.add(batch["bad"])      # every batch: local and cheap
if sum_of_pending:         # now and then, where the ranks meet anyway: bad.pending summed over ranks
    new = bad.share()      # all ranks together
"""

import csv
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from utils import CSV_TEXT, SettingError, UserError, gather_from_ranks, whole_file

NAME = "bad_videos.csv"
COLUMNS = ["path", "reason"]


class TooManyBadVideos(UserError, RuntimeError):
    """More videos of the list are unreadable than --max_bad_videos allows."""


class BadVideos:
    """The unreadable videos that a run has met, over all ranks and all resumptions.

    Args:
        output_dir: folder of bad_videos.csv; '' writes none. Videos already in the file count, so that a resumed
            run records each video once.
        num_videos, limit: the run stops when more than this share of so many videos is bad. A single bad video
            never stops it, however short the list or low the limit.
        is_main: whether this is rank 0, which alone reads and writes the file.
        warn: called when the file can't be written; the next `share` tries again.
    """

    def __init__(
        self,
        *,
        output_dir: str,
        num_videos: int,
        limit: float = 0.01,
        is_main: bool = True,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.file = Path(output_dir) / NAME if output_dir else None
        self.num_videos, self.limit, self.is_main, self.warn = num_videos, limit, is_main, warn
        self.reasons = read_bad_videos(self.file) if is_main and self.file else {}  # path -> reason, all ranks'
        self._new: dict[str, str] = {}  # of this rank, not shared yet

    def __len__(self) -> int:
        """The number of distinct videos as of the last `share`."""
        return len(self.reasons)

    @property
    def pending(self) -> int:
        """Videos of this rank that wait for `share`, which is due where their sum over ranks is not 0."""
        return len(self._new)

    def add(self, entries: Iterable[tuple[str, str]]) -> None:
        """Adds the (path, reason) of a batch; known videos change nothing."""
        for path, reason in entries:
            if path not in self.reasons:
                self._new.setdefault(path, reason)

    def share(self) -> list[tuple[str, str]]:
        """Exchanges pending videos between all ranks, which call it together; rank 0 writes the file.

        Returns:
            The (path, reason) recorded by this call, the same on every rank.

        Raises:
            TooManyBadVideos: on every rank, when more than the limit are bad.
        """
        parts = gather_from_ranks((self.reasons if self.is_main else {}, self._new))
        known = parts[0][0]  # only rank 0 has read the file
        fresh = {path: reason for _, new in reversed(parts) for path, reason in new.items() if path not in known}
        self.reasons, self._new = {**known, **fresh}, {}
        if self.is_main and self.file:
            self._write()
        self._check()
        return list(fresh.items())

    def _write(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.file, "w", **CSV_TEXT) as file:
                csv.writer(file).writerows([COLUMNS, *self.reasons.items()])
        except OSError as error:
            self.warn(f"{self.file} could not be written ({error}); the run continues")

    def _check(self) -> None:
        allowed = max(1, self.limit * self.num_videos)
        if len(self) <= allowed:
            return
        first = "".join(f"\n  {path}: {reason}" for path, reason in list(self.reasons.items())[:3])
        listed = f" {self.file} lists them all." if self.file else ""
        raise TooManyBadVideos(
            f"{len(self)} of {self.num_videos} videos cannot be read, and --max_bad_videos {self.limit:g} allows "
            f"{allowed:.0f}.{listed} The first:{first}\nIf the videos moved, change --data_root. Otherwise repair "
            f"them, or take them out of the list, and delete {NAME}; or raise --max_bad_videos"
        )


def read_bad_videos(path: Path) -> dict[str, str]:
    """Reads path -> reason from a bad_videos.csv; empty if there is none.

    Raises:
        SettingError: the file has other columns.
    """
    if not path.is_file():
        return {}
    with path.open(**CSV_TEXT) as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or []):
            raise SettingError(f"{path} has no columns {', '.join(COLUMNS)}: move it away, the run writes its own")
        return {row["path"]: row["reason"] or "" for row in rows}
