"""Checkpoints: whole or not at all, read without running code, published files recognised."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modeling_pretrain import create_pretrain_model
from runs.checkpoints import CheckpointError, epoch_checkpoints, newest_checkpoint, read_checkpoint, save_checkpoint
from runs.resuming import check_resumable
from weights.names import load_weights
from weights.pretraining import load_pretrain_model

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
    def __init__(self, function, *values):
        self.call = function, values

    def __reduce__(self):
        return self.call


ATTACKS = {
    "system": Attack(os.system, "touch attacked"),
    "exec": Attack(exec, "open('attacked', 'w')"),
    "method": Attack(getattr, Path("attacked"), "touch"),
    "numpy": Attack(np.save, "attacked", 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, form, attack):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    state = {"model": ATTACKS[attack]}
    if form == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(CheckpointError, match=r"evil\.pth: .*refused: reading it would run \S+;") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    assert not list(tmp_path.glob("attacked*"))


def test_a_file_of_something_else_is_refused_in_one_line(tmp_path):
    (tmp_path / "video.pth").write_bytes(b"\x00\x00\x00\x20ftypisom" * 9)
    with pytest.raises(CheckpointError, match=r"video\.pth: .*damaged, or neither torch's format") as caught:
        read_checkpoint(tmp_path / "video.pth")
    assert "\n" not in str(caught.value)


def test_published_files_with_a_namespace_are_read(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=0.1, opt_betas=[0.9, 0.95])}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["args"].lr == 0.1


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.125),  # a learning rate from the published schedules, which are numpy arrays
        np.float32(0.5),
        np.int64(7),
        OrderedDict(a=1),
        torch.Size([2, 3]),
        {1, 2},
        torch.float16,
    ],
    ids=lambda value: type(value).__name__,
)
def test_harmless_values_are_read_as_they_were(tmp_path, value):
    torch.save({"value": value}, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")["value"]
    assert read == value and type(read) is type(value)


def test_a_path_is_read_without_access_to_the_disk(tmp_path):
    torch.save({"value": Path("/data/ssv2")}, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")["value"]
    assert type(read) is PurePosixPath and str(read) == "/data/ssv2"


def rename_in_pickle(path, old, new):
    """Rewrites a torch file so that its pickle names other modules, as older versions wrote them."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_numpy_scalars_of_both_major_versions_are_read(tmp_path, core):
    torch.save({"lr": np.float64(0.125)}, tmp_path / "a.pth")
    ours = np.float64.__reduce__(np.float64())[0].__module__.removesuffix("multiarray").encode()
    rename_in_pickle(tmp_path / "a.pth", ours, core)
    assert read_checkpoint(tmp_path / "a.pth")["lr"] == 0.125


@pytest.mark.parametrize("mask_type", ["adaptive", "tube"])
def test_a_published_checkpoint_is_rebuilt(tmp_path, mask_type):
    """No settings of ours in the file: size, depth of the decoder and sampler come from the shapes."""
    model = create_pretrain_model(
        "pretrain_videomae_small_patch16_224", mask_type=mask_type, mask_ratio=0.9, decoder_depth=2
    )
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "epoch": 799})
    loaded = load_pretrain_model(load_weights(tmp_path / "a.pth"))
    assert loaded.masking.mask_type == mask_type and len(loaded.decoder.blocks) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not loaded.training


def test_our_checkpoint_rebuilds_its_model_with_changes(tmp_path):
    settings = {"name": TINY, "input_size": 32, "num_frames": 8, "mask_ratio": 0.75, "pos_embed": "sinusoid_3d"}
    model = create_pretrain_model(**settings)
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "model_settings": settings})
    loaded = load_pretrain_model(load_weights(tmp_path / "a.pth"), mask_ratio=0.5)
    assert loaded.window == (4, 4, 4) and loaded.masking.num_visible == 32
    assert torch.equal(loaded.decoder.positions, model.decoder.positions)


DECODER = {"encoder_to_decoder.weight": torch.zeros(20, 40)}  # tells a pre-training checkpoint


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"model": {"head.weight": torch.zeros(3)}}, "not a pre-training checkpoint"),
        ({"model": {"encoder.patch_embed.proj.weight": torch.zeros(40, 3, 2, 16, 16), **DECODER}}, "width 40"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, state, words):
    save_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=words):
        load_pretrain_model(load_weights(tmp_path / "a.pth"))


def test_a_changed_setting_is_named_with_both_values(tmp_path):
    with pytest.raises(CheckpointError, match=r"mask_ratio = 0\.9, this run has mask_ratio = 0\.95"):
        check_resumable(tmp_path / "a.pth", {"mask_ratio": 0.9, "old": 1}, {"mask_ratio": 0.95})


def tags_of_deepspeed(folder, names, latest):
    for i, name in enumerate(names):
        save_checkpoint(folder / name / "mp_rank_00_model_states.pt", {"module": {"w": torch.tensor([i])}})
    if latest:
        (folder / "latest").write_text(f"{latest}\n")


@pytest.mark.parametrize(
    ("names", "latest", "path", "expected"),
    [
        (["checkpoint-3"], None, "checkpoint-3/mp_rank_00_model_states.pt", 0),
        (["checkpoint-3", "checkpoint-9"], None, "checkpoint-9", 1),
        (["checkpoint-3", "checkpoint-9"], "checkpoint-3", "", 0),
        (["checkpoint-3"], None, "", 0),
    ],
)
def test_weights_of_a_deepspeed_folder(tmp_path, names, latest, path, expected):
    tags_of_deepspeed(tmp_path, names, latest)
    assert load_weights(tmp_path / path).tensors == {"w": torch.tensor([expected])}


def test_a_folder_of_several_tags_or_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none of mp_rank_00_model_states\.pt, model\.safetensors"):
        load_weights(tmp_path)
    tags_of_deepspeed(tmp_path, ["a", "b"], None)
    with pytest.raises(CheckpointError, match=r"choose one of .*/a, .*/b"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("state", "key", "expected"),
    [
        ({"model": {"w": 1}, "module": {"w": 2}}, "model|module", 1),
        ({"module": {"w": 2}}, "model|module", 2),
        ({"model": {"w": 1}, "model_ema": {"module.w": 3}}, "model_ema", 3),
        ({"model_state": {"w": 4}, "cfg": "text"}, "model|module", 4),
        ({"w": 5}, "model|module", 5),
        ({"model": {"module._orig_mod.w": 6}}, "model|module", 6),
    ],
)
def test_weights_are_found_under_their_key(tmp_path, state, key, expected):
    def tensors(value):
        if isinstance(value, dict):
            return {k: tensors(v) for k, v in value.items()}
        return torch.tensor([value]) if isinstance(value, int) else value

    save_checkpoint(tmp_path / "a.pth", tensors(state))
    assert load_weights(tmp_path / "a.pth", model_key=key).tensors == {"w": torch.tensor([expected])}


def test_an_absent_key_names_what_there_is(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": {"w": torch.zeros(1)}, "epoch": 3})
    with pytest.raises(CheckpointError, match=r"no weights under model_ema .*--model_key.* holds model, epoch"):
        load_weights(tmp_path / "a.pth", model_key="model_ema")


def test_a_prefix_chooses_and_is_removed(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": {"student.w": torch.ones(1), "teacher.w": torch.zeros(1)}})
    for prefix in ("student", "student."):
        found = load_weights(tmp_path / "a.pth", prefix=prefix)
        assert found.tensors == {"w": torch.ones(1)} and found.ignored == ["teacher.w"]
    with pytest.raises(CheckpointError, match=r"--model_prefix pupil\."):
        load_weights(tmp_path / "a.pth", prefix="pupil")


def test_flags_and_settings_come_with_the_weights(tmp_path):
    state = {"model": {"w": torch.zeros(1)}, "args": argparse.Namespace(num_frames=8), "model_settings": {"name": "x"}}
    save_checkpoint(tmp_path / "a.pth", state)
    found = load_weights(tmp_path / "a.pth")
    assert found.flags == {"num_frames": 8} and found.settings == {"name": "x"} and found.kind == ""


@pytest.mark.parametrize("form", ["safetensors", "deepspeed"])
def test_a_pretraining_model_from_other_containers(tmp_path, form):
    model = create_pretrain_model("pretrain_videomae_small_patch16_224", decoder_depth=1)
    if form == "safetensors":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    else:
        save_checkpoint(tmp_path / "mp_rank_00_model_states.pt", {"module": model.state_dict()})
    loaded = load_pretrain_model(load_weights(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
