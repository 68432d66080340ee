"""Kills a training run many times, resumes it each time, and compares the result with an uninterrupted run.

    python tools/kill_test.py --output output/kill_test                        # pre-training, 30 kills
    python tools/kill_test.py --output output/kill_test --program finetuning

Makes a few demo videos and trains a tiny model on them twice: once without interruption, and once with SIGKILL
sent to all its processes at random moments, during start-up (one kill of five), training (two of five) or while a
checkpoint is being written (two of five; there is one at every step). The final states (weights, optimiser, moving
average, best metric) must be identical bit for bit: exit status 0, else 1. Writes <program>.json: every kill, the
progress of the run at that moment, and the result.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from runs.checkpoints import CheckpointError, newest_checkpoint, read_checkpoint
from utils import whole_file

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, BATCH, VIDEOS = 30, 4, 48
SMALL = f"""
    --input_size 32 --sampling_rate 1 --num_sample 2 --batch_size {BATCH} --epochs {EPOCHS} --warmup_epochs 1
    --lr 0.03 --amp off --device cpu --num_workers 2 --decoder pyav --log_freq 1
    --save_ckpt_freq 1 --save_ckpt_minutes 1e-9 --keep_ckpts 2
"""
PROGRAMS = {
    "pretraining": """
        run_mae_pretraining.py --model pretrain_videomae_tiny_patch8_64 --mask_ratio 0.85 --decoder_depth 1
        --vis_freq 0
    """,
    "finetuning": """
        run_class_finetuning.py --model vit_tiny_patch8_64 --data_set custom --nb_classes 10
        --model_ema --model_ema_decay 0.9 --test_num_segment 1 --test_num_crop 1
    """,
}
COMPARED = ("model", "optimizer", "scaler", "model_ema", "best")


def make_videos(folder: Path) -> None:
    counts = ["--num_train", str(VIDEOS), "--num_val", "10", "--num_test", "10", "--size", "32", "--workers", "2"]
    command = [sys.executable, str(ROOT / "tools/make_demo_videos.py"), "--output", str(folder), *counts]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def begin(program: str, videos: Path, output: Path) -> subprocess.Popen:
    """Starts the program in a session of its own, so that a signal to its group reaches the data workers too."""
    script, *flags = PROGRAMS[program].split()
    data = videos / "train.csv" if program == "pretraining" else videos
    command = [sys.executable, "-u", str(ROOT / script), *flags, *SMALL.split()]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "console.txt").open("a") as console:
        return subprocess.Popen(
            [*command, "--data_path", str(data), "--output_dir", str(output)],
            stdout=console,
            stderr=console,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def unfinished_checkpoints(output: Path) -> list[Path]:
    return list(output.glob(".checkpoint-*.tmp"))


def wait_to_kill(run: subprocess.Popen, output: Path, moment: str, rng: random.Random) -> None:
    """Returns when it is time to kill the run, or when the run has ended.

    Args:
        moment: "start", within the first 8 s; "training", up to 1 s after the first step; "writing", after that,
            while a checkpoint is being written.
    """
    if moment == "start":
        time.sleep(rng.uniform(0, 8))
        return
    seen = (output / "console.txt").read_text().count("  step ")
    while run.poll() is None and (output / "console.txt").read_text().count("  step ") == seen:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0))
    while moment == "writing" and run.poll() is None and not unfinished_checkpoints(output):
        pass  # no sleep: writing takes only a few milliseconds


def progress(output: Path) -> str:
    """Epoch and batch of the newest complete checkpoint."""
    found = newest_checkpoint(output, lambda text: print(text, file=sys.stderr))
    return f"epoch {found[1]['epoch'] + 1}, batch {found[1]['batch']}" if found else "nothing yet"


def train_with_kills(program: str, videos: Path, output: Path, kills: int, seed: int) -> list[dict]:
    """Trains to the end with that many kills; returns when each came and what it left behind."""
    rng, met = random.Random(seed), []
    with tqdm(total=kills, desc="kills") as bar:
        while len(met) < kills:
            moment = rng.choice(["start", "training", "training", "writing", "writing"])
            run = begin(program, videos, output)
            wait_to_kill(run, output, moment, rng)
            if run.poll() is not None:
                raise SystemExit(f"the run ended after {len(met)} kills, see {output / 'console.txt'}")
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            met.append({"moment": moment, "half_written": bool(unfinished_checkpoints(output)), "at": progress(output)})
            bar.update()
    run = begin(program, videos, output)
    if run.wait():
        raise SystemExit(f"the last run failed, see {output / 'console.txt'}")
    return met


def differences(ours, theirs, where: str = "") -> list[str]:
    """The paths to the values in which two nested states differ."""
    if isinstance(theirs, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [where]
    if isinstance(theirs, list):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if not isinstance(theirs, dict):
        return [] if ours == theirs else [where]
    missing, shared = ours.keys() ^ theirs.keys(), ours.keys() & theirs.keys()
    below = (differences(ours[key], theirs[key], f"{where}/{key}") for key in shared)
    return sum(below, [f"{where}/{key}" for key in missing])


def final_state(folder: Path) -> dict:
    state = read_checkpoint(folder / f"checkpoint-{EPOCHS - 1}.pth")
    return {key: state[key] for key in COMPARED if key in state}


def run(args: argparse.Namespace) -> bool:
    """Trains without and with kills and writes the result; returns whether the final states are identical."""
    straight, killed = args.output / args.program / "straight", args.output / args.program / "killed"
    if killed.exists():
        raise SystemExit(f"{killed} exists: remove it, or choose another --output")
    make_videos(args.output / "videos")
    began = time.monotonic()
    if begin(args.program, args.output / "videos", straight).wait():
        raise SystemExit(f"the uninterrupted run failed, see {straight / 'console.txt'}")
    print(f"uninterrupted: {EPOCHS} epochs of {VIDEOS // BATCH} steps in {time.monotonic() - began:.0f} s")
    met = train_with_kills(args.program, args.output / "videos", killed, args.kills, args.seed)

    expected = final_state(straight)
    different = differences(final_state(killed), expected)
    result = {
        "program": args.program,
        "kills": len(met),
        "by_moment": dict(Counter(entry["moment"] for entry in met)),
        "left_a_half_written_checkpoint": sum(entry["half_written"] for entry in met),
        "compared": sorted(expected),
        "different": different,
        "identical": not different,
        "met": met,
    }
    with whole_file(args.output / f"{args.program}.json", "w") as file:
        file.write(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "met"}, indent=1))
    return not different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the videos, runs and results")
    parser.add_argument("--program", choices=list(PROGRAMS), default="pretraining", help="program to test")
    parser.add_argument("--kills", type=int, default=30, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    try:
        return 0 if run(parser.parse_args()) else 1
    except CheckpointError as error:
        raise SystemExit(f"kill_test.py: error: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
