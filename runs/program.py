"""What both programs do around their work: signals, one-line errors, exit statuses."""

import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress

from runs.processes import stop_world
from runs.signals import Stopped, StopSignals, speaks_for_all
from utils import UserError, keep_freed_memory


def run_program(name: str, work: Callable[[StopSignals, ExitStack], int]) -> int:
    """Does the work and returns its exit status.

    Args:
        work: gets the signals that may stop it, and a stack for what must be closed before the process group.

    Raises:
        SystemExit: for a `UserError` with one line on stderr (status 1); for a run that was asked to stop and has
            saved with `signals.SAVED` or 130. Any other exception is a bug and keeps its traceback.
    """
    keep_freed_memory()
    with StopSignals() as signals:
        try:
            with ExitStack() as to_close:
                return work(signals, to_close)
        except Stopped as stop:
            if speaks_for_all():
                with suppress(OSError):
                    print(stop, file=sys.stderr)
            raise SystemExit(stop.status) from stop
        except UserError as error:
            # from a data worker it comes with the worker's traceback in front of its own message
            text = str(error).rpartition(f"{type(error).__name__}: ")[2]
            raise SystemExit(f"{name}: error: {text}") from error
        finally:
            stop_world()
