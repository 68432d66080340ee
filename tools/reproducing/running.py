"""Starting the runs of tables: here, one after the other or a few at a time, or under SLURM."""

import fcntl
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tools.reproducing.plan import ROOT, Run
from utils import SettingError

Chains = dict[Run, list[Run]]  # a run that needs no other -> the fine-tunings that start from it


def chains_of(planned: list[tuple[Run | None, Run]]) -> Chains:
    """The distinct runs of rows; a fine-tuning without pre-training stands by itself."""
    chains: Chains = {}
    for before, after in planned:
        followers = chains.setdefault(before or after, [])
        if before and after not in followers:
            followers.append(after)
    return chains


def is_finished(run: Run, seed: int, output: Path) -> bool:
    """Whether a run has come to its end; a fine-tuning's is its test."""
    folder = output / run.folder(seed)
    return (folder / "test.json" if run.start else output / run.checkpoint(seed)).is_file()


def unfinished(first: Run, followers: list[Run], seed: int, output: Path) -> list[Run]:
    """The runs of a chain that are left; pre-training is not, where all that starts from it is there."""
    left = [run for run in followers if not is_finished(run, seed, output)]
    needed = left or not followers
    return [first, *left] if needed and not is_finished(first, seed, output) else left


def shell_line(environment: dict[str, str], words: list[str]) -> str:
    """A command for a person to copy, to be run in the repository."""
    given = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*given, "bash", *map(shlex.quote, words)])


@dataclass
class Runner:
    """Runs recipes here. A signal stops them; they save, and the next call continues.

    Args:
        output: folder of the scale.
        environment: of a run and a seed.
        say: takes a line for the user.
    """

    output: Path
    environment: Callable[[Run, int], dict[str, str]]
    say: Callable[[str], None]
    stop: int = 0  # the signal that asked to stop
    failed: list[str] = field(default_factory=list)
    running: set[subprocess.Popen] = field(default_factory=set)  # and not asked to stop

    def __call__(self, chains: Chains, seeds: list[int], jobs: int) -> int:
        """Runs what is left of the chains, `jobs` at a time; returns the exit status."""
        every = [(first, followers, seed) for seed in seeds for first, followers in chains.items()]
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda chain: self._run_chain(*chain), every))
        for line in self.failed:
            self.say(line)
        if self.stop:
            self.say("stopped: rerun the same command to continue")
            return 128 + self.stop
        return 1 if self.failed else 0

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop = number
        for child in list(self.running):
            self._ask_to_stop(child)

    def _ask_to_stop(self, child: subprocess.Popen) -> None:
        """Asks once: a second signal would end it without saving."""
        if child in self.running:
            self.running.discard(child)
            child.send_signal(signal.SIGTERM)

    def _run_chain(self, first: Run, followers: list[Run], seed: int) -> None:
        if self.stop or not (left := unfinished(first, followers, seed, self.output)):
            return
        folder = self.output / first.folder(seed)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.failed.append(f"{folder}: another process is running it")
                return
            for run in left:
                if self.stop or not self._run(run, seed, lock.fileno()):
                    return

    def _run(self, run: Run, seed: int, lock: int) -> bool:
        """Runs one recipe to its end, with output in console.txt; returns whether it came there."""
        folder = self.output / run.folder(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.say(f"running {folder}")
        with (folder / "console.txt").open("a") as console:
            child = subprocess.Popen(
                ["bash", *run.script],
                cwd=ROOT,
                env={**os.environ, **self.environment(run, seed)},
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, from here
                pass_fds=[lock],  # which is held as long as it lives
            )
            self.running.add(child)
            if self.stop:
                self._ask_to_stop(child)
            status = child.wait()
            self.running.discard(child)
        if status == 0 and is_finished(run, seed, self.output):
            return True
        if not self.stop:
            lines = (folder / "console.txt").read_text(errors="replace").strip().splitlines() or ["no output"]
            self.failed.append(f"{folder}: exit status {status}: {lines[-1]} (console.txt has the rest)")
        return False


def submit(
    chains: Chains,
    seeds: list[int],
    output: Path,
    environment: Callable[[Run, str], dict[str, str]],
    options: list[str],
) -> list[str]:
    """Submits what is left of the chains as array jobs over seeds through scripts/slurm.sh; returns what it said.

    Fine-tuning of a seed waits for its own pre-training, and is cancelled if that fails.

    Args:
        environment: of a run, for seeds written as {seed}.
        options: of scripts/slurm.sh.

    Raises:
        SettingError: with its message, where it refuses.
    """
    said = []
    for first, followers in chains.items():
        due = {seed: unfinished(first, followers, seed, output) for seed in seeds}
        waiting = [seed for seed in seeds if first in due[seed]]
        if waiting:
            text, job = slurm(first, waiting, environment(first, "{seed}"), options)
            said.append(text)
        for run in followers:
            ready = [seed for seed in seeds if run in due[seed] and seed not in waiting]
            if ready:
                said.append(slurm(run, ready, environment(run, "{seed}"), options)[0])
            later = [seed for seed in waiting if run in due[seed]]
            if later:
                when = "aftercorr" if later == waiting else "afterok"  # each after its own task, or after all
                after = [f"--dependency={when}:{job}", "--kill-on-invalid-dep=yes"]
                said.append(slurm(run, later, environment(run, "{seed}"), [*options, *after])[0])
    return said


def slurm(run: Run, seeds: list[int], environment: dict[str, str], options: list[str]) -> tuple[str, str]:
    """Submits one array job; returns what scripts/slurm.sh said, and the job's ID."""
    words = ["scripts/slurm.sh", *options, "--array", "--seeds", ",".join(map(str, seeds)), *run.script]
    done = subprocess.run(["bash", *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SettingError(done.stderr.strip())
    job = re.search(r"^Submitted batch job (\d+)", done.stdout, re.MULTILINE)
    if job is None and "--dry_run" not in options:
        raise SettingError(f"sbatch did not say which job it submitted: {done.stdout.strip()!r}")
    return done.stdout.strip(), job[1] if job else "JOB"
