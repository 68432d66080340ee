"""Where the golden numbers are, and how a test reads them.

The folder is the one named by the environment variable ADAMAE_GOLDEN, by default `../shared/golden` beside
the repository. It is not part of the project: without it the tests that need it skip and say so.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("ADAMAE_GOLDEN") or ROOT.parent / "shared" / "golden")

needs_golden = pytest.mark.skipif(
    not (GOLDEN / "manifest.json").is_file(),
    reason=f"no golden numbers: {GOLDEN}/manifest.json is not there (set ADAMAE_GOLDEN to their folder)",
)


def manifest() -> dict:
    """The manifest of the golden folder; an empty one where there is no such folder."""
    path = GOLDEN / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {"cases": {}, "tables": {}}


def cases(kind: str) -> list[str]:
    """Names of the manifest's cases of one kind: `kind` itself and any `kind_*` beside it."""
    names = [n for n in manifest()["cases"] if n == kind or n.startswith(kind + "_")]
    return [n for n in names if (GOLDEN / f"{n}.safetensors").is_file()]


def tensors(name: str) -> dict:
    """All tensors of `<name>.safetensors`, by their prefixed key (`state.`, `in.`, `out.`, `grad.`)."""
    return load_file(GOLDEN / f"{name}.safetensors")


def table(name: str) -> dict:
    """One JSON table, e.g. `table("mask_counts")`; an empty one where it is missing (for parametrize)."""
    path = GOLDEN / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def arrays(name: str) -> dict:
    """One npz file as a dict of float64 arrays."""
    with np.load(GOLDEN / f"{name}.npz") as f:
        return {k: f[k] for k in f.files}


def under(prefix: str, values: dict) -> dict:
    """The entries whose key starts with `prefix.`, with the prefix removed."""
    return {k[len(prefix) + 1 :]: v for k, v in values.items() if k.startswith(prefix + ".")}
