"""The fine-tuning program: training, best checkpoint, multi-view test, probes, bad input, many processes."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from golden import ROOT
from programs import Done, start, start_process
from videos import write_video

from modeling_pretrain import create_pretrain_model
from run_class_finetuning import get_args_parser, main

PROGRAM = "run_class_finetuning.py"
SMALL_RUN = [
    *("--model", "vit_tiny_patch8_64", "--input_size", "32", "--data_set", "custom", "--nb_classes", "3"),
    *("--batch_size", "4", "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.05", "--sampling_rate", "1"),
    *("--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav", "--num_sample", "1"),
    *("--save_ckpt_freq", "1", "--log_freq", "1", "--test_num_segment", "2", "--test_num_crop", "2"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three lists over nine videos; two of them have the same name in different folders."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(9):
        name = f"{'ab'[i % 2]} folder/{i // 2}.mp4"
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / name, 18 + i, size=(40, 48))
        lines.append(f"{name}{'  ' if i % 3 else chr(9)}{i % 3}\n")
    for split, part in (("train", lines[:8]), ("val", lines[:5]), ("test", lines[:7])):
        (folder / f"{split}.csv").write_text("".join(part))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-training checkpoint in the published form."""
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-799.pth"
    torch.manual_seed(0)
    model = create_pretrain_model("pretrain_videomae_tiny_patch8_64", input_size=32, mask_ratio=0.9)
    torch.save({"model": model.state_dict(), "epoch": 799}, path)
    return path


def finetune(data, output, *flags, processes: int = 0) -> Done:
    """A run that must succeed; `processes` of its own, or with 0 in this one."""
    flags = (*SMALL_RUN, "--data_path", data, "--output_dir", output, *flags)
    done = start_process(PROGRAM, *flags, processes=processes) if processes else start(main, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def result(output) -> dict:
    return json.loads((output / "test.json").read_text())


@pytest.fixture(scope="module")
def straight(data, pretrained, tmp_path_factory):
    """A run of two epochs, with a moving average, that nothing interrupted."""
    output = tmp_path_factory.mktemp("straight")
    flags = ["--finetune", pretrained, "--model_ema", "--model_ema_decay", "0.5"]
    return output, finetune(data, output, *flags, processes=1).stdout, flags


def test_a_run_trains_validates_and_tests(straight):
    output, console, _ = straight
    entries = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    assert [e["epoch"] for e in entries] == [0, 1]
    assert set(entries[0]["validation"]) == {"model", "ema"}
    assert "freshly initialised: fc_norm.* (2), head.* (2)" in console
    assert "7 videos x 4 views" in console
    assert {"top1", "top5", "mean_class_accuracy", "view_top1", "view_top5"} <= set(result(output))
    assert result(output)["videos"] == 7


def test_the_best_of_weights_and_average_is_kept_and_tested(straight):
    output, _, _ = straight
    state = torch.load(output / "checkpoint-best.pth", weights_only=True)
    entries = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    found = [(v["top1"], e["epoch"], name) for e in entries for name, v in e["validation"].items()]
    assert state["best"]["top1"] == max(top1 for top1, _, _ in found)
    assert (state["best"]["top1"], state["best"]["epoch"], state["best"]["source"]) in found
    key = "model_ema" if state["best"]["source"] == "ema" else "model"
    epoch = torch.load(output / f"checkpoint-{state['best']['epoch']}.pth", weights_only=True)
    assert same(state["model"], epoch[key])
    assert result(output)["tested"] == str(output / "checkpoint-best.pth")


def test_the_last_weights_can_be_tested_instead(straight, data, tmp_path):
    """Also by --eval; the best are still chosen and kept."""
    output, _, flags = straight
    trained, again, last = tmp_path / "trained", tmp_path / "again", tmp_path / "last"
    done = finetune(data, trained, *flags, "--test_last")
    assert "testing the last weights" in done.stdout and (trained / "checkpoint-best.pth").is_file()
    finetune(data, last, "--eval", "--finetune", output / "checkpoint-1.pth")
    shutil.copytree(trained, again)
    finetune(data, again, "--eval", "--test_last")
    assert result(again)["tested"] == str(again / "checkpoint-1.pth")
    scores = [np.load(folder / "scores.npz")["scores"] for folder in (trained, again, last)]
    assert (scores[0] == scores[2]).all() and (scores[1] == scores[2]).all()


def test_the_files_of_a_test_agree(straight, data):
    output, _, _ = straight
    rows = list(csv.DictReader((output / "predictions.csv").open()))
    scores = np.load(output / "scores.npz")
    assert len(rows) == len({r["video"] for r in rows}) == 7  # equal names in two folders are two videos
    assert [r["video"] for r in rows] == scores["videos"].tolist()
    assert [int(r["class_1"]) for r in rows] == scores["scores"].argmax(1).tolist()
    np.testing.assert_allclose(scores["scores"].sum(1), 1, atol=1e-5)
    right = sum(r["label"] == r["class_1"] for r in rows)
    assert result(output)["top1"] == pytest.approx(100 * right / 7)
    confusion = np.array([row[1:] for row in csv.reader((output / "confusion.csv").open())][1:], int)
    assert confusion.sum() == 7 and confusion.trace() == right
    assert (output / "confusion.png").stat().st_size > 5000


def test_a_resumed_run_equals_a_straight_one_and_remembers_the_best(straight, data, tmp_path):
    output, _, flags = straight
    for name in ("checkpoint-0.pth", "checkpoint-best.pth"):
        shutil.copy(output / name, tmp_path / name)
    done = finetune(data, tmp_path, *flags, "--num_workers", "2")
    assert "checkpoint-0.pth: 1 of 2 epochs are done" in done.stdout
    assert same(weights(tmp_path / "checkpoint-1.pth"), weights(output / "checkpoint-1.pth"))
    ours, theirs = (torch.load(p / "checkpoint-1.pth", weights_only=True) for p in (tmp_path, output))
    assert ours["best"] == theirs["best"]
    assert same(ours["model_ema"], theirs["model_ema"])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_count_each_video_once(straight, data, tmp_path, processes):
    """Seven videos over two and three gloo ranks give the very scores of one process."""
    output, _, _ = straight
    finetune(data, tmp_path, "--eval", "--finetune", output / "checkpoint-best.pth", processes=processes)
    ours, theirs = np.load(tmp_path / "scores.npz"), np.load(output / "scores.npz")
    assert ours["videos"].tolist() == theirs["videos"].tolist()
    np.testing.assert_allclose(ours["scores"], theirs["scores"], rtol=1e-5)
    assert result(tmp_path)["top1"] == result(output)["top1"]


def test_two_processes_train(data, tmp_path):
    done = finetune(data, tmp_path, "--epochs", "1", "--batch_size", "2", processes=2)
    assert "2 processes x 2 videos x 1 batch a step = 4" in done.stdout


def test_logits_can_be_averaged_instead(straight, data, tmp_path):
    output, _, _ = straight
    best = output / "checkpoint-best.pth"
    finetune(data, tmp_path, "--eval", "--finetune", best, "--view_fusion", "logits")
    assert np.load(tmp_path / "scores.npz")["scores"].sum(1) != pytest.approx(1)
    ours, theirs = result(tmp_path), result(output)
    both = [f"{top}_{fusion}" for top in ("top1", "top5") for fusion in ("softmax", "logits")]
    assert [ours[name] for name in both] == [theirs[name] for name in both]
    assert (ours["top1"], theirs["top1"]) == (ours["top1_logits"], ours["top1_softmax"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--linear_probe", "--probe_batch_norm", "--opt", "lars", "--weight_decay", "0", "--layer_decay", "1"],
        ["--attentive_probe", "--mixup", "0", "--cutmix", "0", "--smoothing", "0"],
        ["--linear_probe", "--opt", "sgd"],
    ],
)
def test_probes_train_the_head_alone(data, pretrained, tmp_path, flags):
    finetune(data, tmp_path, "--finetune", pretrained, "--epochs", "1", *flags)
    trained, before = weights(tmp_path / "checkpoint-0.pth"), weights(pretrained)
    assert torch.equal(trained["encoder.blocks.0.attn.qkv.weight"], before["encoder.blocks.0.attn.qkv.weight"])
    assert result(tmp_path)["videos"] == 7
    again = tmp_path / "again"
    finetune(data, again, "--eval", "--finetune", tmp_path / "checkpoint-best.pth", *flags)
    assert result(again)["top1"] == result(tmp_path)["top1"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--sampling", "segments", "--flip", "false", "--update_freq", "2", "--clip_grad", "1", "--slot_pooling"],
        ["--use_cls", "--use_checkpoint", "--drop", "0.1", "--aa", "none", "--amp", "bf16", "--crop_scale", "0.5", "1"],
        [
            *("--model", "vit_tiny_mae_st_patch8_64", "--fc_drop_rate", "0.3"),
            *("--num_frames", "8", "--train_short_side", "36"),
        ],
        ["--enable_deepspeed", "--zero_stage", "1"],
        ["--disable_eval_during_finetuning", "--no_save_ckpt", "--recount", "2", "--num_sample", "2"],
        ["--test_num_segment", "1", "--test_num_crop", "1", "--random_validation", "--no_dist_eval"],
    ],
)
def test_variants_run(data, tmp_path, flags):
    finetune(data, tmp_path, "--epochs", "1", *flags)
    assert result(tmp_path)["videos"] == 7
    assert (tmp_path / "checkpoint-0.pth").exists() != ("--no_save_ckpt" in flags)


def test_unreadable_test_videos_are_listed_counted_as_wrong_and_end_with_status_1(straight, data, tmp_path):
    output, _, _ = straight
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    lines = [f"{data}/{line}" for line in (data / "test.csv").read_text().splitlines()]
    (tmp_path / "test.csv").write_text("\n".join([*lines, "broken.mp4 1"]))
    flags = [*SMALL_RUN, "--eval", "--finetune", output / "checkpoint-best.pth", "--data_path", tmp_path]
    done = start(main, *flags, "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert "unreadable test video" in done.stderr and "broken.mp4" in done.stderr
    assert "broken.mp4" in (tmp_path / "out" / "unreadable.csv").read_text()
    found = result(tmp_path / "out")
    assert found["videos"] == 8 and found["top1"] == pytest.approx(result(output)["top1"] * 7 / 8)
    skipped = start(main, *flags, "--output_dir", tmp_path / "skip", "--skip_unreadable")
    assert skipped.returncode == 0
    assert result(tmp_path / "skip")["top1"] == pytest.approx(result(output)["top1"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nb_classes", "2"], "2"),
        (["--data_set", "SSV2", "--nb_classes", "3"], "--nb_classes 3, but SSV2 has 174 classes"),
        (["--data_path", "missing"], "missing does not exist"),
        (["--data_path", ""], "--data_path is missing"),
        (["--model", "vit_base"], "--model vit_base: no such model"),
        (["--num_frames", "5"], "num_frames"),
        (["--linear_probe"], "--finetune"),
        (["--eval", "--output_dir", ""], "--finetune"),
        (["--finetune", "missing.pth"], "missing.pth"),
        (["--aa", "rond-m7"], "--aa rond-m7"),
        (["--layer_decay", "-1"], "--layer_decay -1"),
    ],
)
def test_wrong_settings_are_one_line_that_says_what_to_change(data, tmp_path, flags, words):
    done = start(main, *SMALL_RUN, "--data_path", data, "--output_dir", tmp_path / "out", *flags)
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_label_out_of_range_names_list_line_and_both_numbers(data, tmp_path):
    for split in ("train", "val", "test"):
        shutil.copy(data / f"{split}.csv", tmp_path)
    (tmp_path / "val.csv").write_text("# a comment\nx.mp4 0\ny.mp4 3\n")
    done = start(main, *SMALL_RUN, "--data_path", tmp_path)
    assert done.returncode != 0
    assert re.search(r"val\.csv.*line 3", done.stderr) and "3" in done.stderr
    assert "--nb_classes" in done.stderr


def test_a_checkpoint_of_another_width_is_refused(data, tmp_path):
    model = create_pretrain_model("pretrain_videomae_small_patch16_224", mask_ratio=0.9, decoder_depth=1)
    torch.save({"model": model.state_dict()}, tmp_path / "small.pth")
    done = start(main, *SMALL_RUN, "--data_path", data, "--finetune", tmp_path / "small.pth")
    assert done.returncode != 0 and "small.pth" in done.stderr and "384" in done.stderr


def test_a_pretrained_checkpoint_cannot_be_tested(data, pretrained):
    done = start(main, *SMALL_RUN, "--data_path", data, "--eval", "--finetune", pretrained)
    assert done.returncode != 0 and "--eval needs a fine-tuned checkpoint" in done.stderr


def test_every_flag_is_read():
    """Each flag's name stands in the program or in what it shares; resuming reads its own by name."""
    files = (PROGRAM, "runs/flags.py", "runs/assembly.py", "runs/resuming.py", "runs/probe_flags.py")
    source = "".join((ROOT / name).read_text() for name in files)
    for action in get_args_parser()._actions:
        if action.dest != "help":
            assert f"args.{action.dest}" in source or f'flags["{action.dest}"]' in source, action.dest


def test_published_flags_and_defaults():
    args = get_args_parser().parse_args([])
    expected = {
        "batch_size": 64,
        "epochs": 30,
        "update_freq": 1,
        "save_ckpt_freq": 100,
        "model": "vit_base_patch16_224",
        "drop_path": 0.1,
        "model_ema_decay": 0.9999,
        "lr": 1e-3,
        "layer_decay": 0.75,
        "min_lr": 1e-6,
        "warmup_epochs": 5,
        "num_sample": 2,
        "aa": "rand-m7-n4-mstd0.5-inc1",
        "smoothing": 0.1,
        "train_interpolation": "bicubic",
        "reprob": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_switch_prob": 0.5,
        "init_scale": 0.001,
        "data_set": "Kinetics-400",
        "weight_decay": 0.05,
    }
    assert {name: getattr(args, name) for name in expected} == expected
