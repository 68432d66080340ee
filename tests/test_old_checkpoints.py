"""Checkpoints written before the code moved into rooms still resume, and end where the old code ended.

The kernels have changed since (the embedding was a convolution), so the numbers are equal but for their rounding.

tests/files/before_rooms holds nine tiny videos and, for each program, the checkpoint of a run that a SIGTERM stopped
mid-epoch, and the weights and the log at the end of that run, all made by the code as it was then.
"""

import json
import shutil

import pytest
import torch
from golden import ROOT
from programs import start
from safetensors import safe_open

import modeling_finetune
import modeling_pretrain
import run_class_finetuning
import run_mae_pretraining
from runs.checkpoints import read_checkpoint

FILES = ROOT / "tests" / "files" / "before_rooms"
COMMON = [
    *("--batch_size", "2", "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.5", "--sampling_rate", "1"),
    *("--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav", "--input_size", "32"),
    *("--save_ckpt_freq", "2", "--log_freq", "2", "--num_sample", "2"),
]
PROGRAMS = {
    "pretraining": (
        run_mae_pretraining.main,
        *("--model", "pretrain_videomae_nano_patch8_64", "--vis_freq", "0", "--decoder_depth", "1"),
        *("--mask_ratio", "0.85", "--data_path", "train.csv", "--sampler_amp", "false"),
    ),
    "finetuning": (
        run_class_finetuning.main,
        *("--model", "vit_nano_patch8_64", "--data_set", "custom", "--nb_classes", "3", "--model_ema"),
        *("--model_ema_decay", "0.9", "--test_num_segment", "1", "--test_num_crop", "1", "--drop_path", "0.2"),
        *("--data_path", "."),
    ),
}


@pytest.fixture
def nano(monkeypatch):
    """A size so small that its checkpoints can be kept."""
    size = modeling_finetune.Size(dim=16, depth=1, heads=2, decoder_dim=8, decoder_heads=1)
    monkeypatch.setitem(modeling_finetune.SIZES, "nano", size)
    monkeypatch.setitem(modeling_finetune.CLASSIFIERS, "vit_nano_patch8_64", modeling_finetune.VIDEOMAE)
    names = modeling_pretrain.PRETRAIN_MODELS | {"pretrain_videomae_nano_patch8_64": modeling_pretrain.VIDEOMAE}
    monkeypatch.setattr(modeling_pretrain, "PRETRAIN_MODELS", names)
    monkeypatch.setattr(run_mae_pretraining, "PRETRAIN_MODELS", names)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_run_stopped_by_the_old_code_ends_as_the_old_code_ended_it(kind, nano, tmp_path, monkeypatch):
    main, *flags = PROGRAMS[kind]
    monkeypatch.chdir(FILES / "videos")
    for file in FILES.glob(f"{kind}-checkpoint-*.pth"):
        shutil.copy(file, tmp_path / file.name.removeprefix(f"{kind}-"))
    done = start(main, *COMMON, *flags, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-last.pth: 1 of 2 epochs are done, and 2 of 4 batches of the next" in done.stdout
    assert "changed since then" not in done.stdout

    state = read_checkpoint(tmp_path / "checkpoint-1.pth")
    with safe_open(FILES / f"{kind}-end.safetensors", "pt") as end:
        for name in end.keys():  # noqa: SIM118 - not a dict
            part, _, key = name.partition(".")
            torch.testing.assert_close(state[part][key], end.get_tensor(name), rtol=1e-4, atol=1e-6)
    ours = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    theirs = json.loads((FILES / f"{kind}-log.txt").read_text().splitlines()[-1])
    timed = {"seconds", "clips_per_second", "data_wait"}
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - timed:
        is_number = isinstance(theirs[name], float)
        assert ours[name] == (pytest.approx(theirs[name], rel=1e-4) if is_number else theirs[name]), name
