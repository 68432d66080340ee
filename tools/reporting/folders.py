"""What a run leaves in its folder: commands, settings, curves, results and pictures."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pictures.plots import read_epochs
from runs.checkpoints import LAST, epoch_checkpoints, read_checkpoint
from tools.reporting.chart import Curve
from utils import SettingError

PICTURES = (".gif", ".png", ".webp")  # of several files of one clip the first stands on the page
RESULTS = {"report.json": "Pre-trained, on held-out videos", "finetuning.json": "Fine-tuned"}  # {run: {name: number}}
COUNTERS = ("epoch", "skipped_steps", "replaced", "bad_videos", "seconds", "data_wait", "model_bad", "ema_bad")


@dataclass
class Folder:
    """What the page shows of a folder.

    Attributes:
        log: the lines of log.txt, one a finished epoch.
        steps: the curves of TensorBoard's events by name, over steps; without events, empty.
        epochs: the curves of log.txt by name, over finished epochs.
        pictures: files below the folder, a list for each clip or plot.
    """

    path: Path
    command: str = ""
    settings: dict = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    steps: dict[str, Curve] = field(default_factory=dict)
    epochs: dict[str, Curve] = field(default_factory=dict)
    test: dict[str, object] = field(default_factory=dict)
    tables: dict[str, dict[str, dict]] = field(default_factory=dict)
    pictures: list[list[Path]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What the program did, by its log."""
        return "fine-tuning" if any("best" in line for line in self.log) else "pre-training"


def read_log(path: Path) -> list[dict]:
    """The entries of log.txt by epoch.

    Raises:
        SettingError: it is not the log of a run.
    """
    try:
        return sorted(read_epochs(path), key=lambda entry: entry["epoch"])
    except (KeyError, TypeError) as error:
        raise SettingError(f"{path}: not the log.txt of a run: a line has no epoch") from error


def flatten(entry: dict) -> dict[str, float]:
    """The numbers of a line of log.txt, validation under TensorBoard's names: model_top1, ..."""
    found = {name: value for name, value in entry.items() if isinstance(value, int | float)}
    for source, values in (entry.get("validation") or {}).items():
        found |= {f"{source}_{name}": value for name, value in values.items()}
    return found


def epoch_curves(log: list[dict]) -> dict[str, Curve]:
    curves = {}
    for entry in log:
        for name, value in flatten(entry).items():
            if name not in COUNTERS:
                curves.setdefault(name, []).append((entry["epoch"] + 1, value))
    return curves


def step_curves(folder: Path) -> dict[str, Curve]:
    """The scalars of TensorBoard's event files in a folder."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 2000, "images": 1}).Reload()
    names = [name for name in events.Tags()["scalars"] if name not in COUNTERS]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def read_settings(folder: Path) -> dict:
    """The values of the flags: args.json, or else what the newest checkpoint says."""
    if (folder / "args.json").is_file():
        return read_json(folder / "args.json")
    checkpoints = [*epoch_checkpoints(folder), *(path for path in [folder / LAST] if path.is_file())]
    flags = read_checkpoint(checkpoints[0]).get("args") if checkpoints else None
    return dict(vars(flags) if hasattr(flags, "__dict__") else flags or {})


def read_json(path: Path) -> dict:
    """Raises SettingError where the file holds no JSON object."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise SettingError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise SettingError(f"{path}: not a JSON object")
    return found


def find_pictures(folder: Path) -> list[list[Path]]:
    """The pictures in a folder and in its `pictures`, by name; those of one clip together, the animation first.

    Of the pictures of epochs only the last is taken.
    """
    found = {}
    for path in [*sorted(folder.glob("*")), *sorted(folder.glob("pictures/**/*"))]:
        if path.suffix in PICTURES and path.name != "curves.png":  # the page draws the curves of all runs together
            clip = path.stem.removesuffix("_masks").removesuffix("_rows")
            found.setdefault(path.with_name(clip), []).append(path)
    *earlier, _ = [clip for clip in found if clip.name.startswith("epoch-")] or [None]
    groups = [paths for clip, paths in found.items() if clip not in earlier]
    return [sorted(paths, key=lambda path: (PICTURES.index(path.suffix), path.name)) for paths in groups]


def read_folder(path: Path) -> Folder:
    """Reads what is there; missing files leave their part empty.

    Raises:
        SettingError: there is no such folder, nothing in it is of a run, or a file is damaged.
    """
    if not path.is_dir():
        raise SettingError(f"{path}: no such folder")
    found = Folder(path, pictures=find_pictures(path))
    if (path / "log.txt").is_file():
        found.log = read_log(path / "log.txt")
        found.epochs, found.steps = epoch_curves(found.log), step_curves(path)
        found.settings = read_settings(path)
    if (path / "command.txt").is_file():
        found.command = (path / "command.txt").read_text().strip()
    if (path / "test.json").is_file():
        found.test = read_json(path / "test.json")
    found.tables = {title: read_json(path / name) for name, title in RESULTS.items() if (path / name).is_file()}
    if not (found.log or found.tables or found.pictures):
        raise SettingError(f"{path}: no log.txt, {', '.join(RESULTS)} or pictures: not the folder of a run")
    return found
