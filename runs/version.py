"""Which code wrote a checkpoint."""

import functools
import hashlib
import subprocess
from pathlib import Path

ROOMS = ("", "clips", "pictures", "runs", "weights")  # folders whose code decides what a run computes


@functools.cache
def code_version() -> str:
    """The commit of this code, with "-dirty" where files have changed since; without git a digest of the files."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history, or no git
        sources = b"".join(path.read_bytes() for room in ROOMS for path in sorted((root / room).glob("*.py")))
        return f"sources-{hashlib.sha256(sources).hexdigest()[:12]}"
