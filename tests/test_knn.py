"""Nearest neighbours: the votes of a plain computation, in any chunks, from the files of extract_features.py."""

import json

import numpy as np
import pytest
import torch
from programs import start
from videos import write_list, write_videos

from modeling_finetune import create_classifier
from tools.extract_features import main as extract
from tools.inference.feature_files import Features, write_features
from tools.knn import main, vote

ABOUT = {"pool": "mean", "weights": "0", "window": None}


def by_hand(train, labels, test, k, temperature, num_classes):
    """The votes with loops over videos and neighbours, in float64."""
    votes = np.zeros((len(test), num_classes))
    for row, x in enumerate(test):
        similarity = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in train]
        for neighbour in np.argsort(similarity)[::-1][:k]:
            votes[row, labels[neighbour]] += np.exp(similarity[neighbour] / temperature)
    return votes


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(30, 8)), rng.normal(size=(13, 8))
    return train, rng.integers(4, size=30), test, rng.integers(4, size=13)


@pytest.mark.parametrize("at_once", [1, 70, 10**6])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (30, 1.0)])
def test_votes_are_those_of_a_plain_computation_in_any_chunks(features, k, temperature, at_once):
    train, labels, test, _ = features
    unit = [torch.nn.functional.normalize(torch.from_numpy(x).float()) for x in (train, test)]
    settings = {"k": k, "temperature": temperature, "num_classes": 4, "at_once": at_once}
    votes = vote(unit[0], torch.from_numpy(labels), unit[1], **settings)
    np.testing.assert_allclose(votes, by_hand(train, labels, test, k, temperature, 4), rtol=1e-4)


def write(folder, split, x, labels, *, dtype="float32", names="{}/{}.mp4", **about):
    """Features below folder/features and the list of a split; the videos themselves are not needed."""
    paths = [names.format(split, number) for number in range(len(x))]
    for path, row in zip(paths, x, strict=True):
        clips = np.stack([0.5 * row, 1.5 * row]).astype(dtype)  # whose mean is the row
        file = folder / "features" / path.replace(".mp4", ".safetensors")
        write_features(file, Features(clips, np.zeros((2, 4), np.int64)), {"video": path, **ABOUT, **about})
    write_list(folder / f"{split}.csv", *(f"{path} {label}" for path, label in zip(paths, labels, strict=True)))


def run(folder, *flags):
    lists = ("--train", folder / "train.csv", "--test", folder / "test.csv", "--json", folder / "knn.json")
    return start(main, "--features", folder / "features", *lists, "--k", 5, "--device", "cpu", *flags)


def test_accuracies_from_files_and_lists(features, tmp_path):
    train, labels, test, truth = features
    write(tmp_path, "train", train, labels)
    write(tmp_path, "test", test, truth)
    votes = by_hand(train, labels, test, 5, 0.07, 4)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "knn.json").read_text())
    assert found["top1"] == pytest.approx(100 * (votes.argmax(1) == truth).mean())
    assert found["top5"] == 100 and (found["videos"], found["training_videos"]) == (13, 30)
    assert f"top-1 {found['top1']:.2f}" in done.stdout


def test_class_names_are_numbered_alike_in_both_lists(features, tmp_path):
    """A test list with fewer classes numbers those it has by the training list's."""
    train, labels, _, _ = features
    write(tmp_path, "train", train, [f"class {'dcba'[label]}" for label in labels])
    last = np.flatnonzero(labels == 0)[:3]  # "class d", which alone would be number 0
    write(tmp_path, "test", train[last], 3 * ["class d"])
    done = run(tmp_path, "--k", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "knn.json").read_text())["top1"] == 100


def test_a_test_video_without_features_is_wrong_and_a_training_one_left_out(features, tmp_path):
    train, labels, _, _ = features
    write(tmp_path, "train", train, labels)
    write(tmp_path, "test", train[:10], labels[:10])  # each its own nearest neighbour
    (tmp_path / "features/test/3.safetensors").unlink()
    (tmp_path / "features/train/29.safetensors").unlink()
    done = run(tmp_path, "--k", 1)
    assert done.returncode == 0 and json.loads((tmp_path / "knn.json").read_text())["top1"] == 90
    assert "1 training videos without features are left out" in done.stderr and "1 test videos" in done.stderr


@pytest.mark.parametrize(
    ("about", "flags", "words"),
    [
        ({"pool": "tokens"}, [], "--pool mean"),
        ({"weights": "1"}, [], "weights = 0, others with 1"),
        ({}, ["--k", 31], "--k 31 is more than the 30 training videos"),
        ({}, ["--temperature", 0], "--temperature 0.0"),
        ({}, ["--test", "nowhere.csv"], "nowhere.csv does not exist"),
        ({}, ["--features", "."], "no features of tools/extract_features.py"),
    ],
)
def test_mistakes_are_one_line(features, tmp_path, monkeypatch, about, flags, words):
    train, labels, test, truth = features
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write(tmp_path, "train", train, labels)
    write(tmp_path, "test", test, truth, **about)
    done = run(tmp_path, *flags)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_two_videos_never_share_features(features, tmp_path):
    train, labels, test, truth = features
    write(tmp_path, "train", train[:1], labels[:1], names="{1}.mp4")
    write(tmp_path, "test", test, truth)
    write_list(tmp_path / "train.csv", "a/0.mp4 1", "b/0.mp4 2")
    done = run(tmp_path)
    assert done.returncode == 1 and "0.safetensors would be of both" in done.stderr


def test_features_of_a_model_are_found_behind_its_extraction(tmp_path):
    """A video is its own nearest neighbour."""
    torch.manual_seed(0)
    settings = {"name": "vit_tiny_patch8_64", "num_classes": 3, "num_frames": 4, "input_size": 16}
    model = create_classifier(**settings).state_dict()
    torch.save({"model": model, "model_settings": settings}, tmp_path / "model.pth")
    (tmp_path / "videos").mkdir()
    names = write_videos(tmp_path / "videos", [8, 9, 10], size=(24, 24))
    for split in ("train", "test"):
        write_list(tmp_path / f"{split}.csv", *(f"videos/{name} {label}" for label, name in enumerate(names)))
    flags = ("--model", tmp_path / "model.pth", "--output", tmp_path / "features", "--device", "cpu")
    assert start(extract, *flags, "--num_workers", 0, tmp_path / "videos").returncode == 0
    assert run(tmp_path, "--k", 1).returncode == 0
    assert json.loads((tmp_path / "knn.json").read_text())["top1"] == 100
