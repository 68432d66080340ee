"""The Hugging Face hub: weights come from its repositories, and exported folders go into them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download

from runs.checkpoints import CheckpointError

SUFFIXES = (".pth", ".pt", ".pyth", ".bin", ".ckpt", ".safetensors")  # of files, which no repository's name has
T = TypeVar("T")


def is_repository(name: str) -> bool:
    """Whether this looks like a repository, `org/name`; the hub alone knows whether there is one."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not name.endswith(SUFFIXES)


def fetch(repository: str, files: tuple[str, ...]) -> Path:
    """Downloads a repository's settings and the first of `files` that it has, unless they are in the hub's cache.

    Returns the folder they are in.

    Raises:
        CheckpointError: there is no such repository, or the hub can't be reached and the cache doesn't have it.
    """
    missing = f"{repository}: no such file or folder here, and it can't be had from the Hugging Face hub"
    for name in files:
        wanted = ["*.json", name]
        folder = Path(_ask(missing, lambda wanted=wanted: snapshot_download(repository, allow_patterns=wanted)))
        if (folder / name).is_file():
            break
    return folder


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to a repository, which is created where there is none; returns the commit's address.

    Raises:
        CheckpointError: the hub can't be reached, or refuses.
    """
    api = HfApi()
    refused = f"--push {repository}: the Hugging Face hub did not take it"
    _ask(refused, lambda: api.create_repo(repository, exist_ok=True))
    return str(_ask(refused, lambda: api.upload_folder(repo_id=repository, folder_path=folder)))


def _ask(failure: str, request: Callable[[], T]) -> T:
    try:
        return request()
    except Exception as error:  # the hub's libraries raise errors of many kinds
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{failure} ({reason})") from error
