"""The demo videos: repeatable, whole, readable, and labelled by motion alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clips.lists import read_list
from clips.video import open_video
from tools import make_demo_videos as demo

ROOT = Path(__file__).resolve().parent.parent


def run(output: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "make_demo_videos.py"), "--output", str(output), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


SMALL = ("--num_train", "12", "--num_val", "2", "--num_test", "3", "--num_frames", "6", "--size", "32")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    assert run(output, *SMALL, "--workers", "2").returncode == 0
    return output


def test_lists_name_readable_videos(made):
    for split, count in (("train", 12), ("val", 2), ("test", 3)):
        records = list(read_list(made / f"{split}.csv"))
        assert [r.label for r in records] == [i % len(demo.MOTIONS) for i in range(count)]
        for record in records:
            with open_video(record.path) as video:
                assert video.num_frames == 6
                assert video.get_frames([0, 5]).shape == (2, 3, 32, 32)
    assert (made / "labels.txt").read_text().split() == list(demo.MOTIONS)


def test_video_is_what_was_drawn_and_mask_lies_beside_it(made):
    record = read_list(made / "train.csv")[3]
    frames, mask, _ = demo.render(0, "train", 3, 6, 32)
    with open_video(record.path) as video:
        decoded = video.get_frames(np.arange(6)).permute(0, 2, 3, 1).numpy()
    assert np.abs(decoded.astype(float) - frames).mean() < 6  # H.264 with halved colour resolution
    stored = np.load(Path(record.path).with_suffix(".npz"))["mask"]
    assert stored.dtype == bool
    assert np.array_equal(stored, mask)


def test_goes_on_where_it_stopped_and_leaves_no_scraps(made):
    before = contents(made)
    (made / "train" / "00005.mp4").unlink()
    untouched = (made / "train" / "00004.mp4").stat().st_mtime_ns
    assert run(made, *SMALL, "--workers", "1").returncode == 0
    assert contents(made) == before
    assert (made / "train" / "00004.mp4").stat().st_mtime_ns == untouched


def test_other_settings_are_refused_and_nothing_changes(made):
    before = contents(made)
    refused = run(made, *SMALL, "--seed", "1")
    assert refused.returncode != 0
    assert "settings.json" in refused.stderr
    assert contents(made) == before


def test_bad_flags_are_one_line(tmp_path):
    refused = run(tmp_path / "none", "--size", "33")
    assert refused.returncode != 0
    assert "--size" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "none").exists()


def test_video_depends_on_seed_split_and_index_alone():
    frames, mask, _ = demo.render(0, "val", 4, 6, 32)
    again, same_mask, _ = demo.render(0, "val", 4, 6, 32)
    assert np.array_equal(frames, again)
    assert np.array_equal(mask, same_mask)
    for other in ((1, "val", 4), (0, "test", 4), (0, "val", 14)):
        assert not np.array_equal(frames, demo.render(*other, 6, 32)[0])


PROGRESS = np.linspace(0, 1, 8, dtype=np.float32)


@pytest.mark.parametrize("motion", demo.MOTIONS)
def test_sprites_do_the_motion_of_their_name(motion):
    for seed in range(8):
        sprites = demo.poses(motion, np.random.default_rng(seed), PROGRESS)
        change = np.stack([pose[-1] - pose[0] for pose in sprites])  # centre x, centre y, radius, angle
        if motion in demo.DIRECTIONS:
            expected = np.array(demo.DIRECTIONS[motion])
            assert (change[:, :2] @ expected > 0.25).all()
            assert np.abs(change[:, :2] @ expected[::-1]).max() < 1e-6
        elif motion.startswith("rotate"):
            turned = np.degrees(change[:, 3]) * (1 if motion == "rotate_cw" else -1)
            assert ((turned > 90) & (turned < 180)).all()
        elif motion in ("approach", "recede"):
            assert (change[:, 2] * (1 if motion == "approach" else -1) > 0.05).all()
        else:
            gap = np.linalg.norm(sprites[0][:, :2] - sprites[1][:, :2], axis=1)
            assert (np.diff(gap) * (1 if motion == "apart" else -1) > 0).all()


def test_looks_and_numbers_of_sprites_do_not_tell_the_motion():
    for motion in demo.MOTIONS[:8]:
        counts = {len(demo.poses(motion, np.random.default_rng(seed), PROGRESS)) for seed in range(20)}
        assert counts == {1, 2}


def test_mask_follows_the_moving_sprites():
    for index in range(len(demo.MOTIONS)):
        _, mask, _ = demo.render(0, "train", index, 8, 64)
        assert 0.02 < mask.mean() < 0.4
        assert not np.array_equal(mask[0], mask[-1])
