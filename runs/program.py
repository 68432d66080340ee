"""What both programs do around their work: signals, errors in one line, exit statuses."""

import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress

from datasets import NoReadableVideoError
from runs.bad_videos import TooManyBadVideos
from runs.checkpoints import CheckpointError
from runs.processes import stop_world
from runs.signals import Stopped, StopSignals

# What a person can do something about; the message says what. Anything else is a fault of the code.
EXPECTED = (ValueError, CheckpointError, FloatingPointError, TooManyBadVideos, NoReadableVideoError)


def run_program(name: str, work: Callable[[StopSignals, ExitStack], int]) -> int:
    """Does the work and returns its exit status.

    `work` gets the signals that may stop it, and a stack for what is to be closed while the processes still
    know each other.

    Raises:
        SystemExit: with one line on stderr for a wrong setting (status 1); with `stopping.SAVED` or 130 for a run
            that was asked to stop and has saved.
    """
    with StopSignals() as signals:
        try:
            with ExitStack() as to_close:
                return work(signals, to_close)
        except Stopped as stop:
            with suppress(OSError):
                print(stop, file=sys.stderr)
            raise SystemExit(stop.status) from stop
        except EXPECTED as error:
            # from a data worker it comes with the worker's traceback before its own words
            text = str(error).rpartition("NoReadableVideoError: ")[2]
            raise SystemExit(f"{name}: error: {text}") from error
        finally:
            stop_world()
