"""Preparing videos: what comes out, what survives, and what a check finds. On real files."""

import csv
import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import PurePath

import av
import numpy as np
import pytest
from golden import ROOT
from programs import start
from videos import read_numbers, write_audio, write_cut, write_damaged, write_trimmed, write_video

from clips.lists import read_list, read_splits
from clips.video import open_video
from clips.video_index import VideoError, index_video
from tools.preparing.planning import Job, target_names
from tools.preparing.transcode import ABANDONED, Encoding, WritingFailed, convert, make_video, output_size, sweep
from tools.preparing.workers import Failure, run_tasks

tool = importlib.import_module("tools.prepare_videos")
SMALL = ("--short_side", 48, "--workers", 1)


def prepare(*flags):
    return start(tool.main, *flags)


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def all_numbers(path):
    with open_video(path, "pyav") as video:
        return read_numbers(video.get_frames(range(video.num_frames)))


# --- one video ----------------------------------------------------------------------------------------------


def made(folder, source, **settings):
    target = folder / "made.mp4"
    convert(source, target, Encoding(**{"short_side": 48, **settings}))
    return target


def test_a_prepared_video_is_small_silent_h264_with_every_frame_and_many_key_frames(tmp_path):
    target = made(tmp_path, write_video(tmp_path / "a.mkv", 40, size=(96, 128), fps=24), gop=8)
    index = index_video(target)
    assert (index.num_frames, index.size, index.turns, index.traits) == (40, (48, 64), 0, frozenset())
    assert index.fps == pytest.approx(24)
    places = [index.times.index(key) for key in index.keys]
    assert max(np.diff([*places, 40])) <= 8
    assert all_numbers(target) == list(range(40))
    with av.open(str(target)) as container:
        assert container.format.name.startswith("mov,mp4")
        assert [stream.type for stream in container.streams] == ["video"]
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.has_b_frames) == ("h264", "yuv420p", 0)


def test_sound_is_left_out(tmp_path):
    source = tmp_path / "a.mp4"
    with av.open(str(source), "w") as container:
        video, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=16000)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        for _ in range(10):
            container.mux(video.encode(av.VideoFrame(64, 48, "yuv420p")))
        for stream, last in ((sound, frame), (sound, None), (video, None)):
            container.mux(stream.encode(last))
    with av.open(str(made(tmp_path, source))) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path, rotation):
    source = write_video(tmp_path / "a.mp4", 6, size=(96, 130), rotation=rotation)
    target = made(tmp_path, source)
    assert index_video(target).turns == 0 and index_video(target).size == (48, 64)
    assert all_numbers(target) == list(range(6))


@pytest.mark.parametrize(
    "name, how",
    [
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.avi", {"codec": "mpeg4", "bf": "2"}),
        ("a.mkv", {"pix_fmt": "yuv444p", "size": (97, 131)}),
        ("a.mp4", {"codec": "libx265", "pix_fmt": "yuv420p10le"}),
        ("a.ts", {}),
        ("b.mkv", {"fps": Fraction(30000, 1001)}),
        ("b.mp4", {"num_frames": 1}),
    ],
)
def test_any_source_keeps_its_frames_and_its_rate(tmp_path, name, how):
    source = write_video(tmp_path / name, **{"num_frames": 20, "size": (96, 128), **how})
    target = made(tmp_path, source)
    assert all_numbers(target) == list(range(how.get("num_frames", 20)))
    assert index_video(target).fps == pytest.approx(float(how.get("fps", 30)))
    with av.open(str(target)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_frames_cut_away_by_an_edit_list_stay_away(tmp_path):
    source = write_video(tmp_path / "whole.mp4", 30, size=(96, 128), bf="0")
    assert all_numbers(made(tmp_path, write_trimmed(source, tmp_path / "a.mp4", 7))) == list(range(7, 30))


def test_a_variable_rate_becomes_the_mean_rate_with_every_moment_in_its_place(tmp_path):
    times = [*range(15), *range(15, 60, 3)]  # 30/s, then 10/s
    source = write_video(tmp_path / "a.mkv", 30, size=(96, 128), times=times)
    before, after = index_video(source), index_video(made(tmp_path, source))
    assert after.fps == pytest.approx(before.fps, rel=0.02) and after.num_frames == before.num_frames
    assert set(np.diff(after.times)) == {after.times[1] - after.times[0]}
    for k, number in enumerate(all_numbers(tmp_path / "made.mp4")):
        now = (k + 0.5) / after.fps
        end = times[number + 1] / 30 if number < 29 else 3
        assert times[number] / 30 <= now + 0.002 and end >= now - 0.002  # mkv rounds to milliseconds


@pytest.mark.parametrize(
    "height, width, short, enlarge, expected",
    [
        (720, 1280, 320, False, (320, 568)),
        (1280, 720, 320, False, (568, 320)),
        (240, 427, 320, False, (240, 426)),
        (241, 321, 320, False, (240, 320)),
        (240, 320, 320, True, (320, 426)),
        (320, 320, 320, False, (320, 320)),
    ],
)
def test_sizes_are_even_and_not_enlarged_unless_asked(height, width, short, enlarge, expected):
    assert output_size(height, width, short, enlarge=enlarge) == expected


@pytest.mark.parametrize("colorspace, full", [(1, False), (1, True), (5, True)])
def test_colours_stay(tmp_path, colorspace, full):
    source = tmp_path / "a.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj420p" if full else "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, 2 if full else 1
        red = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (200, 60, 30), np.uint8), format="rgb24")
        red = red.reformat(format=stream.pix_fmt, dst_colorspace=colorspace, dst_color_range=2 if full else 1)
        container.mux(stream.encode(red))
        container.mux(stream.encode())
    for path in (source, made(tmp_path, source)):
        with open_video(path) as video:
            colour = video.get_frames([0])[0, :, 20, 20]
        assert np.abs(colour.numpy() - np.array([200, 60, 30])).max() <= 4


def test_a_source_that_is_damaged_is_refused_with_a_reason(tmp_path):
    whole = write_video(tmp_path / "a.mp4", 40, size=(96, 128))
    for source in (write_damaged(whole, tmp_path / "b.mp4"), write_audio(tmp_path / "c.mp4")):
        with pytest.raises(VideoError) as caught:
            made(tmp_path, source)
        assert caught.value.path == source and caught.value.reason


def test_a_write_that_fails_is_not_blamed_on_the_video_and_leaves_nothing(tmp_path):
    rng = np.random.default_rng(0)
    source = write_video(tmp_path / "a.mp4", frames=rng.integers(0, 256, (20, 96, 128, 3), dtype=np.uint8))
    job = Job(str(source), None, str(tmp_path / "out" / "a.mp4"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        outcome = make_video(job, encoding=Encoding(), tag="t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(outcome, WritingFailed) and "a.mp4" in outcome.reason
    assert list((tmp_path / "out").iterdir()) == []
    assert make_video(job, encoding=Encoding(), tag="t") is None


# --- workers ------------------------------------------------------------------------------------------------


def misbehave(task):
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "hang":
        time.sleep(600)
    if task == "bug":
        raise ValueError(task)
    return task.upper()


def test_a_crash_and_a_hang_cost_their_own_task_only():
    tasks = ["a", "crash", "b", "hang", "c"]
    outcomes = dict(run_tasks(misbehave, tasks, workers=2, timeout=1))
    assert set(outcomes) == set(range(5))
    assert [outcomes[k] for k in (0, 2, 4)] == ["A", "B", "C"]
    assert isinstance(outcomes[1], Failure) and "SIGSEGV" in outcomes[1].reason
    assert outcomes[3] == Failure("not done after 1 s")


def test_a_bug_fails_its_own_task_and_keeps_its_traceback(capfd):
    outcomes = dict(run_tasks(misbehave, ["a", "bug", "b"], workers=1, timeout=20))
    assert outcomes == {0: "A", 1: Failure("ValueError: bug"), 2: "B"}
    assert "in misbehave" in capfd.readouterr().err


def test_closing_early_ends_the_processes():
    outcomes = run_tasks(misbehave, ["a", "hang", "hang"], workers=2, timeout=600)
    assert next(outcomes) == (0, "A")
    outcomes.close()
    assert not [child for child in multiprocessing.active_children() if "pebble" in child.name]


# --- a folder -----------------------------------------------------------------------------------------------


def test_a_folder_becomes_the_same_folder_and_bad_videos_are_listed(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "raw" / "prepared"
    (raw / "air drumming").mkdir(parents=True)
    write_video(raw / "air drumming/b c 3.webm", 8, codec="libvpx-vp9", size=(96, 128))
    write_video(raw / "a.mp4", 8)
    write_video(raw / "a.avi", 8, codec="mpeg4")
    write_audio(raw / "sound.mp4")
    (raw / "empty.mp4").touch()
    done = prepare("--input", raw, "--output", out, *SMALL)
    assert done.returncode == 0, done.stderr
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*") if path.is_file()}
    videos = {"a.mp4.mp4", "a.avi.mp4", "air drumming/b c 3.mp4"}
    assert names == videos | {"bad_videos.csv", "prepare_videos.json"}
    bad = {os.path.basename(row["path"]): row["reason"] for row in rows(out / "bad_videos.csv")}
    assert bad == {"sound.mp4": "has no video stream", "empty.mp4": "is empty (0 bytes)"}
    assert "5 videos: 3 made, 0 there already, 2 bad" in done.stdout and "has no video stream" in done.stdout

    stamps = {name: (out / name).stat().st_mtime_ns for name in videos}
    (out / "a.avi.mp4").unlink()
    again = prepare("--input", raw, "--output", out, *SMALL, "--strict")
    assert "5 videos: 1 made, 2 there already, 2 bad" in again.stdout
    assert again.returncode == 1
    after = {name: (out / name).stat().st_mtime_ns for name in videos}
    assert {name for name in videos if after[name] != stamps[name]} == {"a.avi.mp4"}

    other = prepare("--input", raw, "--output", out, *SMALL, "--gop", 4)
    assert other.returncode == 1 and "--gop 16, this run has 4" in other.stderr


def test_nothing_readable_is_an_error_and_slow_videos_are_bad(tmp_path):
    write_video(tmp_path / "raw.mp4", 2)
    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw/a.mp4", 300, size=(480, 640))
    done = prepare("--input", tmp_path / "raw", "--output", tmp_path / "out", *SMALL, "--timeout", 0.02)
    assert done.returncode == 1 and "no video could be read" in done.stderr
    assert rows(tmp_path / "out/bad_videos.csv")[0]["reason"] == "not done after 0.02 s"
    assert not list((tmp_path / "out").rglob("*.mp4")) and not list((tmp_path / "out").rglob("*.part"))


def test_shards_share_out_every_video_once_and_write_files_of_their_own(tmp_path):
    (tmp_path / "raw").mkdir()
    for k in range(5):
        write_video(tmp_path / f"raw/{k}.mp4", 2)
    made_by = []
    for number in (1, 2):
        before = set((tmp_path / "out").glob("*.mp4"))
        prepare("--input", tmp_path / "raw", "--output", tmp_path / "out", *SMALL, "--shard", f"{number}/2")
        made_by.append({path.name for path in set((tmp_path / "out").glob("*.mp4")) - before})
        assert rows(tmp_path / f"out/bad_videos-0{number}-of-02.csv") == []
    assert made_by == [{"0.mp4", "2.mp4", "4.mp4"}, {"1.mp4", "3.mp4"}]
    for wrong in ("0/2", "3/2", "x"):
        with pytest.raises(tool.argparse.ArgumentTypeError, match="I/N"):
            tool.parse_shard(wrong)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_no_half_video_and_goes_on(tmp_path, number):
    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw/a.mp4", 2)
    write_video(tmp_path / "raw/b.mp4", 400, size=(480, 640), preset="ultrafast")
    out, program = tmp_path / "out", ROOT / "tools/prepare_videos.py"
    command = [sys.executable, program, "--input", tmp_path / "raw", "--output", out, "--workers", "1"]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 100
    while not list(out.glob(".b.mp4.*.part")) and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert not list(out.glob(".*.part"))
        assert sorted(path.name for path in out.glob("*.mp4")) == ["a.mp4"]
    stamp = (out / "a.mp4").stat().st_mtime_ns
    assert prepare("--input", tmp_path / "raw", "--output", out, "--workers", 1).returncode == 0
    assert (out / "a.mp4").stat().st_mtime_ns == stamp
    assert index_video(out / "b.mp4").num_frames == 400


def test_unfinished_files_of_other_runs_are_removed_only_when_they_are_old(tmp_path):
    for name in (".a.mp4.me.part", ".b.mp4.other.part", ".c.mp4.other.part"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".c.mp4.other.part", (time.time() - 2 * ABANDONED,) * 2)
    sweep(tmp_path, "me")
    assert [path.name for path in tmp_path.iterdir()] == [".b.mp4.other.part"]


def test_sources_that_differ_only_in_their_suffix_get_different_names():
    paths = [PurePath(name) for name in ("a.avi", "a.mp4", "d/a.webm", "b.1.mov")]
    assert [name.as_posix() for name in target_names(paths)] == ["a.avi.mp4", "a.mp4.mp4", "d/a.mp4", "b.1.mp4"]


def test_two_videos_that_would_get_one_name_are_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("b.avi", "b.mp4", "b.avi.mov"):  # b.avi.mp4, b.mp4.mp4 and b.avi.mp4
        (tmp_path / "raw" / name).touch()
    done = prepare("--input", tmp_path / "raw", "--output", tmp_path / "out", *SMALL)
    assert done.returncode == 1 and "would both become b.avi.mp4" in done.stderr


def test_an_input_is_never_written_over(tmp_path):
    (tmp_path / "d").mkdir()
    source = write_video(tmp_path / "d/a.mp4", 2)
    (tmp_path / "list.csv").write_text("d/a.mp4 0\n")
    before = source.read_bytes()
    for given, output in (
        (tmp_path / "d", tmp_path / "d"),
        (tmp_path / "d", tmp_path),
        (tmp_path / "list.csv", tmp_path),
    ):
        assert prepare("--input", given, "--output", output, *SMALL).returncode == 1
    assert source.read_bytes() == before


# --- lists --------------------------------------------------------------------------------------------------


def test_a_list_comes_out_with_new_paths_and_its_labels(tmp_path):
    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw/b c.webm", 4, codec="libvpx-vp9")
    write_video(tmp_path / "raw/d.mp4", 4)
    (tmp_path / "raw/train.csv").write_text("b c.webm 3\n# no\nd.mp4\ngone.avi 1\n")
    out = tmp_path / "out"
    done = prepare("--input", tmp_path / "raw/train.csv", "--output", out, *SMALL)
    assert done.returncode == 0 and "train.csv: 2 videos, 1 missing" in done.stdout
    assert [tuple(r) for r in read_list(out / "train.csv")] == [(f"{out}/b c.mp4", 3), (f"{out}/d.mp4", None)]
    assert rows(out / "bad_videos.csv")[0]["path"].endswith("gone.avi")
    (out / "train.csv").unlink()
    assert prepare("--input", tmp_path / "raw/train.csv", "--output", out, "--lists_only").returncode == 0
    assert len(read_list(out / "train.csv")) == 2


def test_a_data_set_is_made_and_listed_in_one_go_and_missing_videos_are_named(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/classInd.txt").write_text("1 Archery\n2 Bowling\n")
    (tmp_path / "labels/trainlist01.txt").write_text("Archery/v_1.avi 1\nBowling/v_2.avi 2\n")
    (tmp_path / "labels/testlist01.txt").write_text("Bowling/v_3.avi\n")
    for name in ("Archery/v_1.avi", "Bowling/v_3.avi"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True)
        write_video(tmp_path / "raw" / name, 4, codec="mpeg4")
    out = tmp_path / "out"
    which = ("--output", out, "--data_set", "UCF101", "--annotations", tmp_path / "labels")
    done = prepare("--input", tmp_path / "raw", *which, *SMALL)
    assert done.returncode == 0, done.stderr
    splits = read_splits(out)
    assert [tuple(r) for r in splits["train"]] == [(f"{out}/Archery/v_1.mp4", 0)]
    assert [tuple(r) for r in splits["val"]] == [(f"{out}/Bowling/v_3.mp4", 1)]
    assert (out / "test.csv").read_text() == (out / "val.csv").read_text()
    assert (out / "labels.txt").read_text() == "Archery\nBowling\n"
    assert rows(out / "missing_videos.csv") == [{"split": "train", "video": "Bowling/v_2"}]
    assert "train.csv: 1 video, 1 missing" in done.stdout
    assert prepare(*which, "--lists_only", "--strict").returncode == 1


def test_flags_that_do_not_go_together_are_refused_with_what_to_do(tmp_path):
    for flags, message in (
        ((), "--input is missing"),
        (("--input", tmp_path), "--output is missing"),
        (("--input", tmp_path / "no", "--output", tmp_path), "does not exist"),
        (("--output", tmp_path, "--lists_only"), "--lists_only needs --data_set"),
        (("--input", tmp_path, "--output", tmp_path / "o", "--data_set", "SSV2"), "--annotations"),
        (("--input", tmp_path, "--output", tmp_path / "o", "--short_side", 321), "--short_side"),
        (("--input", tmp_path, "--output", tmp_path / "o"), "no videos in this folder"),
        (("--input", tmp_path, "--check"), "neither lists"),
    ):
        done = prepare(*flags)
        assert done.returncode == 1 and message in done.stderr, (flags, done.stderr)


# --- check --------------------------------------------------------------------------------------------------


def test_check_finds_what_is_wrong_and_passes_what_is_right(tmp_path):
    good = write_video(tmp_path / "good one.mp4", 30, size=(96, 128))
    (tmp_path / "train.csv").write_text("# heading\ngood one.mp4 1\n")
    (tmp_path / "val.csv").write_text("good one.mp4 0\n")
    right = prepare("--check", "--input", tmp_path, "--nb_classes", 2, "--workers", 1)
    assert right.returncode == 0 and "0 faults" in right.stdout
    assert rows(tmp_path / "check.csv") == []

    write_cut(good, tmp_path / "cut.mp4", 0.7)
    (tmp_path / "train.csv").write_text("good one.mp4 2\n\ncut.mp4 0\na.mp4 dancing\ngood one.mp4\n")
    (tmp_path / "val.csv").write_text("gone.mp4 0\ngood one.mp4 0\n")
    wrong = prepare("--check", "--input", tmp_path, "--nb_classes", 2, "--workers", 2, "--output", tmp_path / "o")
    assert wrong.returncode == 1 and "6 faults" in wrong.stdout  # line 4 has two
    found = {}
    for row in rows(tmp_path / "o/check.csv"):
        found.setdefault((os.path.basename(row["list"]), int(row["line"])), []).append(row["reason"])
    assert set(found) == {("train.csv", 1), ("train.csv", 3), ("train.csv", 4), ("train.csv", 5), ("val.csv", 1)}
    assert found["train.csv", 1] == ["the label 2, not one from 0 to 1"] and "no label" in found["train.csv", 5][0]
    assert found["train.csv", 4][0] == "the label 'dancing', where line 1 has 2"
    assert all("No such file" in found[where][-1] for where in (("train.csv", 4), ("val.csv", 1)))


def test_check_of_a_folder_without_lists_looks_at_its_videos(tmp_path):
    write_cut(write_video(tmp_path / "a.mp4", 30), tmp_path / "b.mp4", 0.5)
    done = prepare("--check", "--input", tmp_path, "--workers", 1)
    assert done.returncode == 1
    assert [os.path.basename(row["path"]) for row in rows(tmp_path / "check.csv")] == ["b.mp4"]


def test_class_folders_get_a_test_of_their_own_or_a_warning(tmp_path):
    touched = [tmp_path / name / f"{k}.mp4" for name in "ab" for k in range(10)]
    for path in touched:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    flags = ("--lists_only", "--output", tmp_path, "--data_set", "folders")
    done = prepare(*flags)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert "test.csv: 2 videos" in done.stdout and "train.csv: 16 videos" in done.stdout
    assert not set((tmp_path / "test.csv").read_text().split()) & set((tmp_path / "val.csv").read_text().split("\n"))
    done = prepare(*flags, "--test_fraction", 0)
    assert done.returncode == 0 and "val.csv and test.csv list the same videos" in done.stderr
    assert (tmp_path / "test.csv").read_text() == (tmp_path / "val.csv").read_text()
    for path in touched[2:10]:  # too few of one class, so a tenth is none
        path.unlink()
    assert "test.csv: 1 video," in prepare(*flags).stdout
    done = prepare(*flags, "--test_fraction", 0.9)
    assert done.returncode == 1 and "--test_fraction" in done.stderr
