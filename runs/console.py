"""What a run prints: a progress bar or plain lines, with a time estimate and peak memory."""

import resource
import sys
import time
from contextlib import suppress

import torch
from tqdm import tqdm


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device for CUDA, else of this process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def readable_time(seconds: float) -> str:
    """3725 -> "1:02:05"; days in front where there are any."""
    days, rest = divmod(int(seconds), 86400)
    return f"{days} d " * bool(days) + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


class Console:
    """Progress for a person: a bar on a terminal, plain lines elsewhere, only on rank 0."""

    def __init__(self, *, total_steps: int, show: bool = True):
        self.total, self.show, self.bar = total_steps, show, None
        self.first, self.started, self.waiting = 0, time.monotonic(), False

    def start(self, first_step: int) -> None:
        """Starts the clock, with `first_step` steps done already."""
        self.first, self.started, self.waiting = first_step, time.monotonic(), True
        if self.show and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()
        elif self.waiting:  # lines with numbers may be minutes apart
            self.say(f"step {self.first + 1}/{self.total} done after {time.monotonic() - self.started:.1f} s")
        self.waiting = False

    def report(self, step: int, where: str, **values: str) -> None:
        """Shows the values of the last steps, after `step` of all steps; `where` is e.g. "epoch 3"."""
        if self.bar is not None:
            self.bar.set_description(where)
            self.bar.set_postfix_str(", ".join(f"{k} {v}" for k, v in values.items()))
            return
        done = max(1, step - self.first)
        left = (time.monotonic() - self.started) / done * (self.total - step)
        text = "  ".join(f"{k} {v}" for k, v in values.items())
        self.say(f"{where}  step {step}/{self.total}  {text}  left {readable_time(left)}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.show:
            with suppress(OSError):  # a full disk or a closed pipe must not end the run
                tqdm.write(text, file=sys.stderr if self.bar is not None else sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Prints a line on stderr, from any rank."""
        with suppress(OSError):
            tqdm.write(text, file=sys.stderr)

    def warn_once(self, text: str) -> None:
        """Prints a line on stderr about what all ranks know, so from rank 0 only."""
        if self.show:
            self.warn(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
