"""Makes videos of simulated robot manipulation: 50 tasks, where the label is what is done.

    python -m pip install -r benchmarks/requirements-manipulation.txt      # after requirements.txt
    python benchmarks/manipulation.py --output output/manipulation

The tasks are Meta-World's (open and close a drawer, push, pull, press, sweep, turn ...) in MuJoCo. Each episode starts
from a random state and runs the task's scripted policy, with some noise, until it has succeeded; episodes that fail are
counted, and replaced. The camera stands still; its place, the light and all colours differ between episodes, so that
they do not tell the task. Written below --output, as tools/make_demo_videos.py does:

    train.csv val.csv test.csv     lines `path label`, with paths relative to the list
    labels.txt                     the names of the tasks 0, 1, ...
    train/drawer-open/000.mp4 ...  H.264, --num_frames frames at equal distances over the episode
    train/drawer-open/000.npz ...  `mask`: bool (T,H,W), True on the arm and on every other part that can move;
                                   `steps`: the episode's length; `failed`: how many starts failed before it
    tasks.csv                      for each task: videos, episodes that failed, mean length
    settings.json                  the settings that all videos were made with

A video depends only on (--seed, its split, task and number), and is written whole or not at all: a run that was
stopped continues where it was, and larger counts add to what is there. Rendering needs OSMesa (Debian's libosmesa6), or
a GPU with MUJOCO_GL=egl. With --control, which needs no simulator, it makes another version of all videos of --output
in a folder below it, to measure how much of the label is motion:

    --control shuffled             the frames of each video in random order
    --control single               one random frame of each video, repeated
"""

import argparse
import csv
import os
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clips.lists import SPLITS, read_list
from clips.video import open_video
from tools.make_demo_videos import encode
from tools.preparing.planning import record_settings
from tools.preparing.workers import Failure, run_tasks
from utils import CSV_TEXT, SettingError, UserError, whole_file

TASKS = (
    *("assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown"),
    *("button-press-topdown-wall", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn"),
    *("disassemble", "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open"),
    *("faucet-close", "faucet-open", "hammer", "hand-insert", "handle-press", "handle-press-side", "handle-pull"),
    *("handle-pull-side", "lever-pull", "peg-insert-side", "peg-unplug-side", "pick-out-of-hole", "pick-place"),
    *("pick-place-wall", "plate-slide", "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push"),
    *("push-back", "push-wall", "reach", "reach-wall", "shelf-place", "soccer", "stick-pull", "stick-push", "sweep"),
    *("sweep-into", "window-close", "window-open"),
)
ATTEMPTS = 20  # starts from which an episode is tried
TOGETHER = 14  # episodes made by one process, which takes about as long to start as one episode
TIMEOUT = 600  # seconds per video at most
CONTROLS = {  # which frames of T a control shows
    "shuffled": lambda rng, count: rng.permutation(count),
    "single": lambda rng, count: np.full(count, rng.integers(count)),
}


class Video(NamedTuple):
    """A video to make: its split, its task, and its number among those of both."""

    split: str
    task: str
    number: int

    @property
    def name(self) -> str:
        """Its path below the output folder."""
        return f"{self.split}/{self.task}/{self.number:03d}.mp4"

    def rng(self, seed: int, attempt: int) -> np.random.Generator:
        words = (seed, SPLITS.index(self.split), TASKS.index(self.task), self.number, attempt)
        return np.random.default_rng(words)


class Recipe(NamedTuple):
    """What all videos of a folder have in common."""

    seed: int
    size: int
    num_frames: int
    max_steps: int
    crf: int


def plan(tasks: Sequence[str], counts: dict[str, int]) -> list[Video]:
    """All videos of the data set, task by task, in the order of the lists."""
    return [Video(split, task, k) for split in SPLITS for task in tasks for k in range(counts[split])]


def is_made(output: Path, video: Video) -> bool:
    path = output / video.name
    return path.exists() and path.with_suffix(".npz").exists()


def in_groups(videos: Sequence[Video]) -> list[list[Video]]:
    """Groups of at most TOGETHER videos of one task, which one process makes with one renderer."""
    groups = []
    for video in sorted(videos, key=lambda video: video.task):
        if not groups or len(groups[-1]) == TOGETHER or groups[-1][0].task != video.task:
            groups.append([])
        groups[-1].append(video)
    return groups


def make_group(videos: Sequence[Video], *, output: Path, recipe: Recipe) -> list[Video]:
    """Makes videos of one task, in a process that makes no others; returns those without a successful episode."""
    from simulator import Simulator

    simulator = Simulator(videos[0].task, recipe.size)
    return [video for video in videos if not make_video(video, simulator, output=output, recipe=recipe)]


def make_video(video: Video, simulator, *, output: Path, recipe: Recipe) -> bool:
    """Writes a video of the first start that succeeds, and its mask; tells whether there was one."""
    path = output / video.name
    for attempt in range(ATTEMPTS):
        rng = video.rng(recipe.seed, attempt)
        episode = simulator.run(rng, min_steps=recipe.num_frames, max_steps=recipe.max_steps)
        if episode is not None:
            frames, mask = simulator.render(episode, rng, recipe.num_frames)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path.with_suffix(".npz")) as file:
                np.savez_compressed(file, mask=mask, steps=len(episode.states), failed=attempt)
            with whole_file(path) as file:
                encode(file, frames, recipe.crf)
            return True
    return False


def require_simulator() -> None:
    """Raises SettingError, which says what to install, where the simulator or off-screen OpenGL is missing."""
    wanted = "benchmarks/requirements-manipulation.txt"
    try:
        import simulator  # noqa: F401
    except ModuleNotFoundError as error:
        install = f"{sys.executable} -m pip install -r {wanted}"
        raise SettingError(f"no module {error.name!r}: the simulator is not installed; run: {install}") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        platform = os.environ["MUJOCO_GL"]
        advice = "install OSMesa (Debian and Ubuntu: apt-get install libosmesa6), or set MUJOCO_GL=egl on a GPU"
        raise SettingError(f"no off-screen OpenGL for MUJOCO_GL={platform} ({error}): {advice}") from error


def check_settings(args: argparse.Namespace) -> None:
    if args.size % 2 or not 16 <= args.size <= 480 or min(args.num_frames, args.max_steps, args.workers) < 1:
        raise SettingError("--size must be even and 16 to 480; --num_frames, --max_steps, --workers at least 1")
    if args.max_steps < args.num_frames:
        raise SettingError(f"--max_steps {args.max_steps} is less than --num_frames {args.num_frames}")
    if unknown := sorted(set(args.tasks) - set(TASKS)):
        raise SettingError(f"--tasks {' '.join(unknown)}: no such task; the tasks are {', '.join(TASKS)}")


def make_data_set(args: argparse.Namespace) -> list[str]:
    """Makes the videos that are not there yet, and the lists; returns what went wrong, a line each.

    Raises:
        SettingError: a setting is wrong, the simulator is missing, or the folder has videos made with other settings.
    """
    check_settings(args)
    recipe = Recipe(args.seed, args.size, args.num_frames, args.max_steps, args.crf)
    tasks = sorted(set(args.tasks))
    videos = plan(tasks, {"train": args.num_train, "val": args.num_val, "test": args.num_test})
    missing = [video for video in videos if not is_made(args.output, video)]
    if missing:
        require_simulator()
    args.output.mkdir(parents=True, exist_ok=True)
    record_settings(args.output / "settings.json", {**recipe._asdict(), "tasks": tasks})
    groups, faults = in_groups(missing), []
    make = partial(make_group, output=args.output, recipe=recipe)
    timeout = TIMEOUT * TOGETHER
    for k, result in run_tasks(make, groups, workers=args.workers, timeout=timeout, max_tasks=1, unit="group"):
        if isinstance(result, Failure):
            faults.append(f"{groups[k][0].name} and {len(groups[k]) - 1} more: {result.reason}")
        else:
            faults += [f"{video.name}: no episode of {ATTEMPTS} succeeded" for video in result]
    write_lists(args.output, tasks, [video for video in videos if is_made(args.output, video)])
    return faults


def write_lists(output: Path, tasks: Sequence[str], videos: Sequence[Video]) -> None:
    """Writes the lists of videos that are there, the labels, and what the episodes of each task were like."""
    for split in SPLITS:
        with whole_file(output / f"{split}.csv", "w") as file:
            chosen = (video for video in videos if video.split == split)
            file.writelines(f"{video.name} {tasks.index(video.task)}\n" for video in chosen)
    with whole_file(output / "labels.txt", "w") as file:
        file.writelines(f"{task}\n" for task in tasks)
    notes = {task: [] for task in tasks}
    for video in videos:
        with np.load((output / video.name).with_suffix(".npz")) as note:
            notes[video.task].append((int(note["failed"]), int(note["steps"])))
    with whole_file(output / "tasks.csv", "w", **CSV_TEXT) as file:
        table = csv.writer(file)
        table.writerow(("task", "videos", "failed_episodes", "mean_steps"))
        for task, found in notes.items():
            failed, steps = np.array(found).reshape(-1, 2).T
            table.writerow((task, len(found), failed.sum(), round(steps.mean(), 1) if found else ""))
    failed, count = sum(note[0] for found in notes.values() for note in found), len(videos)
    print(f"{count} videos of {len(tasks)} tasks in {output}; {failed} of {count + failed} episodes failed (tasks.csv)")


def make_control_video(name: str, *, output: Path, control: str, seed: int, crf: int) -> None:
    """Writes a control's version of the video `name` of `output`, unless it is there."""
    path = output / control / name
    if path.exists():
        return
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    with open_video(output / name) as video:
        frames = video.get_frames(np.arange(video.num_frames)).permute(0, 2, 3, 1).numpy()  # (T,H,W,3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        encode(file, frames[CONTROLS[control](rng, len(frames))], crf)


def make_control(args: argparse.Namespace) -> list[str]:
    """Makes the videos of a control that are not there yet, and their lists; returns what went wrong, a line each.

    Raises:
        ListError: --output has no lists, so its videos have to be made first.
        SettingError: the folder has videos made with other settings.
    """
    lists = {split: read_list(args.output / f"{split}.csv") for split in SPLITS}
    names = [os.path.relpath(record.path, args.output) for videos in lists.values() for record in videos]
    folder = args.output / args.control
    folder.mkdir(exist_ok=True)
    record_settings(folder / "settings.json", {"control": args.control, "seed": args.seed, "crf": args.crf})
    make = partial(make_control_video, output=args.output, control=args.control, seed=args.seed, crf=args.crf)
    results = run_tasks(make, names, workers=args.workers, timeout=TIMEOUT)
    faults = [f"{args.control}/{names[k]}: {result.reason}" for k, result in results if isinstance(result, Failure)]
    for name in (*(f"{split}.csv" for split in SPLITS), "labels.txt"):
        with whole_file(folder / name, "w") as file:
            file.write((args.output / name).read_text())
    return faults


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the lists and videos")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help="some of the tasks (default: all)")
    parser.add_argument("--num_train", type=int, default=40, help="number of training videos per task")
    parser.add_argument("--num_val", type=int, default=6, help="number of validation videos per task")
    parser.add_argument("--num_test", type=int, default=10, help="number of test videos per task")
    parser.add_argument("--num_frames", type=int, default=64, help="frames per video; an episode has no fewer steps")
    parser.add_argument("--size", type=int, default=112, help="side of the frames in pixels, an even number")
    parser.add_argument("--max_steps", type=int, default=200, help="steps in which an episode has to succeed")
    parser.add_argument("--crf", type=int, default=16, help="H.264 quality: lower is better, with larger files")
    parser.add_argument("--seed", type=int, default=0, help="seed of all videos")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--control", choices=CONTROLS, help="make this version of the videos of --output instead")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    try:
        faults = make_control(args) if args.control else make_data_set(args)
    except (UserError, OSError) as error:
        raise SystemExit(f"manipulation.py: error: {error}") from error
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
