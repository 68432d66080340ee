"""Features: the model's own activations of the right clips, in files that are whole, named and resumable."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
from golden import ROOT, cases, manifest, needs_golden, tensors, under
from programs import Done, start, start_process
from safetensors import safe_open
from videos import read_numbers, write_damaged, write_video

from augment import normalize, to_pixels
from clips.frame_indices import dense_views
from clips.transforms import EvenCrops
from clips.video import open_video
from modeling_finetune import Size, VisionTransformer, create_classifier
from modeling_pretrain import create_pretrain_model
from probes import make_probe
from runs.checkpoints import save_checkpoint
from tools.inference import windows as clip_windows
from tools.inference.trained import TrainedClips
from weights.classifier import load_classifier
from weights.names import load_weights

PROGRAM = "tools/extract_features.py"
spec = importlib.util.spec_from_file_location("extract_features", ROOT / PROGRAM)
features = sys.modules["extract_features"] = importlib.util.module_from_spec(spec)  # found when unpickling
spec.loader.exec_module(features)

TINY = {"name": "vit_tiny_patch8_64", "num_classes": 6, "num_frames": 4, "input_size": 32}
CLASSIFIERS = {
    "classifier": TINY,
    "first token": {**TINY, "mean_pooling": False},
    "slots": {**TINY, "slot_pooling": True},
    "MAE-ST": {**TINY, "name": "vit_tiny_mae_st_patch8_64"},
}
PROBES = ("linear", "attentive")
KINDS = ("AdaMAE", *CLASSIFIERS, *PROBES)
DIM, WINDOW = 128, (2, 4, 4)


def randomise(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def write_checkpoint(folder, kind="classifier", seed=0):
    torch.manual_seed(seed)
    settings = CLASSIFIERS.get(kind, TINY)
    if kind == "AdaMAE":
        settings = {"name": "pretrain_videomae_tiny_patch8_64", "num_frames": 4, "input_size": 32}
        model = randomise(create_pretrain_model(**settings, mask_ratio=0.9))
    else:
        model = randomise(create_classifier(**settings))
    if kind in PROBES:
        model, settings = make_probe(model, kind=kind), {**settings, "probe": {"kind": kind}}
    path = folder / f"{kind}-{seed}.pth"
    flags = {"sampling_rate": 2, "num_frames": 4, "input_size": 32}
    save_checkpoint(path, {"model": model.state_dict(), "model_settings": settings, "args": flags})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos, of 40, 17 and 3 frames."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "below").mkdir()
    write_video(folder / "long.mp4", 40, size=(48, 64))
    write_video(folder / "below/mid.mp4", 17, size=(48, 64))
    write_video(folder / "below/short.mkv", 3, size=(80, 64))
    return folder


def run(model, output, *words) -> Done:
    words = ("--model", model, "--output", output, "--device", "cpu", "--num_workers", 0, *words)
    return start(features.main, *words)


def extract(model, output, *words) -> Done:
    """A run that must succeed."""
    done = run(model, output, *words)
    assert done.returncode == 0, done.stderr
    return done


def read(path):
    """The features, the frames and the settings of a file."""
    if path.suffix == ".npy":
        about = json.loads(path.with_suffix(".json").read_text())
        return np.load(path), np.array(about.pop("frames")), about
    with safe_open(path, "np") as f:
        return f.get_tensor("features"), f.get_tensor("frames"), json.loads(f.metadata()["about"])


def files_in(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- the model's own activations ----------------------------------------------------------------------------


def clips_by_hand(path, indices):
    """Normalised clips (W,3,4,32,32) of the central square of a video."""
    with open_video(path) as video:
        frames = video.get_frames(indices.ravel())
    shown = EvenCrops(short_side=32, size=32)(frames)[0].unflatten(0, indices.shape)  # (W,4,3,32,32)
    return normalize(to_pixels(shown.transpose(1, 2)))


def captured(checkpoint, module_name, clips, hook):
    """What the hook of a module keeps when the whole model, head included, sees the clips."""
    model = load_classifier(load_weights(checkpoint), num_classes=6, report=lambda text: None)
    seen = []
    getattr(model.get_submodule(module_name), hook)(lambda module, *values: seen.append(values[-1]))
    with torch.no_grad():
        model(clips)
    return seen[-1]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_models_own_pooled_activations(tmp_path, folder, kind, window):
    path, video = write_checkpoint(tmp_path, kind), folder / "long.mp4"
    statistics = ("--statistics", "imagenet", "--sampling", "dense")
    extract(path, tmp_path, video, *statistics, *(("--window", window) if window else ()))
    found, frames, _ = read(tmp_path / "long.safetensors")
    (expected,) = captured(path, "head", clips_by_hand(video, frames), "register_forward_pre_hook")
    assert found.shape == (len(frames), WINDOW[0] * DIM if kind == "slots" else DIM)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.numpy()), np.abs(found - expected.numpy()).max()
    assert found.std(1).min() > 0.01, "features of random weights vary"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_what_the_last_block_puts_out(tmp_path, folder, kind):
    path, video = write_checkpoint(tmp_path, kind), folder / "long.mp4"
    extract(path, tmp_path, video, "--pool", "tokens", "--window", 9, "--statistics", "imagenet")
    found, frames, _ = read(tmp_path / "long.safetensors")
    last = "encoder.blocks.3" if kind in PROBES else "blocks.3"
    expected = captured(path, last, clips_by_hand(video, frames), "register_forward_hook")
    expected = expected[:, -np.prod(WINDOW) :]  # without the class token
    assert np.array_equal(found, expected.unflatten(1, WINDOW).numpy())


@pytest.mark.parametrize("kind", ["AdaMAE", "classifier", "MAE-ST"])
def test_the_pools_agree(tmp_path, folder, kind):
    path = write_checkpoint(tmp_path, kind)
    for pool in features.POOLS:
        extract(path, tmp_path / pool, folder, "--pool", pool, "--window", 8)
    mean, slots, tokens = (read(tmp_path / pool / "long.safetensors")[0] for pool in features.POOLS)
    norm = load_classifier(load_weights(path), headless=True, report=lambda text: None).final_norm
    assert slots.shape == (len(mean), WINDOW[0], DIM)
    with torch.no_grad():
        torch.testing.assert_close(norm(torch.from_numpy(tokens).mean((2, 3))), torch.from_numpy(slots))
        torch.testing.assert_close(norm(torch.from_numpy(tokens).mean((1, 2, 3))), torch.from_numpy(mean))


@needs_golden
@pytest.mark.parametrize("name", cases("finetune")[:1])
def test_pooled_features_equal_the_published_code(name):
    golden, config = tensors(name), manifest()["cases"][name]["config"]
    grid = config["img"] // config["patch"]
    model = VisionTransformer(
        size=Size(config["dim"], config["depth"], config["heads"], 0, 0),
        patch=config["patch"],
        window=(config["num_frames"] // 2, grid, grid),
        num_classes=config["classes"],
    ).eval()
    model.load_state_dict(under("state", golden))
    found = features.clip_features(golden["in.clip"], model=model, pool="mean")
    torch.testing.assert_close(found, golden["out.features"], atol=1e-5, rtol=1e-4)


# --- the clips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_frames", "clip_len", "rate", "stride"), [(100, 16, 4, 8), (61, 16, 4, 1), (50, 4, 3, 50)]
)
def test_windows_start_every_stride_frames_and_stay_inside(num_frames, clip_len, rate, stride):
    windows = clip_windows.sliding_windows(num_frames, clip_len, rate, stride)
    assert windows.dtype == np.int64 and windows.shape[1] == clip_len
    assert (np.diff(windows, axis=1) == rate).all()
    assert windows[:, 0].tolist() == list(range(0, stride * len(windows), stride))
    assert windows[-1, -1] < num_frames <= windows[-1, -1] + stride, "the next one would not fit"


@pytest.mark.parametrize("num_frames", [1, 7, 60])
def test_a_video_shorter_than_a_clip_has_one_window(num_frames):
    windows = clip_windows.sliding_windows(num_frames, 16, 4, 8)
    assert windows.tolist() == [[min(4 * k, num_frames - 1) for k in range(16)]]


@pytest.mark.parametrize("budget", [1, 2**16, 2**28])
def test_clips_show_the_frames_that_the_file_names(folder, monkeypatch, budget):
    """However many of them are decoded at a time."""
    monkeypatch.setattr(clip_windows, "FRAME_BYTES", budget)
    clips = TrainedClips(4, "dense", 3, 48, 48, "imagenet", 5, 3)
    video = write_video(folder / "square.mp4", 40, size=(48, 48))
    windows = list(clip_windows.Windows(paths=[str(video)], clips=clips, stride=2, decoder="pyav"))
    (folder / "square.mp4").unlink()
    expected = clip_windows.sliding_windows(40, 4, 3, 2)
    assert np.array_equal([w.frames for w in windows], expected)
    assert [read_numbers(w.clip.transpose(0, 1)) for w in windows] == expected.tolist()
    assert [w.last for w in windows] == [False] * (len(expected) - 1) + [True]


def test_without_a_window_it_is_the_middle_clip_of_the_models_rule(tmp_path, folder, checkpoint):
    extract(checkpoint, tmp_path, folder)
    assert np.array_equal(read(tmp_path / "long.safetensors")[1], dense_views(40, 4, 2, 1))
    assert read(tmp_path / "below/short.safetensors")[1].tolist() == [[0, 2, 2, 2]]
    extract(checkpoint, tmp_path / "segments", folder, "--sampling", "segments")
    assert read(tmp_path / "segments/long.safetensors")[1].tolist() == [[5, 15, 25, 35]]


@pytest.mark.parametrize("more", [("--batch_size", 3), ("--num_workers", 2, "--batch_size", 7)])
def test_batches_and_workers_change_nothing(tmp_path, folder, checkpoint, more):
    extract(checkpoint, tmp_path / "a", folder, "--window", 3, "--batch_size", 1)
    extract(checkpoint, tmp_path / "b", folder, "--window", 3, *more)
    names = sorted(files_in(tmp_path / "a"))
    assert names == ["below/mid.safetensors", "below/short.safetensors", "long.safetensors"]
    for name in names:
        (ours, frames, about), (theirs, *same) = read(tmp_path / "a" / name), read(tmp_path / "b" / name)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.array_equal(frames, same[0]) and about == same[1]


# --- the files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_says_what_is_in_it(tmp_path, folder, checkpoint, kind, dtype):
    flags = ("--pool", "frame", "--window", 16, "--format", kind, "--dtype", dtype)
    extract(checkpoint, tmp_path, folder, *flags)
    found, frames, about = read(tmp_path / f"below/mid.{kind}")
    assert found.dtype == dtype and found.shape == (1, 2, DIM) and frames.tolist() == [[0, 2, 4, 6]]
    expected = {"model": str(checkpoint), "video": "below/mid.mp4", "pool": "frame", "window": 16, "dtype": dtype,
                "amp": "float32", "num_frames": 4, "sampling": "dense", "sampling_rate": 2, "input_size": 32,
                "short_side": 32, "statistics": "imagenet"}  # fmt: skip
    assert expected.items() <= about.items() and about.keys() - expected.keys() == {"weights"}


def test_videos_that_differ_in_the_suffix_only_have_files_of_their_own(tmp_path, checkpoint):
    for name in ("a.mp4", "a.mkv", "b.c.mp4"):
        write_video(tmp_path / name, 8)
    extract(checkpoint, tmp_path / "out", tmp_path)
    names = ["a.mkv.safetensors", "a.mp4.safetensors", "b.c.safetensors"]
    assert sorted(files_in(tmp_path / "out")) == names
    assert [read(tmp_path / "out" / name)[2]["video"] for name in names] == ["a.mkv", "a.mp4", "b.c.mp4"]


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_a_stopped_run_goes_on_and_ends_as_a_straight_one(tmp_path, folder, checkpoint, monkeypatch, kind):
    flags = (folder, "--window", 4, "--format", kind)
    extract(checkpoint, tmp_path / "straight", *flags)

    written, write = [], features.write_features

    def stop_at_the_second(path, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "write_features", stop_at_the_second)
        run(checkpoint, tmp_path / "stopped", *flags)
    time = os.stat(written[0]).st_mtime_ns
    done = extract(checkpoint, tmp_path / "stopped", *flags)
    assert "3 videos: 2 written, 1 there already, 0 unreadable" in done.stdout
    assert os.stat(written[0]).st_mtime_ns == time
    assert files_in(tmp_path / "stopped") == files_in(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_what_is_missing_or_not_whole_is_made_anew(tmp_path, folder, checkpoint, kind):
    flags = (folder, "--format", kind)
    extract(checkpoint, tmp_path, *flags)
    before = files_in(tmp_path)
    (tmp_path / f"below/mid.{kind}").unlink()
    (tmp_path / f"long.{kind}").write_bytes(before[f"long.{kind}"][:-9])
    if kind == "npy":
        (tmp_path / "below/short.json").unlink()
    done = extract(checkpoint, tmp_path, *flags)
    assert f"{3 if kind == 'npy' else 2} written" in done.stdout
    assert files_in(tmp_path) == before
    assert "0 written, 3 there already" in extract(checkpoint, tmp_path, *flags).stdout


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, folder, checkpoint, monkeypatch, kind):
    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = run(checkpoint, tmp_path, folder, "--format", kind)
    assert done.returncode == 1 and "error: no space left on device" in done.stderr
    assert not files_in(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pool", "frame"], "was made with pool = mean, this run has pool = frame"),
        (["--window", 8], "was made with window = None, this run has window = 8"),
        (["--sampling_rate", 3], "was made with sampling_rate = 2, this run has sampling_rate = 3"),
    ],
)
def test_other_settings_are_refused_or_overwrite(tmp_path, folder, checkpoint, flags, message):
    extract(checkpoint, tmp_path, folder)
    before = files_in(tmp_path)
    done = run(checkpoint, tmp_path, folder, *flags)
    assert done.returncode == 1 and message in done.stderr and "--overwrite" in done.stderr
    assert files_in(tmp_path) == before
    extract(checkpoint, tmp_path, folder, *flags, "--overwrite")
    after = files_in(tmp_path)
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in after)


def test_other_weights_under_the_same_name_are_refused(tmp_path, folder):
    path = write_checkpoint(tmp_path, seed=0)
    extract(path, tmp_path / "out", folder)
    write_checkpoint(tmp_path, seed=1).replace(path)
    done = run(path, tmp_path / "out", folder)
    assert done.returncode == 1 and "was made with weights = " in done.stderr
    write_checkpoint(tmp_path, seed=0).rename(tmp_path / "another name.pth")
    extract(tmp_path / "another name.pth", tmp_path / "out", folder)


# --- videos and settings at fault ---------------------------------------------------------------------------


def test_an_unreadable_video_is_reported_and_the_others_go_on(tmp_path, folder, checkpoint, monkeypatch):
    """Also one that breaks off after some of its windows."""
    monkeypatch.setattr(clip_windows, "FRAME_BYTES", 1)
    (tmp_path / "empty.mp4").touch()
    broken = write_video(tmp_path / "whole.mp4", 200, g="10")
    damaged = write_damaged(broken, tmp_path / "damaged.mp4", 0.6, 0.9)
    broken.unlink()
    output = tmp_path / "out"
    done = run(checkpoint, output, tmp_path / "missing.mp4", tmp_path, folder, "--window", 20)
    assert done.returncode == 1
    assert "error: 3 of the videos could not be read" in done.stderr
    for name in ("empty.mp4: is empty", "missing.mp4: ", f"{damaged}: "):
        assert name in done.stderr
    assert "6 videos: 3 written, 0 there already, 3 unreadable" in done.stdout
    found = {name.rsplit("/", 1)[-1] for name in files_in(output)}
    assert found == {"long.safetensors", "mid.safetensors", "short.safetensors"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", 0], "--window 0 must be at least 1"),
        (["--batch_size", 0], "--batch_size 0 must be at least 1"),
        (["--num_frames", 3], "--num_frames 3 is not a multiple"),
        (["--model", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (["--output", "a file"], "a file"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path, folder, checkpoint, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    done = run(checkpoint, tmp_path / "out", folder, *flags)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("extract_features.py: error: ") and message in last


def test_it_runs_by_itself(tmp_path, folder, checkpoint):
    flags = ["--model", checkpoint, "--output", tmp_path, "--device", "cpu", "--window", 8, folder]
    done = start_process(PROGRAM, *flags)
    assert done.returncode == 0, done.stderr
    assert "3 videos: 3 written" in done.stdout
    assert len(files_in(tmp_path)) == 3
