"""The files of a run's checkpoints: written whole or not at all, and read without running any code in them."""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors.torch import load_file

from utils import UserError, whole_file

LAST, PREVIOUS, BEST = "checkpoint-last.pth", "checkpoint-previous.pth", "checkpoint-best.pth"

# Besides tensors, text and numbers, published files hold flags (a Namespace, with paths) and learning rates
# (numpy scalars). Paths are read as PurePosixPath, which has no access to the disk.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "_local.PosixPath")),
    *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1 and 2
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that can't be used; the message names the file and says why and what to do."""


def save_checkpoint(path: str | Path, state: dict, *, keep_as: str = "") -> None:
    """Writes `state` to `path`, whole or not at all, and creates the folder where there is none.

    The file that `path` replaces gets the name `keep_as` in the same folder; by default it is deleted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        torch.save(state, file)
        if keep_as and path.exists():
            file.flush()
            os.fsync(file.fileno())  # the new file must be on the disk before the old one gives up its name
            path.replace(path.with_name(keep_as))


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint file (torch's formats or safetensors) to the CPU without running any code in it.

    It may hold tensors, numbers, text, and objects of the types in `HARMLESS`.

    Raises:
        CheckpointError: the file is missing or damaged, or loading it would run code.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch does not compare the checksums in its own format
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch.load raise any exception
        raise CheckpointError(f"{path}: not a readable checkpoint ({_reason(error)})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds one {type(state).__name__}, not a dict of weights")
    return state


def flags_of(state: dict) -> dict:
    """The flags in a checkpoint, {} where it has none; the published code stores them as a Namespace."""
    flags = state.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return flags if isinstance(flags, dict) else {}


def _reason(error: Exception) -> str:
    """Says in one line why a file was not read; torch's own message advises turning the protection off."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError) and (wanted := re.search(r"GLOBAL (\S+)", text)):
        return (
            f"refused: reading it would run {wanted[1]}; a checkpoint may hold tensors, numbers, text and "
            "argparse flags, so ask its author for a file with the weights only"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "damaged, or neither torch's format nor safetensors"
    return text.splitlines()[0] if text else type(error).__name__


def epoch_checkpoints(output_dir: str | Path) -> list[Path]:
    """Lists the files checkpoint-<epoch>.pth in a folder, last epoch first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)\.pth", p.name), p) for p in Path(output_dir).glob("*.pth")]
    return [p for m, p in sorted(((int(m[1]), p) for m, p in found if m), reverse=True)]


def newest_checkpoint(output_dir: str | Path, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """Reads the checkpoint of a folder with the most training in it: checkpoint-<epoch>.pth, `LAST` or `PREVIOUS`.

    Returns its path and content, or None where the folder has no checkpoints. Damaged checkpoints are skipped, with a
    warning to `report`.

    Raises:
        CheckpointError: all of them are damaged.
    """
    done = {path: (int(path.stem.rpartition("-")[2]), 0) for path in epoch_checkpoints(output_dir)}
    for path in (Path(output_dir) / LAST, Path(output_dir) / PREVIOUS):
        if path.is_file():
            done[path] = _position(path)
    for path in sorted(done, key=done.get, reverse=True):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            report(f"{error}; trying an older one")
    if done:
        advice = "repair or remove them, or start over with --no_auto_resume"
        raise CheckpointError(f"none of the checkpoints in {output_dir} can be read: {advice}")
    return None


def glance_at_checkpoint(path: str | Path) -> dict:
    """A file of torch's format without reading its tensors from the disk, for what else it holds.

    Raises:
        Exception: any, of a damaged file.
    """
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _position(path: Path) -> tuple[float, int]:
    """Returns the last finished epoch and the number of batches after it, without loading the tensors.

    A damaged file gets infinity: it is tried first, so that `read_checkpoint` reports it.
    """
    try:
        state = glance_at_checkpoint(path)
        return state["epoch"], state.get("batch", 0)
    except Exception:  # as in `read_checkpoint`
        return float("inf"), 0
