"""The book of unreadable videos: each recorded once in bad_videos.csv, and the limit at which a run stops.

bad = BadVideos(output_dir=..., num_videos=len(videos), limit=0.01, is_main=rank == 0)
bad.add(batch["bad"])        # every batch: local and cheap
...                          # now and then, where the ranks meet anyway: the sum of `bad.pending` over them
if pending_of_all_ranks:
    new = bad.share()        # all ranks together
"""

import csv
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist

NAME = "bad_videos.csv"
COLUMNS = ["path", "reason"]


class TooManyBadVideos(RuntimeError):
    """More videos of the list are unreadable than the run puts up with."""


class BadVideos:
    """The unreadable videos that a run has met, over all ranks and over its resumptions.

    output_dir: the folder of bad_videos.csv, '' for none. What the file holds already counts: a run that is
        resumed records every video once. Only the first rank reads and writes it.
    num_videos, limit: the run stops when more than this share of so many videos is bad. A single bad video
        never stops it, however short the list or low the limit.
    is_main: whether this is rank 0.
    warn: told when the file can't be written, as on a full disk; the next `share` tries again.
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
        self._new: dict[str, str] = {}  # what this rank has not shared yet

    def __len__(self) -> int:
        """The different videos recorded so far, as of the last `share`."""
        return len(self.reasons)

    @property
    def pending(self) -> int:
        """Videos of this rank that wait for `share`; `share` is due where the sum over ranks is not 0."""
        return len(self._new)

    def add(self, entries: Iterable[tuple[str, str]]) -> None:
        """Notes the (path, reason) of a batch; those known already change nothing."""
        for path, reason in entries:
            if path not in self.reasons:
                self._new.setdefault(path, reason)

    def share(self) -> list[tuple[str, str]]:
        """Exchanges what is pending between all ranks, which call it together; rank 0 writes the file.

        Returns the (path, reason) recorded by this call, the same on every rank. Raises TooManyBadVideos, on
        every rank, when more than the limit are bad.
        """
        mine = (self.reasons if self.is_main else {}, self._new)
        parts = [mine]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
        known = parts[0][0]  # rank 0 alone has read the file, so its book is the one that counts
        fresh = {path: reason for _, new in reversed(parts) for path, reason in new.items() if path not in known}
        self.reasons, self._new = {**known, **fresh}, {}
        if self.is_main and self.file:
            self._write()
        self._check()
        return list(fresh.items())

    def _write(self) -> None:
        """The whole file, in one step: it is never half a file."""
        temporary = self.file.with_name(f"{NAME}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows([COLUMNS, *self.reasons.items()])
            os.replace(temporary, self.file)
        except OSError as error:
            self.warn(f"{self.file} could not be written ({error}); the run goes on")

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
    """path -> reason of a bad_videos.csv; empty where there is none. Raises ValueError for another file."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or []):
            raise ValueError(f"{path} has no columns {', '.join(COLUMNS)}: move it away, a run writes its own")
        return {row["path"]: row["reason"] or "" for row in rows}
