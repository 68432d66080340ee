"""Prediction: which clips a checkpoint asks for, which videos are found, and what is printed."""

import argparse
import importlib.util
import json

import numpy as np
import pytest
import torch
from golden import ROOT
from programs import Done, start, start_process
from videos import write_video

from augment import COLOUR_STATISTICS
from clips.frame_indices import dense_views, mae_st_views, segment_views
from clips.video import open_video
from modeling_finetune import create_classifier
from modeling_pretrain import create_pretrain_model
from probes import make_probe
from runs.checkpoints import save_checkpoint
from tools.inference.trained import encoder_of, find_videos, trained_clips
from weights.classifier import load_classifier
from weights.names import load_weights

PROGRAM = "tools/predict.py"
spec = importlib.util.spec_from_file_location("predict", ROOT / PROGRAM)
predict = importlib.util.module_from_spec(spec)
spec.loader.exec_module(predict)

TINY = {"name": "vit_tiny_patch8_64", "num_classes": 6, "num_frames": 4, "input_size": 32}
TINY_MAE_ST = {**TINY, "name": "vit_tiny_mae_st_patch8_64"}


def write_checkpoint(folder, settings=TINY, *, seed=0, probe=None, ours=True, **flags):
    """A classifier, or a probe of it, whose every weight is random; `ours` in our form, else as published."""
    torch.manual_seed(seed)
    model = create_classifier(**settings)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    if probe:
        model, settings = make_probe(model, kind=probe), {**settings, "probe": {"kind": probe}}
        torch.nn.init.normal_(model.head.weight, std=0.1)
    state = {"model": model.state_dict(), "args": flags if ours else argparse.Namespace(**flags)}
    path = folder / f"{settings['name']}-{seed}.pth"
    save_checkpoint(path, {**state, "model_settings": settings} if ours else state)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of several lengths and shapes, below each other, and files that are none."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "below" / "this").mkdir(parents=True)
    for name, length, size in [
        ("b.mp4", 30, (40, 64)),
        ("below/a.avi", 9, (64, 40)),
        ("below/this/a.mp4", 3, (36, 36)),
    ]:
        write_video(folder / name, length, size=size)
    (folder / "notes.txt").write_text("not a video")
    (folder / "._b.mp4").write_bytes(b"what macOS leaves beside b.mp4")
    return folder


def run(model, *words) -> Done:
    return start(predict.main, "--model", model, "--device", "cpu", "--num_workers", 0, *words)


def run_json(model, *words) -> dict:
    done = run(model, *words, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def scores_of(found: dict) -> np.ndarray:
    """The scores (n,K) of a run with --topk of all classes."""
    scores = np.zeros((len(found["predictions"]), len(found["predictions"][0]["top"])))
    for row, prediction in zip(scores, found["predictions"], strict=True):
        for entry in prediction["top"]:
            row[entry["class"]] = entry["score"]
    return scores


# --- what it predicts ---------------------------------------------------------------------------------------


def views_by_hand(path, indices, statistics):
    """Three crops of segments of a 40 x 64 video, its short side resized to 32: float32 (V,3,T,32,32)."""
    with open_video(path) as video:
        frames = video.get_frames(indices.ravel()).float()
    frames = torch.nn.functional.interpolate(frames, size=(32, 51), mode="bilinear").round() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in COLOUR_STATISTICS[statistics])
    frames = ((frames - mean) / std).unflatten(0, indices.shape)  # (S,T,3,32,51)
    crops = [frames[..., left : left + 32] for left in (0, 9, 19)]
    return torch.stack(crops, dim=1).flatten(0, 1).transpose(1, 2)


@pytest.mark.parametrize(
    ("flags", "indices", "statistics"),
    [
        ({"data_set": "custom", "sampling_rate": 3}, dense_views(30, 4, 3, 5), "imagenet"),
        ({"data_set": "SSV2", "sampling_rate": 3}, segment_views(30, 4, 2), "imagenet"),
        ({"data_set": "custom", "sampling": "segments", "imagenet_default_mean_and_std": False},
         segment_views(30, 4, 5), "half"),
    ],
)  # fmt: skip
def test_scores_are_the_mean_softmax_of_the_views_of_the_models_test(tmp_path, folder, flags, indices, statistics):
    path = write_checkpoint(tmp_path, **flags)
    found = run_json(path, folder / "b.mp4", "--topk", 6)
    model = load_classifier(load_weights(path), report=lambda text: None)
    views = views_by_hand(folder / "b.mp4", indices, statistics)
    with torch.no_grad():
        expected = model(views).softmax(1).mean(0)
    assert (found["segments"], found["crops"]) == (len(indices), 3)
    np.testing.assert_allclose(scores_of(found)[0], expected, atol=2e-3)  # pixels here to one grey level
    assert found["predictions"][0]["top"][0]["class"] == expected.argmax()


def test_classes_come_best_first_and_add_up(tmp_path, folder):
    path = write_checkpoint(tmp_path)
    every = run_json(path, folder, "--topk", 99)
    for prediction in every["predictions"]:
        scores = [entry["score"] for entry in prediction["top"]]
        assert len(scores) == 6 and scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
    best = run_json(path, folder, "--topk", 2)
    assert [p["top"] for p in best["predictions"]] == [p["top"][:2] for p in every["predictions"]]
    assert len(set(map(str, best["predictions"]))) == 3


def test_workers_and_batches_change_nothing(tmp_path, folder):
    path = write_checkpoint(tmp_path)
    views = ("--segments", 2, "--crops", 2, "--topk", 6)
    alone = run_json(path, folder, *views, "--batch_size", 1)
    together = run_json(path, folder, *views, "--batch_size", 12, "--num_workers", 2)
    assert [p["video"] for p in alone["predictions"]] == [p["video"] for p in together["predictions"]]
    np.testing.assert_allclose(scores_of(alone), scores_of(together), atol=2e-6)


def test_a_moving_average_is_another_key(tmp_path, folder):
    first, second = (torch.load(write_checkpoint(tmp_path, seed=k), weights_only=True) for k in (1, 2))
    both = tmp_path / "both.pth"
    save_checkpoint(both, {**first, "model_ema": second["model"]})
    video = folder / "b.mp4"
    ema, other = (
        run_json(both, video, "--model_key", "model_ema"),
        run_json(tmp_path / "vit_tiny_patch8_64-2.pth", video),
    )
    assert ema["predictions"] == other["predictions"]
    assert ema["predictions"] != run_json(both, video)["predictions"]


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_predicts(tmp_path, folder, kind):
    path = write_checkpoint(tmp_path, probe=kind)
    scores = scores_of(run_json(path, folder, "--topk", 6))
    assert scores.shape == (3, 6)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


# --- what a checkpoint asks for -----------------------------------------------------------------------------


def clips_of(path, **given):
    changes = {name: given[name] for name in ("num_frames", "input_size") if given.get(name)}
    found = load_weights(path)
    model = load_classifier(found, headless=True, report=lambda text: None, **changes)
    return trained_clips(found, encoder_of(model), given)


PUBLISHED = {"data_set": "SSV2", "num_frames": 4, "num_segments": 1, "input_size": 32, "short_side_size": 40,
             "sampling_rate": 2, "test_num_segment": 2, "test_num_crop": 3,
             "imagenet_default_mean_and_std": True}  # fmt: skip


@pytest.mark.parametrize("ours", [True, False])
def test_clips_are_those_of_the_run_that_made_the_checkpoint(tmp_path, ours):
    clips = clips_of(write_checkpoint(tmp_path, ours=ours, **PUBLISHED))
    assert clips == (4, "segments", 2, 32, 40, "imagenet", 2, 3)


def test_flags_left_out_in_training_mean_the_data_sets(tmp_path):
    none = dict.fromkeys(["sampling", "test_num_segment", "test_num_crop", "input_size", "short_side_size"])
    clips = clips_of(write_checkpoint(tmp_path, data_set="SSV2", sampling_rate=2, **none))
    assert clips == (4, "segments", 2, 32, 32, "imagenet", 2, 3)


def test_a_checkpoint_without_flags_gets_the_published_defaults(tmp_path):
    assert clips_of(write_checkpoint(tmp_path)) == (4, "dense", 4, 32, 32, "imagenet", 5, 3)
    clips = clips_of(write_checkpoint(tmp_path, TINY_MAE_ST))
    assert clips == (4, "mae_st", 4, 32, 32, "mae_st", 5, 3)
    assert clips.make_crops(1).round_up


def test_mae_st_on_a_data_set_keeps_its_colours_only(tmp_path):
    clips = clips_of(write_checkpoint(tmp_path, TINY_MAE_ST, data_set="SSV2"))
    assert (clips.sampling, clips.statistics) == ("segments", "mae_st")


def test_a_flag_comes_before_what_the_checkpoint_says(tmp_path):
    path = write_checkpoint(tmp_path, ours=False, **PUBLISHED)
    given = {"sampling": "dense", "sampling_rate": 1, "num_frames": 8, "segments": 7, "crops": 1,
             "statistics": "half", "input_size": 64, "short_side_size": 72}  # fmt: skip
    assert clips_of(path, **given) == (8, "dense", 1, 64, 72, "half", 7, 1)
    assert clips_of(path, input_size=64).short_side == 64, "40 was chosen for clips of 32"


def test_mae_st_takes_its_own_frames(tmp_path, folder):
    path = write_checkpoint(tmp_path, TINY_MAE_ST)
    trained = predict.load_trained(
        predict.get_args_parser().parse_args(["--model", str(path), "x.mp4"]), lambda text: None, headless=False
    )
    loader = predict.build_loader(trained, [str(folder / "b.mp4")], batch_size=1, decoder="auto", num_workers=0)
    with open_video(folder / "b.mp4") as video:
        expected = mae_st_views(30, 4, 4, video.fps, 5)
        assert np.array_equal(loader.dataset._frame_indices(video, 0), expected)


# --- which videos -------------------------------------------------------------------------------------------


def test_folders_are_searched_and_every_video_counts_once(folder, monkeypatch):
    found = find_videos([str(folder)])
    names = ["b.mp4", "below/a.avi", "below/this/a.mp4"]
    assert found == {str(folder / name): type(folder)(name) for name in names}
    more = find_videos([str(folder / "below/a.avi"), str(folder), f"{folder}/below/../b.mp4"])
    assert sorted(name.name for name in more.values()) == ["a.avi", "a.mp4", "b.mp4"]
    monkeypatch.chdir(folder)
    assert list(find_videos(["below", "b.mp4"])) == ["below/a.avi", "below/this/a.mp4", "b.mp4"]


def test_names_start_from_the_folder_that_all_arguments_share(folder):
    deep = str(folder / "below" / "this" / "a.mp4")
    assert [n.as_posix() for n in find_videos([deep]).values()] == ["a.mp4"]
    both = find_videos([deep, str(folder / "b.mp4")])
    assert [n.as_posix() for n in both.values()] == ["below/this/a.mp4", "b.mp4"]


def test_a_folder_without_videos_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    done = run(write_checkpoint(tmp_path), tmp_path)
    assert done.returncode == 1 and f"error: {tmp_path}: no videos in this folder (mp4, " in done.stderr


def test_an_unreadable_video_is_reported_and_the_others_are_predicted(tmp_path, folder):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    output = tmp_path / "new" / "found.json"
    model = write_checkpoint(tmp_path)
    done = run(model, broken, tmp_path / "missing.mp4", folder, "--json", output)
    assert done.returncode == 1
    assert "error: 2 of the videos could not be read" in done.stderr
    assert f"{broken}: " in done.stderr and "missing.mp4: " in done.stderr
    found = json.loads(output.read_text())
    assert [entry["video"] for entry in found["unreadable"]] == [str(broken), str(tmp_path / "missing.mp4")]
    assert all(entry["reason"] for entry in found["unreadable"])
    assert len(found["predictions"]) == 3
    assert found["predictions"] == run_json(model, folder)["predictions"]


# --- the program --------------------------------------------------------------------------------------------


def test_the_table_has_the_names_of_the_classes(tmp_path, folder):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"moving {word}\n" for word in ["left", "right", "up", "down", "on", "über"]))
    model, video = write_checkpoint(tmp_path), folder / "b.mp4"
    top = run_json(model, video, "--labels", labels)["predictions"][0]["top"]
    names = labels.read_text().splitlines()
    assert [entry["label"] for entry in top] == [names[entry["class"]] for entry in top]
    first, *lines = run(model, video, "--labels", labels).stdout.splitlines()
    assert first == str(video)
    expected = [[f"{100 * entry['score']:.2f}", "%", *entry["label"].split()] for entry in top]
    assert [line.split() for line in lines] == expected and len(lines) == 5
    assert f"class {top[0]['class']}" in run(model, video).stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topk", 0], "--topk 0 must be at least 1"),
        (["--segments", 0], "--segments 0 must be at least 1"),
        (["--num_workers", -1], "--num_workers -1 must be at least 0"),
        (["--num_frames", 5], "--num_frames 5 is not a multiple of the tubelet size 2"),
        (["--input_size", 30], "--input_size 30 is not a multiple of the patch size 8"),
        (["--short_side_size", 24], "--short_side_size 24 is less than --input_size 32"),
        (["--device", "abacus"], "--device abacus can't be used"),
        (["--model", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (["--labels", "two.txt"], "two.txt has 2 class names for 6 classes"),
        (["--labels", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path, folder, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("one\ntwo\n\n")
    done = run(write_checkpoint(tmp_path), folder, *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("predict.py: error: ")
    assert message in done.stderr.splitlines()[-1]


def test_a_pretraining_checkpoint_has_no_classes(tmp_path, folder):
    model = create_pretrain_model("pretrain_videomae_tiny_patch8_64", num_frames=4, input_size=32)
    save_checkpoint(tmp_path / "pretrained.pth", {"model": model.state_dict()})
    done = run(tmp_path / "pretrained.pth", folder)
    assert done.returncode == 1 and "has no classifier: fine-tune it first" in done.stderr


def test_it_runs_by_itself(tmp_path, folder):
    flags = ["--model", write_checkpoint(tmp_path), "--device", "cpu", "--num_workers", 0]
    done = start_process(PROGRAM, *flags, folder / "b.mp4", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["predictions"][0]["top"]) == 5
