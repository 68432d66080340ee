"""The demo's table: what the fine-tunings' files say, compared video by video."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from clips.lists import read_list
from evaluation import Scores, write_results
from runs.checkpoints import save_checkpoint
from tools import demo_table

NAMES = ["left", "right", "up"]
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


def write_log(folder, *epochs):
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps({"epoch": e, "seconds": s}) + "\n" for e, s in epochs))


def write_run(folder, predicted: list[int], *, start: str = ""):
    """An output folder as run_class_finetuning.py leaves it; of 20 s, epoch 1 having been done twice."""
    write_log(folder, (0, 12.0), (1, 99.0), (1, 8.0))
    save_checkpoint(folder / "checkpoint-1.pth", {"epoch": 1, "args": {"finetune": start}})
    videos = folder.parent / "test.csv"
    videos.write_text("".join(f"{k}.mp4 {label}\n" for k, label in enumerate(LABELS)))
    fused = np.eye(len(NAMES), dtype=np.float32)[predicted]
    hits = np.zeros((len(LABELS), 2), dtype=np.int64)
    scores = Scores(np.arange(len(LABELS)), np.array(LABELS), fused, hits, 1, [])
    write_results(folder, scores, read_list(videos), NAMES)
    return folder


def test_gain_is_judged_by_pairs():
    reference = {"a": True, "b": False, "c": False, "d": True}
    better = {"d": True, "c": True, "b": False, "a": True}  # in another order
    found = demo_table.summarise(better, reference)
    assert found["top1"] == 75
    assert found["top1_error"] == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 4))
    assert found["gain"] == 25
    assert found["gain_error"] == pytest.approx(100 * np.std([0, 0, 1, 0]) / 2)
    same = demo_table.summarise(reference, reference)
    assert same["gain"] == same["gain_error"] == 0


def test_runs_on_other_videos_are_not_compared():
    with pytest.raises(ValueError, match="same videos"):
        demo_table.summarise({"a": True}, {"b": True})


def test_table_and_picture_tell_what_the_folders_hold(tmp_path, monkeypatch, capsys):
    pretrained = tmp_path / "adaptive"
    write_log(pretrained, (0, 30.0), (1, 40.0))
    right = write_run(tmp_path / "ours", LABELS, start=str(pretrained / "checkpoint-1.pth"))
    wrong = write_run(tmp_path / "scratch", [0] * len(LABELS))  # three of eight are of class 0
    flags = ["--output", str(tmp_path / "out"), "--runs", f"from AdaMAE={right}", f"from scratch={wrong}"]
    monkeypatch.setattr(sys, "argv", ["demo_table.py", *flags])
    demo_table.main()

    report = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert [r["top1"] for r in report.values()] == [100, 37.5]
    assert [r["gain"] for r in report.values()] == [62.5, 0]
    assert [r["seconds"] for r in report.values()] == [20, 20]
    assert [r["pretraining_seconds"] for r in report.values()] == [70, 0]
    table = (tmp_path / "out" / "finetuning.md").read_text()
    assert capsys.readouterr().out == table
    assert "| from AdaMAE | 100.0 ± 0.0 | +62.5 ± 17.1 | 20 | 70 |" in table
    assert "| from scratch | 37.5 ± 17.1 | - | 20 | - |" in table
    assert Image.open(tmp_path / "out" / "finetuning.png").width > 600


def test_confusion_is_in_shares_of_the_true_class(tmp_path):
    folder = write_run(tmp_path / "run", [0, 1, 2, 1, 1, 2, 0, 1])
    names, shares = demo_table.read_confusion(folder)
    assert names == NAMES
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 0, 1]])
