"""Files of features, for extract_features.py, and the settings that they were made with."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from utils import SettingError, whole_file


class Features(NamedTuple):
    """The features of the W clips of one video."""

    features: np.ndarray  # (W,...)
    frames: np.ndarray  # int64 (W,T), the frames in each clip


def write_features(path: Path, found: Features, about: dict) -> None:
    """Writes features as safetensors or npy, by the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        arrays = {k: np.ascontiguousarray(v) for k, v in found._asdict().items()}  # save() ignores strides
        with whole_file(path) as file:
            file.write(save(arrays, metadata={"about": json.dumps(about)}))
        return
    path.unlink(missing_ok=True)  # an .npy and the .json beside it always belong together
    with whole_file(path.with_suffix(".json"), "w") as file:
        file.write(json.dumps({**about, "frames": found.frames.tolist()}) + "\n")
    with whole_file(path) as file:
        np.save(file, found.features)


def read_about(path: Path) -> dict | None:
    """Reads the settings that a file of features was made with; None where it is missing or incomplete."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as f:
                return json.loads((f.metadata() or {}).get("about", "{}"))
        np.load(path, mmap_mode="r")
        return json.loads(path.with_suffix(".json").read_text())
    except (FileNotFoundError, SafetensorError, ValueError, EOFError):
        return None


def is_done(path: Path, settings: dict) -> bool:
    """Whether a complete file is there.

    Raises:
        SettingError: it was made with other settings.
    """
    about = read_about(path)
    for name in settings if about is not None else ():
        if about.get(name) != settings[name]:
            raise SettingError(
                f"{path} was made with {name} = {about.get(name)}, this run has {name} = {settings[name]}: "
                "choose another --output, or --overwrite"
            )
    return about is not None


def read_features(path: Path) -> np.ndarray:
    """Reads the features (W,...) of a file that `read_about` found complete."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as f:
            return f.get_tensor("features")
    return np.load(path)
