"""Starting the two programs in tests, in this process or as a person does."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from golden import ROOT


class Done(NamedTuple):
    """How a run ended."""

    returncode: int
    stdout: str
    stderr: str


def start(main: Callable[[list[str]], int | None], *flags) -> Done:
    """A program's `main` in this process, as quick as it gets; `start_process` tells that it runs by itself."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(f) for f in flags]) or 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            if not isinstance(stop.code, int):
                print(stop, file=sys.stderr)
    return Done(status, out.getvalue(), err.getvalue())


def start_process(program: str, *flags, processes: int = 1) -> Done:
    """A program of the repository in a process of its own, or in many under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / program), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    return Done(done.returncode, done.stdout, done.stderr)
