"""Whether pre-training in bfloat16 reaches the loss of float32, on the demo's videos, for several seeds.

    python benchmarks/precision.py --output benchmarks/results/precision.json

Trains the demo's AdaMAE (scripts/demo.sh) in both precisions with the same seeds, and so the same clips, first weights
and random numbers, and compares the reconstruction loss of the last epoch. The difference is within noise if it is
smaller than the spread over seeds. A CPU without bfloat16 units takes much longer in bfloat16: --epochs 1 there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from reports import Report

ROOT = Path(__file__).resolve().parent.parent
DEMO = """
    --model pretrain_videomae_tiny_patch8_64 --decoder_depth 2 --input_size 32 --pos_embed sinusoid_3d --sampling_rate 1
    --mask_type adaptive --mask_ratio 0.85 --batch_size 8 --num_sample 2 --lr 0.032 --min_lr 0.0016 --warmup_steps 160
    --opt_betas 0.9 0.95 --num_workers 1 --vis_freq 0
"""  # scripts/demo.sh, without its number of epochs, precision and seed


def last_loss(videos: Path, folder: Path, *, amp: str, seed: int, flags: list[str]) -> float:
    """Trains one model; the reconstruction loss of its last epoch."""
    command = [sys.executable, ROOT / "run_mae_pretraining.py", *DEMO.split()]
    command += ["--data_path", videos, "--output_dir", folder]
    command += ["--amp", amp, "--seed", seed, *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"run_mae_pretraining.py failed:\n{done.stdout}{done.stderr}")
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])["loss_reconstruction"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=6, help="of 250 steps (default: %(default)s)")
    parser.add_argument("--videos", type=Path, help="the demo's list of training videos, else they are made here")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("flags", nargs="*", help="further flags of the program, after --")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(args.output, device, epochs=args.epochs, flags=args.flags)
    with tempfile.TemporaryDirectory() as scratch:
        videos, rows = args.videos, []
        if videos is None:
            made = [sys.executable, ROOT / "tools/make_demo_videos.py", "--output", f"{scratch}/videos"]
            subprocess.run(made, check=True)
            videos = Path(scratch, "videos/train.csv")
        for seed in args.seeds:
            losses = {
                name: last_loss(
                    videos,
                    Path(scratch, f"{name}-{seed}"),
                    amp=amp,
                    seed=seed,
                    flags=["--epochs", args.epochs, "--warmup_epochs", min(1, args.epochs - 1), *args.flags],
                )
                for name, amp in (("float32", "off"), ("bfloat16", "bf16"))
            }
            rows.append({"seed": seed, **losses})
            print(f"seed {seed}: {losses}", flush=True)
    report.table("Reconstruction loss of the last epoch", rows)
    differences = [row["bfloat16"] - row["float32"] for row in rows]
    spread = np.std([row["float32"] for row in rows], ddof=1) if len(rows) > 1 else float("nan")
    report.line(
        "bfloat16 - float32",
        f"{np.mean(differences):+.4f} on average, at most {max(map(abs, differences)):.4f}; "
        f"standard deviation of float32 over seeds {spread:.4f}",
    )
    report.write()


if __name__ == "__main__":
    main()
