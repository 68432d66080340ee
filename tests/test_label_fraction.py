"""Training on few labels: a share of each class, the same everywhere and when resumed."""

import numpy as np
import pytest
import torch
from programs import start
from videos import write_list, write_videos

from clips.lists import VideoList, draw_fraction
from run_class_finetuning import main

LABELS = np.random.default_rng(0).permutation([0] * 40 + [1] * 11 + [3] * 2)


def videos(labels=LABELS) -> VideoList:
    n = len(labels)
    return VideoList(list_path="l.csv", root="/r", paths=[f"ü{i}.mp4" for i in range(n)], labels=labels, lines=range(n))


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.1, [4, 1, 1]), (0.01, [1, 1, 1]), (0.5, [20, 6, 1]), (1, [40, 11, 2])]
)
def test_a_fraction_is_of_each_class_and_at_least_one(fraction, counts):
    drawn = draw_fraction(videos(), fraction, seed=0)
    assert np.unique(drawn.labels, return_counts=True)[1].tolist() == counts
    whole = [tuple(video) for video in videos()]
    places = [whole.index(tuple(video)) for video in drawn]
    assert places == sorted(set(places)) == drawn.lines.tolist()  # in the list's order, each once, with its own line


def test_the_seed_chooses_and_nothing_else():
    first, again, other = (draw_fraction(videos(), 0.3, seed) for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)
    assert set(draw_fraction(videos(), 0.1, 0)) < set(first)


RUN = [
    *("--model", "vit_tiny_patch8_64", "--input_size", "16", "--num_frames", "4", "--data_set", "custom"),
    *("--nb_classes", "2", "--batch_size", "2", "--epochs", "1", "--warmup_epochs", "0", "--test_num_segment", "1"),
    *("--sampling_rate", "1", "--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav"),
    *("--num_sample", "1", "--test_num_crop", "1", "--save_ckpt_freq", "1", "--disable_eval_during_finetuning"),
]


def test_a_run_trains_on_the_drawn_videos_and_resumes_with_the_same_only(tmp_path):
    names = write_videos(tmp_path, 8 * [6], size=(24, 24))
    for split in ("train", "test"):
        write_list(tmp_path / f"{split}.csv", *(f"{name} {i % 2}" for i, name in enumerate(names)))
    out = tmp_path / "out"

    def run(*flags):
        return start(main, *RUN, "--data_path", tmp_path, "--output_dir", out, *flags)

    done = run("--label_fraction", "0.5")
    assert done.returncode == 0, done.stderr
    assert "4 train, 8 test videos (--label_fraction 0.5 of 8, drawn with --seed 0)" in done.stdout
    assert torch.load(out / "checkpoint-0.pth", weights_only=True)["layout"]["num_videos"] == 4
    for flags, words in (
        ((), "label_fraction = 0.5, this run has label_fraction = 1.0"),
        (("--label_fraction", "0.5", "--seed", "1"), "seed = 0, this run has seed = 1"),
    ):
        done = run("--epochs", "2", *flags)
        assert done.returncode == 1 and words in done.stderr
    assert run("--epochs", "2", "--label_fraction", "0.5").returncode == 0
    for wrong in ("0", "1.5", "nan"):
        done = run("--label_fraction", wrong)
        assert done.returncode == 1 and "must be above 0 and at most 1" in done.stderr
