"""What the benchmarks share: the machine in words, medians and spread, and competitors in processes of their own."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runs.console import memory_gib
from runs.engine import resolve_amp


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


def in_own_process(*flags: object) -> dict:
    """Runs the calling program with its own flags and further ones; what it prints last, as JSON."""
    child = [sys.executable, *sys.argv, *map(str, flags)]
    lines = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return json.loads(lines[-1])


def flops_of(step: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products in a step, backward pass included."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def step_parser(description: str, names: list[str], *, batch_size: int) -> argparse.ArgumentParser:
    """The flags of the benchmarks of a training step."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[32, 64] if on_gpu else [batch_size])
    types = ["off", "bf16"] if on_gpu or torch.cpu._is_avx512_bf16_supported() else ["off"]
    parser.add_argument("--precision", nargs="+", default=types, choices=["off", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=30 if on_gpu else 3, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10 if on_gpu else 1, help="steps before them")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--names", nargs="+", default=names, choices=names, help="what to measure")
    parser.add_argument("--output", help="JSON file for what was measured")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # name, in a child process
    return parser


def measure_child(build: Callable[..., Callable], args: argparse.Namespace, **settings) -> None:
    """In a child process: builds one step, measures it and prints the numbers as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    step = build(device, resolve_amp(args.precision[0], device), **settings)
    clips = torch.randint(0, 256, (args.batch_size[0], 3, 16, 224, 224), dtype=torch.uint8, device=device)
    seconds = seconds_of(lambda: step(clips), device=device, warmup=args.warmup, repeats=args.steps)
    found = {"seconds": median(seconds), "min": min(seconds), "max": max(seconds), "gib": memory_gib(device)}
    if device.type == "cuda" and args.only.startswith("this"):
        found |= look_at_gpu(lambda: step(clips))
    print(json.dumps(found))


def look_at_gpu(step: Callable[[], object]) -> dict[str, list[str]]:
    """The longest kernels of a step and those of attention. A step that waits for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    attention = [k for k in kernels if any(word in k.key.lower() for word in ("flash", "fmha", "attention", "sdpa"))]
    return {
        name: [f"{k.self_device_time_total / 1000:.2f} ms {k.key[:80]}" for k in chosen]
        for name, chosen in (("longest", kernels[:10]), ("attention", attention[:4]))
    }


def run_steps(args: argparse.Namespace, pairs: list[tuple[str, str]]) -> None:
    """Measures every step in a process of its own, in each precision and batch size; prints and writes the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = in_own_process("--only", "flops")
    results = {"machine": machine(device), "flops_per_clip": flops, "runs": []}
    print(results["machine"], flush=True)
    for precision in args.precision:
        rate = matrix_rate(device, resolve_amp(precision, device) or torch.float32)
        print(f"{precision}: matrix products run at {rate / 1e9:.0f} GFLOP/s", flush=True)
        for batch in args.batch_size:
            found = compare(
                args.names, pairs, f"{precision:4} batch {batch}", ("--precision", precision, "--batch_size", batch)
            )
            for name in flops.keys() & found.keys():
                share = found[name]["share_of_rate"] = flops[name] * batch / found[name]["seconds"] / rate
                print(f"{precision:4} batch {batch}  {name}: {share:.0%} of that rate", flush=True)
            results["runs"].append({"precision": precision, "batch": batch, "matrix_rate": rate, **found})
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


def compare(steps: list[str], pairs: list[tuple[str, str]], setting: str, flags: tuple[object, ...]) -> dict[str, dict]:
    """Measures each step in a process of its own, and prints seconds, memory and the ratios of `pairs` (ours, peer)."""
    found = {}
    for name in steps:
        one = found[name] = in_own_process("--only", name, *flags)
        print(
            f"{setting}  {name:24} {one['seconds']:8.3f} s ({one['min']:.3f}-{one['max']:.3f})  {one['gib']:6.2f} GiB",
            flush=True,
        )
    for ours, peer in pairs:
        if ours in found and peer in found:
            faster, share = found[peer]["seconds"] / found[ours]["seconds"], found[ours]["gib"] / found[peer]["gib"]
            print(f"{setting}  {ours}: {faster:.2f} x as fast as {peer}, with {share:.0%} of its memory", flush=True)
    return found
