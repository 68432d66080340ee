"""The log of a run: args.json, command.txt, log.txt, curves.png, pictures, and what --report_to names."""

import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from pictures.plots import curves, read_epochs, to_picture
from runs.reporters import Reporter
from utils import whole_file

DRAW_EVERY = 5.0  # seconds; epochs may be shorter


class RunLog:
    """Files in `output_dir` ('': none), and entries to `reporters`; the loops call its verbs, wherever they go.

    curves.png is drawn after an epoch, unless that was done in the last `DRAW_EVERY` seconds, and at the end. What
    fails loses entries but does not end the run: `warn` is called once, until writing works again.
    """

    def __init__(
        self, *, output_dir: str, reporters: Sequence[Reporter] = (), warn: Callable[[str], None] = warnings.warn
    ):
        self.output_dir = Path(output_dir) if output_dir else None
        self.reporters, self.warn, self.failing = reporters, warn, set()
        self.step = 0  # the last one reported
        self.drawn_at, self.undrawn = time.monotonic(), False

    def settings(self, values: dict) -> None:
        """Writes the settings of a run, by flag, to args.json and the reporters."""
        if self.output_dir is not None:
            file = self.output_dir / "args.json"
            with self._without_failing(file), whole_file(file, "w") as stream:
                stream.write(json.dumps(values, indent=1) + "\n")
        self._report(lambda reporter: reporter.settings(values))

    def command(self, words: Sequence[str], *, processes: int) -> None:
        """Appends the command of this start of the run to command.txt."""
        line = shlex.join(words) + (f"  # in each of {processes} processes" if processes > 1 else "")
        if self.output_dir is not None:
            path = self.output_dir / "command.txt"
            with self._without_failing(path), path.open("a") as file:
                file.write(line + "\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.step = step
        self._report(lambda reporter: reporter.scalars(step, values))

    def picture(self, epoch: int, picture: np.ndarray) -> None:
        """Writes a picture (H,W,3) uint8 to the reporters and to pictures/epoch-<epoch>.png."""
        self._report(lambda reporter: reporter.picture(epoch + 1, "clips", picture))
        if self.output_dir is not None:
            with self._without_failing(self.output_dir / "pictures"):
                (self.output_dir / "pictures").mkdir(exist_ok=True)
                self._save(self.output_dir / "pictures" / f"epoch-{epoch:04d}.png", picture)

    def epoch(self, values: dict) -> None:
        """Appends an epoch to log.txt, one JSON object a line, and draws curves.png anew if it is time."""
        if self.output_dir is None:
            return
        with self._without_failing(self.output_dir / "log.txt"), (self.output_dir / "log.txt").open("a") as file:
            file.write(json.dumps(values) + "\n")
            self.undrawn = True
        if time.monotonic() - self.drawn_at > DRAW_EVERY:
            self._draw()

    def _draw(self) -> None:
        file = self.output_dir / "curves.png"
        with self._without_failing(file, (Exception,)):  # whatever goes wrong with a plot
            self._save(file, to_picture(curves(read_epochs(self.output_dir / "log.txt"))))
        self.drawn_at, self.undrawn = time.monotonic(), False

    def _save(self, path: Path, picture: np.ndarray) -> None:
        with whole_file(path) as file:
            Image.fromarray(picture).save(file, "png")

    def results(self, values: dict[str, float], confusion: np.ndarray) -> None:
        """Reports the numbers of a test at the last step, as test_<name>, and its confusions (H,W,3) uint8."""
        found = {f"test_{name}": value for name, value in values.items()}
        self._report(lambda reporter: reporter.scalars(self.step, found))
        self._report(lambda reporter: reporter.picture(self.step, "test_confusion", confusion))

    def _report(self, write: Callable[[Reporter], None]) -> None:
        for reporter in self.reporters:
            with self._without_failing(reporter, reporter.failures):
                write(reporter)

    @contextmanager
    def _without_failing(self, what: Path | Reporter, failures: tuple[type[Exception], ...] = (OSError,)) -> Iterator:
        try:
            yield
            self.failing.discard(what)
        except failures as error:
            if what not in self.failing:
                self.warn(f"{what} could not be written ({error}): entries are lost, training continues")
            self.failing.add(what)

    def close(self) -> None:
        if self.undrawn:
            self._draw()
        self._report(lambda reporter: reporter.close())
