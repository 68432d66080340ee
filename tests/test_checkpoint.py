"""Checkpoints: whole or not at all, read without running code, published files recognised."""

import argparse
import os
import pickle

import pytest
import torch

from checkpoint import (
    CheckpointError,
    check_resumable,
    epoch_checkpoints,
    load_pretrain_model,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from modeling_pretrain import create_pretrain_model

TINY = "pretrain_videomae_tiny_patch8_64"


def test_round_trip_and_no_temporary_files(tmp_path):
    path = tmp_path / "new" / "checkpoint-0.pth"
    save_checkpoint(path, {"model": {"w": torch.arange(3)}, "epoch": 0})
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.arange(3))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint-0.pth"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-0.pth"
    save_checkpoint(path, {"epoch": 0})

    def full_disk(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"epoch": 1})
    assert read_checkpoint(path)["epoch"] == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_the_newest_is_the_highest_number(tmp_path):
    for name in ("checkpoint-9.pth", "checkpoint-10.pth", "checkpoint-best.pth", "other-11.pth"):
        save_checkpoint(tmp_path / name, {"name": name})
    assert [p.name for p in epoch_checkpoints(tmp_path)] == ["checkpoint-10.pth", "checkpoint-9.pth"]
    path, state = newest_checkpoint(tmp_path, print)
    assert path.name == state["name"] == "checkpoint-10.pth"


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_file_is_named_and_passed_over(tmp_path, damage):
    for epoch in (0, 1):
        save_checkpoint(tmp_path / f"checkpoint-{epoch}.pth", {"w": torch.zeros(5000), "epoch": epoch})
    newest = tmp_path / "checkpoint-1.pth"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    newest.write_bytes({"truncated": content[:3000], "empty": b"", "flipped": content}[damage])
    reports = []
    path, state = newest_checkpoint(tmp_path, reports.append)
    assert path.name == "checkpoint-0.pth" and state["epoch"] == 0
    assert len(reports) == 1 and "checkpoint-1.pth" in reports[0]


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path, print) is None


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    if form == "torch":
        torch.save({"model": Attack()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Attack()}))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_checkpoint(path)
    assert not (tmp_path / "attacked").exists()


def test_published_files_with_a_namespace_are_read(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=0.1, opt_betas=[0.9, 0.95])}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["args"].lr == 0.1


@pytest.mark.parametrize("mask_type", ["adaptive", "tube"])
def test_a_published_checkpoint_tells_its_model(tmp_path, mask_type):
    """No settings of ours in the file: size, depth of the decoder and sampler come from the shapes."""
    model = create_pretrain_model(
        "pretrain_videomae_small_patch16_224", mask_type=mask_type, mask_ratio=0.9, decoder_depth=2
    )
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "epoch": 799})
    loaded = load_pretrain_model(tmp_path / "a.pth")
    assert loaded.masking.mask_type == mask_type and len(loaded.decoder.blocks) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not loaded.training


def test_our_checkpoint_rebuilds_its_model_with_changes(tmp_path):
    settings = {
        "name": TINY,
        "input_size": 32,
        "num_frames": 8,
        "mask_ratio": 0.75,
        "pos_embed": "sinusoid_3d",
    }
    model = create_pretrain_model(**settings)
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "model_settings": settings})
    loaded = load_pretrain_model(tmp_path / "a.pth", mask_ratio=0.5)
    assert loaded.window == (4, 4, 4) and loaded.masking.num_visible == 32
    assert torch.equal(loaded.positions, model.positions)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"model": {"head.weight": torch.zeros(3)}}, "not a pre-training checkpoint"),
        ({"model": {"encoder.patch_embed.proj.weight": torch.zeros(40, 3, 2, 16, 16)}}, "width 40"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, state, words):
    save_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=words):
        load_pretrain_model(tmp_path / "a.pth")


def test_a_changed_setting_is_named_with_both_values(tmp_path):
    with pytest.raises(CheckpointError, match=r"mask_ratio = 0\.9, this run has mask_ratio = 0\.95"):
        check_resumable(tmp_path / "a.pth", {"mask_ratio": 0.9, "old": 1}, {"mask_ratio": 0.95})
