"""Checkpoints: written whole or not at all, resumed from the newest valid one, read without running code."""

import argparse
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from modeling_finetune import SIZES, TUBELET
from modeling_pretrain import PRETRAIN_MODELS, PretrainVisionTransformer, create_pretrain_model


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used; the message names the file and says why and what to do."""


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Writes `state` to `path` through a temporary file that is flushed to disk and then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint file to the CPU without running any code in it.

    The published files hold an argparse.Namespace beside tensors and numbers, and that is allowed too.

    Raises:
        CheckpointError: the file is missing, damaged, or holds objects that would have to be executed.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch's own format, with a checksum for each tensor that torch ignores
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets in a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error


def epoch_checkpoints(output_dir: str | Path) -> list[Path]:
    """The files checkpoint-<epoch>.pth in a folder, newest epoch first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)\.pth", p.name), p) for p in Path(output_dir).glob("*.pth")]
    return [p for m, p in sorted(((int(m[1]), p) for m, p in found if m), reverse=True)]


def newest_checkpoint(output_dir: str | Path, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of a folder and its content; a damaged one is reported, then passed."""
    for path in epoch_checkpoints(output_dir):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            report(f"{error}; trying an older one")
    return None


def check_resumable(path: Path, old: dict, new: dict) -> None:
    """Compares the model settings of a checkpoint with those of this run.

    Raises:
        CheckpointError: names the setting, both values, and what to do.
    """
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            raise CheckpointError(
                f"{path} was made with {name} = {old[name]}, this run has {name} = {new[name]}; "
                "use the same flags, another --output_dir, or --no_auto_resume"
            )


def guess_pretrain_settings(weights: dict[str, Tensor]) -> dict:
    """Settings for `create_pretrain_model` from the shapes of a published AdaMAE or VideoMAE checkpoint.

    Frames and pixels can't be told from the shapes alone; they are those of the model's name (16 frames).

    Raises:
        CheckpointError: the widths are those of no known model.
    """
    kernel = weights["encoder.patch_embed.proj.weight"]  # (D,3,tubelet,p,p)
    dim, patch = kernel.shape[0], kernel.shape[-1]
    for name in sorted(PRETRAIN_MODELS):
        size, of_name = next(s for k, s in SIZES.items() if f"_{k}_" in name), re.search(r"patch(\d+)", name)
        if size.dim == dim and int(of_name[1]) == patch and kernel.shape[2] == TUBELET:
            blocks = {k.split(".")[2] for k in weights if k.startswith("decoder.blocks.")}
            adaptive = "encoder.pos_embed_probs" in weights
            return {
                "name": name,
                "decoder_depth": len(blocks),
                "mask_type": "adaptive" if adaptive else "tube",
                "mask_ratio": 0.95 if adaptive else 0.9,
            }
    raise CheckpointError(f"no known pre-training model has width {dim} and patch {patch}")


def load_pretrain_model(path: str | Path, **changes) -> PretrainVisionTransformer:
    """The pre-training model of a checkpoint of ours or of the published code, in evaluation mode.

    Args:
        changes: settings of `create_pretrain_model` to use instead of the checkpoint's, e.g. `mask_ratio`.

    Raises:
        CheckpointError: the file is unreadable, no pre-training checkpoint, or doesn't fit the settings.
    """
    state = read_checkpoint(path)
    weights = state.get("model", state.get("module", state))
    if "encoder.patch_embed.proj.weight" not in weights:
        raise CheckpointError(f"{path}: not a pre-training checkpoint (no encoder.patch_embed.proj.weight)")
    settings = {**(state.get("model_settings") or guess_pretrain_settings(weights)), **changes}
    model = create_pretrain_model(**settings)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {settings['name']}: {error}") from error
    return model.eval()
