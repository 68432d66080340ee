"""Clips a second of run_mae_pretraining.py on the CPU, and the share of its time that it waits for data.

    python benchmarks/throughput.py --output benchmarks/results/throughput.json

The whole program trains on videos made here (340 x 256, 10 s, H.264 with a key frame every 250 frames), with one data
worker a process: in one process with one thread and with all; and in two processes under torchrun with one thread each
on two cores, compared with one process with one thread on one core, which its worker shares. By default AdaMAE's ViT-S
at 224 pixels: a step of two clips takes seconds, loading them 0.15 s. The first steps are left out. Waiting is that of
process 0; clips are those of all processes.

Targets: waiting at most 5 % with one worker; two processes at least 1.7 times as fast as one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from reports import Report, Spread
from sources import bit_rate, write_sources
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROGRAM = Path(__file__).resolve().parent.parent / "run_mae_pretraining.py"


class Setting(NamedTuple):
    """How the program is started; None stands for all threads or cores."""

    processes: int
    threads: int | None
    cores: int | None


SETTINGS = (Setting(1, 1, 2), Setting(1, None, None), Setting(1, 1, 1), Setting(2, 1, 2))
ONE, TWO = SETTINGS[2:]  # to be compared


def environment(threads: int | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return kept | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def pin(cores: int | None) -> None:
    """Keeps this process and its children on the first so many cores (on Linux)."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def train(setting: Setting, videos: Path, folder: Path, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Trains one epoch; clips per second and the share of waiting, of each step after the first ones: (steps) each."""
    steps = args.warmup + args.steps
    lines = videos.read_text().splitlines()
    wanted = steps * args.batch_size * setting.processes
    listed = videos.with_name(f"{folder.name}.csv")
    listed.write_text("".join(f"{lines[k % len(lines)]}\n" for k in range(wanted)))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", setting.processes, "--standalone"]
    command = [sys.executable, *(torchrun if setting.processes > 1 else []), PROGRAM]
    command += ["--data_path", listed, "--output_dir", folder, "--model", args.model, "--batch_size", args.batch_size]
    command += ["--epochs", 1, "--warmup_epochs", 0, "--num_workers", 1, "--log_freq", 1, "--vis_freq", 0]
    command += ["--device", "cpu", *args.flags]
    done = subprocess.run(
        [str(word) for word in command],
        env=environment(setting.threads),
        preexec_fn=partial(pin, setting.cores),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{PROGRAM.name} failed:\n{done.stdout}{done.stderr}")
    events = EventAccumulator(str(folder))
    events.Reload()
    rate, wait = (np.array([e.value for e in events.Scalars(tag)]) for tag in ("clips_per_second", "data_wait"))
    return rate[args.warmup :], wait[args.warmup :]


def measure(report: Report, args: argparse.Namespace, scratch: Path) -> None:
    videos = write_sources(scratch / "videos", args.num_videos, seconds=args.seconds, height=256, width=340)
    report.line("Videos", f"{args.num_videos} different ones of {args.seconds:g} s, {bit_rate(videos, args.seconds)}")
    rows, speeds = [], {}
    for number, setting in enumerate(SETTINGS):
        rate, wait = train(setting, videos, scratch / f"run-{number}", args)
        speeds[setting], seconds = Spread.of(rate), 1 / rate  # seconds of a step, up to a factor
        found = {"clips/s": speeds[setting], "overall": len(rate) / seconds.sum()}
        waiting = f"{(wait * seconds).sum() / seconds.sum():.1%}"
        rows.append({**{k: v or "all" for k, v in setting._asdict().items()}, **found, "waiting for data": waiting})
    report.table("Clips per second, median and quartiles over the steps", rows)
    ratio = speeds[TWO].median / speeds[ONE].median
    report.line("Two processes on two cores", f"{ratio:.2f} x one process on one core")
    report.write()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrain_videomae_small_patch16_224", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=2, help="of a process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="steps measured (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them (default: %(default)s)")
    parser.add_argument("--num_videos", type=int, default=8, help="different videos (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="length of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("flags", nargs="*", help="further flags of the program, after --")
    args = parser.parse_args(argv)
    names = ("model", "batch_size", "steps", "warmup", "flags")
    report = Report(args.output, torch.device("cpu"), **{name: getattr(args, name) for name in names})
    with tempfile.TemporaryDirectory() as scratch:
        measure(report, args, Path(scratch))


if __name__ == "__main__":
    main()
