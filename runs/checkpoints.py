"""Checkpoints: written whole or not at all, resumed from the newest valid one, read without running code.

Files of ours, of the published AdaMAE, VideoMAE and MAE-ST code, of PySlowFast, DeepSpeed and Hugging Face
are recognised by what they hold, and their weights given the names of the published code.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling_blocks import TUBELET
from modeling_finetune import SIZES
from modeling_pretrain import PRETRAIN_MODELS, PretrainVisionTransformer, create_pretrain_model
from utils import UserError

# What the published files hold beside tensors, text and numbers: flags, and learning rates taken from a
# schedule in numpy. Paths become such as can't touch the disk.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "_local.PosixPath")),
    *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1 and 2
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]

# Hugging Face's names of a VideoMAE, in the order they are replaced, and the published ones.
HUGGING_FACE_NAMES = {
    r"^(videomae\.)?embeddings\.patch_embeddings\.projection\.": "encoder.patch_embed.proj.",
    r"^(videomae\.)?encoder\.layer\.": "encoder.blocks.",
    r"^decoder\.decoder_layers\.": "decoder.blocks.",
    r"^(videomae\.)?layernorm\.": "encoder.norm.",
    r"^classifier\.": "head.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.attention\.attention\.(q|v)(uery|alue)?[._]bias$": r".attn.\1_bias",
}


LAST, PREVIOUS = "checkpoint-last.pth", "checkpoint-previous.pth"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that can't be used; the message names the file and says why and what to do."""


class Weights(NamedTuple):
    """The weights found in a checkpoint, under the published names, and what the file tells of them."""

    tensors: dict[str, Tensor]
    kind: str  # e.g. "AdaMAE pre-training"; "" for a model that is none of the known ones
    settings: dict  # keyword arguments that rebuild the model; empty in files that are not ours
    flags: dict  # of the run that made the file; empty where it doesn't tell
    ignored: list[str]  # names that don't start with the prefix asked for


def save_checkpoint(path: str | Path, state: dict, *, keep_as: str = "") -> None:
    """Writes `state` to `path` through a temporary file that is flushed to disk and then renamed.

    The file that has stood there gets the name `keep_as`, if one is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if keep_as and path.exists():
            path.replace(path.with_name(keep_as))
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too outlives a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint file (torch's formats or safetensors) to the CPU without running any code in it.

    Beside tensors, numbers and text it may hold what the published files do: `HARMLESS`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds objects that would have to be executed.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch's own format, with a checksum for each tensor that torch ignores
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets in a damaged file
        raise CheckpointError(f"{path}: not a readable checkpoint ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Why a file was not read, in one line. Torch's own message advises to switch the protection off."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError) and (wanted := re.search(r"GLOBAL (\S+)", text)):
        return (
            f"refused: reading it would run {wanted[1]}; a checkpoint may hold tensors, numbers, text and "
            "argparse flags, so ask its author for a file of the weights alone"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "damaged, or neither torch's format nor safetensors"
    return text.splitlines()[0] if text else type(error).__name__


def epoch_checkpoints(output_dir: str | Path) -> list[Path]:
    """The files checkpoint-<epoch>.pth in a folder, newest epoch first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)\.pth", p.name), p) for p in Path(output_dir).glob("*.pth")]
    return [p for m, p in sorted(((int(m[1]), p) for m, p in found if m), reverse=True)]


def newest_checkpoint(output_dir: str | Path, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The readable checkpoint of a folder that is furthest, and its content; None where there is none at all.

    It looks at checkpoint-<epoch>.pth, checkpoint-last.pth and the one before it. A damaged one is reported,
    then passed over.

    Raises:
        CheckpointError: there are some, and all of them are damaged.
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
        raise CheckpointError(
            f"none of the checkpoints in {output_dir} can be read: repair or remove them, or start afresh with "
            "--no_auto_resume"
        )
    return None


def _position(path: Path) -> tuple[float, int]:
    """The last whole epoch of a checkpoint and the batches after it; a file that can't be read comes first.

    Only the head of the file is read.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state["epoch"], state.get("batch", 0)
    except Exception:  # whatever a damaged file makes torch raise; `read_checkpoint` will tell
        return float("inf"), 0


SHAPELESS = {
    *("checkpoint_activations", "drop_path", "drop", "attn_drop", "fc_drop", "init_scale", "attn_init"),
    "sampler_options",
}


def check_resumable(path: Path, old: dict, new: dict) -> None:
    """Compares the model settings of a checkpoint with those of this run, but for those that shape no weight.

    Raises:
        CheckpointError: names the setting, both values, and what to do.
    """
    for name in sorted((old.keys() & new.keys()) - SHAPELESS):
        if old[name] != new[name]:
            raise CheckpointError(
                f"{path} was made with {name} = {old[name]}, this run has {name} = {new[name]}; "
                "use the same flags, another --output_dir, or --no_auto_resume"
            )


def load_weights(path: str | Path, *, model_key: str = "model|module", prefix: str = "") -> Weights:
    """Finds the weights in a checkpoint, recognises them, and names them as the published code does.

    Args:
        path: a file, or a folder of DeepSpeed or Hugging Face (`weights_file`).
        model_key: where the weights lie in the file: the first that is there of several keys parted by "|",
            then PySlowFast's "model_state", then the file itself as a bare state dict.
        prefix: take only names that start with it, and remove it.

    Raises:
        CheckpointError: the file is unreadable, or has no weights under the key or with the prefix.
    """
    path = weights_file(path)
    state = read_checkpoint(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds one {type(state).__name__}, not a dict of weights")
    found = _state_dict(path, state, [*model_key.split("|"), "model_state"])
    start = f"{prefix.rstrip('.')}." if prefix else ""
    taken = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
    if not taken:
        raise CheckpointError(f"{path}: no name starts with --model_prefix {start}, e.g. not {min(found)}")
    taken = published_names(taken)
    flags = state.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return Weights(
        tensors=taken,
        kind=recognise(taken),
        settings=state.get("model_settings") or {},
        flags=flags if isinstance(flags, dict) else {},
        ignored=[k for k in found if not k.startswith(start)],
    )


def _state_dict(path: Path, state: dict, keys: list[str]) -> dict[str, Tensor]:
    chosen = next((state[key] for key in keys if key in state), state)
    tensors = {k: v for k, v in chosen.items() if isinstance(v, Tensor)} if isinstance(chosen, dict) else {}
    if not tensors:
        held = ", ".join(map(str, state)) or "nothing"
        raise CheckpointError(f"{path}: no weights under {' or '.join(keys)} (--model_key), it holds {held}")
    return tensors


def weights_file(path: str | Path) -> Path:
    """`path` itself, or in a folder the file with the weights: DeepSpeed's of a tag, or Hugging Face's.

    Raises:
        CheckpointError: the folder has no such file, or several tags and no file `latest` that names one.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    folder = path / (path / "latest").read_text().strip() if (path / "latest").is_file() else path
    names = ("mp_rank_00_model_states.pt", "model.safetensors", "pytorch_model.bin")
    found = [folder / n for n in names if (folder / n).is_file()] or sorted(folder.glob(f"*/{names[0]}"))
    if not found:
        raise CheckpointError(
            f"{path}: none of {', '.join(names)} in this folder (join partitions of ZeRO-3 first, by the "
            "zero_to_fp32.py beside them)"
        )
    if found[0].parent != folder and len(found) > 1:
        raise CheckpointError(f"{path}: choose one of {', '.join(str(f.parent) for f in found)}")
    return found[0]


def published_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the published code; those that have them already are unchanged.

    Removes what DistributedDataParallel, a moving average and torch.compile put before every name, and
    translates PySlowFast's head and Hugging Face's VideoMAE.
    """
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(wrapper) for k in tensors):
            tensors = {k.removeprefix(wrapper): v for k, v in tensors.items()}
    tensors = {re.sub(r"^head\.projection\.", "head.", k): v for k, v in tensors.items()}
    if not any("embeddings.patch_embeddings.projection." in k for k in tensors):
        return tensors
    ours = {}
    for key, value in tensors.items():
        for theirs, published in HUGGING_FACE_NAMES.items():
            key = re.sub(theirs, published, key)
        ours[key] = value
    for query in [k for k in ours if k.endswith("attention.attention.query.weight")]:
        block = query.removesuffix("attention.attention.query.weight")
        parts = [ours.pop(f"{block}attention.attention.{n}.weight") for n in ("query", "key", "value")]
        ours[f"{block}attn.qkv.weight"] = torch.cat(parts)
    return ours


def plain_name(name: str) -> str:
    """The name of a weight without the encoder's prefix, as in a classifier."""
    return name.removeprefix("backbone.").removeprefix("encoder.")


def recognise(tensors: dict[str, Tensor]) -> str:
    """The model that weights with published names belong to, or "" for none of the known ones."""
    names = {plain_name(k) for k in tensors}
    if "patch_embed.proj.weight" not in names:
        return ""
    if "blocks.0.attn.q.weight" in names:
        model, pretraining = "MAE-ST", "decoder_embed.weight" in names
    else:
        model = "AdaMAE" if "pos_embed_probs" in names else "VideoMAE"
        pretraining = "encoder_to_decoder.weight" in names
    has_head = any(k.startswith("head.") for k in names)
    return f"{model} {'pre-training' if pretraining else 'classifier' if has_head else 'encoder'}"


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


def load_pretrain_model(path: str | Path, found: Weights | None = None, **changes) -> PretrainVisionTransformer:
    """The pre-training model of an AdaMAE or VideoMAE checkpoint, in evaluation mode.

    Args:
        path: file or folder, as in `load_weights`.
        found: what `load_weights` has read from it, if it has.
        changes: settings of `create_pretrain_model` to use instead of the checkpoint's, e.g. `mask_ratio`.

    Raises:
        CheckpointError: the file is unreadable, no pre-training checkpoint, or doesn't fit the settings.
    """
    found = found or load_weights(path)
    if "encoder.patch_embed.proj.weight" not in found.tensors:
        raise CheckpointError(f"{path}: not a pre-training checkpoint (no encoder.patch_embed.proj.weight)")
    settings = {**(found.settings or guess_pretrain_settings(found.tensors)), **changes}
    model = create_pretrain_model(**settings)
    try:
        model.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {settings['name']}: {error}") from error
    return model.eval()
