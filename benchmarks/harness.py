"""What the benchmarks share: the machine in words, medians and spread, and competitors in processes of their own."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runs.console import memory_gib


def machine(device: torch.device) -> str:
    """The machine and the versions, in one line."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return (
        f"{chip}, {threads} threads of {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), {versions}"
    )


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a plain product of two square matrices of this type: the best of several."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device=device, warmup=1, repeats=4))


def seconds_of(step: Callable[[], object], *, device: torch.device, warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmup` calls that are not timed."""
    seconds = []
    for _ in range(warmup + repeats):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[warmup:]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(step: Callable[[], object], *, device: torch.device, warmup: int, repeats: int) -> dict[str, float]:
    """Median, smallest and largest seconds of a step, and this process's peak memory in GiB."""
    seconds = seconds_of(step, device=device, warmup=warmup, repeats=repeats)
    return {"seconds": median(seconds), "min": min(seconds), "max": max(seconds), "gib": memory_gib(device)}


def in_own_process(*flags: object) -> dict:
    """Runs the calling program with its own flags and further ones; what it prints last, as JSON."""
    child = [sys.executable, *sys.argv, *map(str, flags)]
    lines = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return json.loads(lines[-1])


def compare(steps: list[str], pairs: dict[str, str], setting: str, flags: tuple[object, ...]) -> dict[str, dict]:
    """Measures each step in a process of its own, and prints seconds, memory and the ratios of `pairs` (ours: peer)."""
    found = {}
    for name in steps:
        one = found[name] = in_own_process("--only", name, *flags)
        print(
            f"{setting}  {name:24} {one['seconds']:8.3f} s ({one['min']:.3f}-{one['max']:.3f})  {one['gib']:6.2f} GiB",
            flush=True,
        )
    for ours, peer in pairs.items():
        if ours in found and peer in found:
            faster, share = found[peer]["seconds"] / found[ours]["seconds"], found[ours]["gib"] / found[peer]["gib"]
            print(f"{setting}  {ours}: {faster:.2f} x as fast as {peer}, with {share:.0%} of its memory", flush=True)
    return found
