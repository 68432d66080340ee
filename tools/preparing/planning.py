"""Plans a run: which videos to make, under which names, and whether the output folder may take them."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from clips.lists import find_videos, read_list
from utils import SettingError, whole_file


class Job(NamedTuple):
    """A video to make: its source, its path below the output folder, and its full path."""

    source: str
    name: PurePath
    target: str


def plan_jobs(given: Path, output: Path, data_root: Path | None) -> list[Job]:
    """One job for each video of a folder or list, whether it has been made or not, sorted by name.

    Relative paths in a list start from `data_root`, by default the folder of the list.

    Raises:
        SettingError: there are no videos, two would get the same name, or a source would be overwritten.
        ListError: the list is malformed.
    """
    sources, paths = _in_folder(given, output) if given.is_dir() else _in_list(given, data_root)
    if not sources:
        raise SettingError(f"--input {given}: no videos in this folder")
    jobs = [Job(source, name, str(output / name)) for source, name in zip(sources, target_names(paths), strict=True)]
    _refuse_overwriting(jobs, output)
    return sorted(jobs, key=lambda job: job.name)


def _in_folder(folder: Path, output: Path) -> tuple[list[str], list[PurePath]]:
    """Every video as it can be opened from here, and relative to the folder."""
    root, top = folder.resolve(), output.resolve()
    if top in (root, *root.parents):
        raise SettingError(f"--input {folder} is in --output {output}: choose another --output")
    paths = find_videos(folder, skip=output)
    return [str(folder / path) for path in paths], paths


def _in_list(file: Path, data_root: Path | None) -> tuple[list[str], list[PurePath]]:
    """The absolute path of every video, and its path relative to the list's root or else their common folder."""
    videos = read_list(file, data_root)
    sources = list(dict.fromkeys(os.path.abspath(video.path) for video in videos))
    root = os.path.abspath(videos.root)
    if not all(PurePath(source).is_relative_to(root) for source in sources):
        root = os.path.commonpath([os.path.dirname(source) for source in sources])
    return sources, [PurePath(os.path.relpath(source, root)) for source in sources]


def target_names(paths: Sequence[PurePath], suffix: str = "mp4") -> list[PurePath]:
    """Each path with `suffix` instead of its own, or after it where paths differ only in their suffix."""
    count = Counter(path.with_suffix("") for path in paths)
    stems = [path if count[path.with_suffix("")] > 1 else path.with_suffix("") for path in paths]
    return [stem.with_name(f"{stem.name}.{suffix}") for stem in stems]


def _refuse_overwriting(jobs: Sequence[Job], output: Path) -> None:
    top, sources = os.path.realpath(output), {os.path.realpath(job.source) for job in jobs}
    taken = {}
    for job in jobs:
        if job.name in taken:
            raise SettingError(f"{taken[job.name]} and {job.source} would both become {job.name}: rename one")
        if os.path.join(top, job.name) in sources:
            raise SettingError(f"{job.target} is one of the videos to read: choose another --output")
        taken[job.name] = job.source


def record_settings(file: Path, settings: dict) -> None:
    """Writes the settings that the videos of a folder are made with to a JSON file in it.

    Raises:
        SettingError: the file is there already and has other settings.
    """
    if not file.exists():
        with whole_file(file, "w") as f:
            f.write(json.dumps(settings, indent=1) + "\n")
    for name, old in json.loads(file.read_text()).items():
        if settings.get(name) != old:
            raise SettingError(
                f"{file.parent} has videos made with --{name} {old}, this run has {settings.get(name)} "
                f"(see {file.name}): choose another --output, or remove that folder"
            )


def take_shard(items: Sequence, shard: tuple[int, int] | None) -> Sequence:
    """Part I of N: every N-th item, starting with the I-th."""
    return items if shard is None else items[shard[0] - 1 :: shard[1]]


def shard_name(name: str, shard: tuple[int, int] | None) -> str:
    return f"{name}.csv" if shard is None else f"{name}-{shard[0]:02d}-of-{shard[1]:02d}.csv"
