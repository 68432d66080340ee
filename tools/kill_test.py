"""Kill a training run again and again, let it go on each time, and compare its end with a run left in peace.

    python tools/kill_test.py --output output/kill_test                        # pre-training, 30 kills
    python tools/kill_test.py --output output/kill_test --program finetuning

Makes a few demo videos, trains a tiny model on them once undisturbed, and once with SIGKILL to all its processes
at random moments: while it starts, while it trains, and for two kills of five while a checkpoint is half written
(one is written at every step). The two end states (weights, optimiser, moving average, best metric) must be the
same bit for bit; the exit status says whether they are. Writes <program>.json: the kills, where each found the
run, and the verdict.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runs.checkpoints import CheckpointError, newest_checkpoint, read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, BATCH, VIDEOS = 30, 4, 48
SMALL = [
    *("--input_size", "32", "--sampling_rate", "1", "--num_sample", "2", "--batch_size", str(BATCH)),
    *("--epochs", str(EPOCHS), "--warmup_epochs", "1", "--lr", "0.03", "--amp", "off", "--device", "cpu"),
    *("--num_workers", "2", "--decoder", "pyav", "--save_ckpt_freq", "1", "--save_ckpt_minutes", "1e-9"),
    *("--keep_ckpts", "2", "--log_freq", "1"),
]
PROGRAMS = {
    "pretraining": [
        *("run_mae_pretraining.py", "--model", "pretrain_videomae_tiny_patch8_64", "--mask_ratio", "0.85"),
        *("--decoder_depth", "1", "--vis_freq", "0"),
    ],
    "finetuning": [
        *("run_class_finetuning.py", "--model", "vit_tiny_patch8_64", "--data_set", "custom", "--nb_classes", "10"),
        *("--model_ema", "--model_ema_decay", "0.9", "--test_num_segment", "1", "--test_num_crop", "1"),
    ],
}
COMPARED = ("model", "optimizer", "scaler", "model_ema", "best")


def make_videos(folder: Path) -> None:
    counts = ["--num_train", str(VIDEOS), "--num_val", "10", "--num_test", "10", "--size", "32", "--workers", "2"]
    command = [sys.executable, str(ROOT / "tools/make_demo_videos.py"), "--output", str(folder), *counts]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def begin(program: str, videos: Path, output: Path) -> subprocess.Popen:
    """The program in a session of its own, so that a signal reaches its data workers too."""
    script, *flags = PROGRAMS[program]
    data = videos / "train.csv" if program == "pretraining" else videos
    command = [sys.executable, "-u", str(ROOT / script), *flags, *SMALL]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "console.txt").open("a") as console:
        return subprocess.Popen(
            [*command, "--data_path", str(data), "--output_dir", str(output)],
            stdout=console,
            stderr=console,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def half_written(output: Path) -> list[Path]:
    return list(output.glob(".checkpoint-*.tmp"))


def wait_to_kill(run: subprocess.Popen, output: Path, moment: str, rng: random.Random) -> None:
    """Returns at the moment to kill, or when the run has ended.

    moment: "start", somewhere in the first seconds; "training", some time after its first step; "writing", while
        a checkpoint is half written, some time after that step.
    """
    if moment == "start":
        time.sleep(rng.uniform(0, 8))
        return
    seen = (output / "console.txt").read_text().count("  step ")
    while run.poll() is None and (output / "console.txt").read_text().count("  step ") == seen:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0))
    while moment == "writing" and run.poll() is None and not half_written(output):
        pass  # a few milliseconds are all there is


def kill(run: subprocess.Popen) -> None:
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def place(output: Path) -> str:
    """Where the newest whole checkpoint stands."""
    found = newest_checkpoint(output, lambda text: print(text, file=sys.stderr))
    if found is None:
        return "nothing yet"
    return f"epoch {found[1]['epoch'] + 1}, batch {found[1]['batch']}"


def torment(program: str, videos: Path, output: Path, kills: int, seed: int) -> list[dict]:
    """Trains to the end with that many kills; returns what each of them met."""
    rng, met = random.Random(seed), []
    with tqdm(total=kills, desc="kills") as bar:
        while len(met) < kills:
            moment = rng.choice(["start", "training", "training", "writing", "writing"])
            run = begin(program, videos, output)
            wait_to_kill(run, output, moment, rng)
            if run.poll() is not None:
                raise SystemExit(f"the run ended after {len(met)} kills, see {output / 'console.txt'}")
            kill(run)
            met.append({"moment": moment, "half_written": bool(half_written(output)), "at": place(output)})
            bar.update()
    run = begin(program, videos, output)
    if run.wait():
        raise SystemExit(f"the last run failed, see {output / 'console.txt'}")
    return met


def differences(ours, theirs, where: str = "") -> list[str]:
    """The places at which two nested states are not the same bits."""
    if isinstance(theirs, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [where]
    if isinstance(theirs, dict):
        missing = [f"{where}/{key}" for key in ours.keys() ^ theirs.keys()]
        return missing + [
            d for key in ours.keys() & theirs.keys() for d in differences(ours[key], theirs[key], f"{where}/{key}")
        ]
    if isinstance(theirs, list):
        return [d for i, pair in enumerate(zip(ours, theirs, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    return [] if ours == theirs else [where]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the videos, runs and results")
    parser.add_argument("--program", choices=list(PROGRAMS), default="pretraining")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    straight, killed = args.output / args.program / "straight", args.output / args.program / "killed"
    if killed.exists():
        raise SystemExit(f"{killed} is there already: remove it, or choose another --output")

    make_videos(args.output / "videos")
    began = time.monotonic()
    if begin(args.program, args.output / "videos", straight).wait():
        raise SystemExit(f"the undisturbed run failed, see {straight / 'console.txt'}")
    print(f"undisturbed: {EPOCHS} epochs of {VIDEOS // BATCH} steps in {time.monotonic() - began:.0f} s")
    met = torment(args.program, args.output / "videos", killed, args.kills, args.seed)

    name = f"checkpoint-{EPOCHS - 1}.pth"
    try:
        ends = [
            {k: v for k, v in read_checkpoint(folder / name).items() if k in COMPARED} for folder in (killed, straight)
        ]
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    different = differences(*ends)
    result = {
        "program": args.program,
        "kills": len(met),
        "by_moment": dict(Counter(entry["moment"] for entry in met)),
        "left_a_half_written_checkpoint": sum(entry["half_written"] for entry in met),
        "compared": sorted(ends[1]),
        "different": different,
        "identical": not different,
        "met": met,
    }
    (args.output / f"{args.program}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "met"}, indent=1))
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
