"""The manipulation videos: lists, splits and names, resuming, the controls; with the simulator, real episodes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import manipulation
import numpy as np
import pytest
from programs import start

from clips.lists import read_list
from clips.video import open_video

COUNTS = {"train": 3, "val": 1, "test": 2}
SMALL = ("--num_train", 3, "--num_val", 1, "--num_test", 2, "--num_frames", 8, "--size", 32)
TASKS = ("drawer-open", "push")


class FakeSimulator:
    """Stands in for `simulator.Simulator`: frame k of a video is of grey level 16 k + 60; every second start fails."""

    def __init__(self, size: int):
        self.size, self.starts, self.rendered = size, 0, []

    def run(self, rng, *, min_steps, max_steps):
        self.starts += 1
        return None if self.starts % 2 else FakeEpisode()

    def render(self, episode, rng, num_frames):
        self.rendered.append(rng.random())
        shape = (num_frames, self.size, self.size)
        levels = (16 * np.arange(num_frames) + 60).astype(np.uint8)[:, None, None, None]
        mask = np.zeros(shape, bool)
        mask[:, :8] = True
        return np.broadcast_to(levels, (*shape, 3)), mask


class FakeEpisode:
    states = np.zeros((70, 4))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole data set of two tasks, made without the simulator."""
    output = tmp_path_factory.mktemp("manipulation") / "videos"
    recipe = manipulation.Recipe(seed=0, size=32, num_frames=8, max_steps=200, crf=16)
    simulator, videos = FakeSimulator(32), manipulation.plan(TASKS, COUNTS)
    for video in videos:
        assert manipulation.make_video(video, simulator, output=output, recipe=recipe)
    assert len(set(simulator.rendered)) == len(videos)  # each video has random numbers of its own
    settings = {**recipe._asdict(), "tasks": list(TASKS)}
    (output / "settings.json").write_text(json.dumps(settings))
    assert run(output, *SMALL).returncode == 0  # nothing is left to render: it writes the lists
    return output


def run(output: Path, *flags: object, tasks: tuple[str, ...] = TASKS):
    return start(manipulation.main, "--output", output, "--workers", 1, "--tasks", *tasks, *flags)


def grey_levels(path: str | Path) -> list[int]:
    with open_video(path) as video:
        frames = video.get_frames(np.arange(video.num_frames)).float()
    return [round(level) for level in ((frames.mean((1, 2, 3)) - 60) / 16).tolist()]


def test_fifty_tasks_in_order():
    assert len(set(manipulation.TASKS)) == 50
    assert list(manipulation.TASKS) == sorted(manipulation.TASKS)


def test_lists_split_by_episode(made):
    names = [set(), set(), set()]
    for split, found in zip(COUNTS, names):
        records = list(read_list(made / f"{split}.csv"))
        assert [record.label for record in records] == [0] * COUNTS[split] + [1] * COUNTS[split]
        for record in records:
            assert TASKS[record.label] in record.path
            assert grey_levels(record.path) == list(range(8))
            found.add(record.path)
    assert not set.intersection(*names)
    assert (made / "labels.txt").read_text().split() == list(TASKS)


def test_masks_lie_beside_the_videos_and_failures_are_counted(made):
    for record in read_list(made / "train.csv"):
        with np.load(Path(record.path).with_suffix(".npz")) as note:
            assert note["mask"].dtype == bool and note["mask"].shape == (8, 32, 32)
            assert (note["steps"], note["failed"]) == (70, 1)
    table = (made / "tasks.csv").read_text().splitlines()
    assert table == ["task,videos,failed_episodes,mean_steps", "drawer-open,6,6,70.0", "push,6,6,70.0"]


def test_what_is_there_is_kept_and_only_what_is_missing_is_made(made, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    (folder / "train/push/001.mp4").unlink()
    (folder / "test/push/000.npz").unlink()
    asked = []
    monkeypatch.setattr(manipulation, "require_simulator", lambda: None)
    monkeypatch.setattr(manipulation, "run_tasks", lambda make, groups, **_: asked.extend(groups) or [(0, groups[0])])
    done = run(folder, *SMALL)
    (group,) = asked
    assert [video.name for video in group] == ["train/push/001.mp4", "test/push/000.mp4"]
    assert done.returncode == 1 and "train/push/001.mp4: no episode" in done.stderr
    assert len(read_list(folder / "train.csv")) == 5  # the lists name what is there


def test_groups_are_of_one_task_and_hold_every_video_once():
    videos = manipulation.plan(manipulation.TASKS, {"train": 40, "val": 6, "test": 10})
    groups = manipulation.in_groups(videos)
    assert sorted(video for group in groups for video in group) == sorted(videos)
    assert all(len({video.task for video in group}) == 1 for group in groups)
    assert max(map(len, groups)) == manipulation.TOGETHER


@pytest.mark.parametrize("control", manipulation.CONTROLS)
def test_controls_keep_frames_and_labels_but_not_the_motion(made, tmp_path, control):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    assert run(folder, "--control", control).returncode == 0
    orders = []
    for split in COUNTS:
        videos, theirs = read_list(made / f"{split}.csv"), read_list(folder / control / f"{split}.csv")
        assert [record.label for record in theirs] == [record.label for record in videos]
        orders += [grey_levels(record.path) for record in theirs]
    if control == "shuffled":
        assert all(sorted(order) == list(range(8)) for order in orders)
        assert sum(order == list(range(8)) for order in orders) == 0
    else:
        assert all(len(set(order)) == 1 for order in orders)
    assert len({tuple(order) for order in orders}) > 3
    assert (folder / control / "labels.txt").read_text() == (made / "labels.txt").read_text()
    before = (folder / control / "train/push/000.mp4").stat().st_mtime_ns
    assert run(folder, "--control", control).returncode == 0
    assert (folder / control / "train/push/000.mp4").stat().st_mtime_ns == before


def test_mistakes_are_one_line(made, tmp_path):
    for flags, tasks, reason in (
        (("--seed", 1, *SMALL), TASKS, "settings.json"),
        (("--size", 33), TASKS, "--size"),
        ((), ("drawer-open", "drawer"), "--tasks drawer:"),
    ):
        refused = run(made, *flags, tasks=tasks)
        assert refused.returncode != 0 and reason in refused.stderr and refused.stderr.count("\n") == 1, refused
    refused = run(tmp_path / "none", "--control", "single")
    assert "train.csv" in refused.stderr and not (tmp_path / "none").exists()


def test_a_missing_simulator_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.delitem(sys.modules, "simulator", raising=False)
    refused = run(tmp_path / "none")
    assert "'mujoco'" in refused.stderr and "benchmarks/requirements-manipulation.txt" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_real_episodes(tmp_path):
    """In processes of their own, as the program does it: tests run in threads and with other environments."""
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("needs benchmarks/requirements-manipulation.txt")
    flags = ("--num_train", 2, "--num_val", 0, "--num_test", 1, "--num_frames", 32)
    done = run(tmp_path / "both", *flags)
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "one", *flags[:1], 1, *flags[2:], tasks=("push",)).returncode == 0
    for record in read_list(tmp_path / "both/train.csv"):
        with open_video(record.path) as video:
            frames = video.get_frames(np.arange(32)).float()
        mask = np.load(Path(record.path).with_suffix(".npz"))["mask"]
        assert frames.shape == (32, 3, 112, 112) and mask.shape == (32, 112, 112)
        assert 0.01 < mask.mean() < 0.7
        changed = (frames[0] - frames[-1]).abs().mean(0).numpy()
        moved = mask[0] | mask[-1]
        assert changed[moved].mean() > 5 * changed[~moved].mean()  # what moves is in the mask, the camera stands still
    alone, together = (tmp_path / f"{name}/train/push/000.npz" for name in ("one", "both"))
    assert np.array_equal(np.load(alone)["mask"], np.load(together)["mask"])  # whatever else is made
