"""The weights in a checkpoint, under the names that the published code gives them.

Read are files of this repository, of the published AdaMAE, VideoMAE and MAE-ST code, of PySlowFast, DeepSpeed and
Hugging Face.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from runs.checkpoints import CheckpointError, flags_of, read_checkpoint
from weights.hub import fetch, is_repository

IMAGE_VIT = "image ViT"  # how the kinds begin that only `weights.images` takes

# Parts of the names of weights, published and Hugging Face's, in the order in which the latter are replaced; ^ is the
# name's beginning.
HUGGING_FACE_NAMES = (
    ("^encoder.patch_embed.proj.", "^videomae.embeddings.patch_embeddings.projection."),
    ("^encoder.blocks.", "^videomae.encoder.layer."),
    ("^encoder.norm.", "^videomae.layernorm."),
    ("^decoder.blocks.", "^decoder.decoder_layers."),
    ("^head.", "^classifier."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".attn.q_bias", ".attention.attention.q_bias"),
    (".attn.v_bias", ".attention.attention.v_bias"),
)
HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights read from a checkpoint, and what the file says about the model and the run."""

    path: Path  # as given to `load_weights`
    tensors: dict[str, Tensor]  # state dict with the published names
    settings: dict  # keyword arguments that rebuild the model; empty in files of others
    flags: dict  # of the run, where the file has them
    ignored: list[str]  # names without the prefix asked for
    class_names: tuple[str, ...] = ()  # of a classifier, by number, where the file has them
    converted: str = ""  # kind of the model whose weights were turned into these; "" where none were

    @cached_property
    def kind(self) -> str:
        return self.converted or recognise(self.tensors)

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """The tensors under their `plain_name`."""
        return {plain_name(name): value for name, value in self.tensors.items()}

    @property
    def num_frames(self) -> int | None:
        """Frames per clip in training; None where the file does not say."""
        if "num_frames" in self.settings or "num_frames" not in self.flags:
            return self.settings.get("num_frames")
        return self.flags["num_frames"] * self.flags.get("num_segments", 1)


def load_weights(path: str | Path, *, model_key: str = "model|module", prefix: str = "") -> Weights:
    """Reads the weights of a checkpoint.

    Args:
        path: a file, a folder written by DeepSpeed or Hugging Face, or a repository of its hub (`weights_file`).
        model_key: keys separated by "|"; the weights are under the first one that the file has. Without any of them
            they are under PySlowFast's "model_state", or the file itself is the state dict.
        prefix: take only names that start with it, and remove it.

    Raises:
        CheckpointError: the file is unreadable, or has no weights under these keys or with this prefix.
    """
    file = weights_file(path)
    state = read_checkpoint(file)
    keys = [*model_key.split("|"), "model_state"]
    found = next((state[key] for key in keys if key in state), state)
    found = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not found:
        held = ", ".join(map(str, state)) or "nothing"
        raise CheckpointError(f"{file}: no weights under {' or '.join(keys)} (--model_key), it holds {held}")
    about = read_config(file.parent) if file.name in HUGGING_FACE_FILES else {}
    start = f"{prefix.rstrip('.')}." if prefix else ""
    taken = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
    if not taken:
        raise CheckpointError(f"{file}: no name starts with --model_prefix {start} (there is {min(found)})")
    return Weights(
        path=Path(path),
        tensors=published_names(taken),
        settings=about.get("model_settings") or state.get("model_settings") or {},
        flags=about.get("training") or flags_of(state),
        ignored=[k for k in found if not k.startswith(start)],
        class_names=tuple(about.get("class_names") or state.get("class_names") or ()),
    )


def weights_file(path: str | Path) -> Path:
    """Finds the weights in a folder of DeepSpeed (one tag or several) or Hugging Face; a file is returned as is.

    What isn't there, but looks like `org/name`, is downloaded from the hub (`fetch`).

    Raises:
        CheckpointError: there is no such file, or there are several tags and no file `latest` naming one.
    """
    path = Path(path)
    if not path.exists() and is_repository(str(path)):
        path = fetch(str(path), HUGGING_FACE_FILES)
    if not path.is_dir():
        return path
    folder = path / (path / "latest").read_text().strip() if (path / "latest").is_file() else path
    names = ("mp_rank_00_model_states.pt", *HUGGING_FACE_FILES)
    found = [folder / n for n in names if (folder / n).is_file()] or sorted(folder.glob(f"*/{names[0]}"))
    if not found:
        raise CheckpointError(
            f"{path}: none of {', '.join(names)} in this folder "
            "(merge ZeRO-3 partitions first, with the zero_to_fp32.py beside them)"
        )
    if found[0].parent != folder and len(found) > 1:
        raise CheckpointError(f"{path}: choose one of {', '.join(str(f.parent) for f in found)}")
    return found[0]


def read_config(folder: Path) -> dict:
    """What the files beside Hugging Face's weights say of a model, under our names; nothing where there are none.

    `model_settings` and `class_names` as in `Weights`, `training` as its `flags`. The first is in folders of ours only.

    Raises:
        CheckpointError: a file is damaged.
    """
    config, shown = (_read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    training = config.get("training") or {}
    if shown and not training:
        training["imagenet_default_mean_and_std"] = shown.get("image_mean") != [0.5, 0.5, 0.5]
        training["short_side_size"] = (shown.get("size") or {}).get("shortest_edge")
    for flag, name in (
        ("num_frames", "num_frames"),
        ("input_size", "image_size"),
        ("normalize_target", "norm_pix_loss"),
    ):
        if config.get(name) is not None:
            training[flag] = config[name][0] if isinstance(config[name], list) else config[name]
            training["num_segments"] = 1
    names = [name for _, name in sorted((config.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    if all(name == f"LABEL_{k}" for k, name in enumerate(names)):  # what transformers writes for want of names
        names = []
    return {"model_settings": config.get("model_settings"), "training": training, "class_names": names}


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def published_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames weights to the names of the published code, which themselves stay as they are.

    Removes the prefixes of DistributedDataParallel, moving averages and torch.compile, and translates
    PySlowFast's head and Hugging Face's VideoMAE, whose projections it fuses.
    """
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(wrapper) for k in tensors):
            tensors = {k.removeprefix(wrapper): v for k, v in tensors.items()}
    tensors = {re.sub(r"^head\.projection\.", "head.", k): v for k, v in tensors.items()}
    if not any("embeddings.patch_embeddings.projection." in k for k in tensors):
        return tensors
    ours = {}
    for key, value in tensors.items():
        key = re.sub(r"^(embeddings|encoder\.layer|layernorm)\.", r"videomae.\g<0>", key)  # those of the encoder alone
        key = "^" + re.sub(r"\.(query|value)\.bias$", lambda match: f".{match[1][0]}_bias", key)  # newer names
        for published, theirs in HUGGING_FACE_NAMES:
            key = key.replace(theirs, published)
        ours[key.removeprefix("^")] = value
    for query in [k for k in ours if k.endswith("attention.attention.query.weight")]:
        block = query.removesuffix("attention.attention.query.weight")
        parts = [ours.pop(f"{block}attention.attention.{n}.weight") for n in ("query", "key", "value")]
        ours[f"{block}attn.qkv.weight"] = torch.cat(parts)  # (3D,D)
    return ours


def hugging_face_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames weights of AdaMAE and VideoMAE to Hugging Face's names, the inverse of `published_names`.

    A classifier's have no prefix `encoder.`; its head and `fc_norm` stand outside of what is one there.
    """
    theirs = {}
    inside = any(name.startswith("encoder.") for name in tensors)
    for key, value in tensors.items():
        key = f"^{key}" if inside or key.startswith(("fc_norm.", "head.")) else f"^encoder.{key}"
        for published, other in HUGGING_FACE_NAMES:
            key = key.replace(published, other)
        if key.endswith(".attn.qkv.weight"):
            stem = key[1:].removesuffix("attn.qkv.weight")
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"{stem}attention.attention.{name}.weight"] = part.contiguous()  # (D,D)
        else:
            theirs[key[1:]] = value
    return theirs


def plain_name(name: str) -> str:
    """Removes the encoder's prefix from the name of a weight: as in a classifier."""
    return name.removeprefix("backbone.").removeprefix("encoder.")


def recognise(tensors: dict[str, Tensor]) -> str:
    """Names the model with these weights (under published names), e.g. "MAE-ST classifier"; "" for an unknown one."""
    plain = {plain_name(name): value for name, value in tensors.items()}
    if "patch_embed.proj.weight" not in plain:
        return ""
    if plain["patch_embed.proj.weight"].ndim == 4:  # (D,3,p,p)
        model, pretraining = IMAGE_VIT, "decoder_embed.weight" in plain
    elif "blocks.0.attn.q.weight" in plain:
        model, pretraining = "MAE-ST", "decoder_embed.weight" in plain
    else:
        model = "AdaMAE" if "pos_embed_probs" in plain else "VideoMAE"
        pretraining = "encoder_to_decoder.weight" in plain
    has_head = any(name.startswith("head.") for name in plain)
    return f"{model} {'pre-training' if pretraining else 'classifier' if has_head else 'encoder'}"


def architecture(tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    """Reads width, number of blocks and patch size in pixels from the shapes of a video ViT."""
    plain = {plain_name(name): value for name, value in tensors.items()}
    kernel = plain["patch_embed.proj.weight"]  # (D,3,tubelet,p,p)
    return kernel.shape[0], len({n.split(".")[1] for n in plain if n.startswith("blocks.")}), kernel.shape[-1]
