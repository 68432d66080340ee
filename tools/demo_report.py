"""Judge pre-trained models on the demo videos, whose foreground is known, under held-out random masks.

    python tools/demo_report.py --data output/demo/videos/test.csv --output output/demo \
        --models adaptive=output/demo/adaptive random=output/demo/random

For each model: the reconstruction error of masked tokens, of all and of the foreground's, beside the cost of
predicting each patch's mean. For an adaptive sampler: how much of its probability lies on the foreground, over
uniform, beside what the error map predicts, and the entropy of P. The sampling loss is at rest where P is
proportional to the error that a token has when it is masked times how often the sampler masks it, so that map is
taken under the sampler's own masks. Writes report.json and report.png.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from augment import normalize, to_pixels
from clips.frame_indices import pretrain_indices
from clips.lists import read_list
from clips.video import open_video
from masking_generator import MaskingGenerator
from runs.checkpoints import epoch_checkpoints, read_checkpoint
from targets import reconstruction_error, reconstruction_targets
from weights.names import load_weights
from weights.pretraining import load_pretrain_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOREGROUND = 0.5  # a token belongs to the foreground when at least so much of it is covered by moving sprites
NUM_MASKS = 4  # random masks a clip


def load_clips(list_path: Path, num_frames: int, sampling_rate: int, size: int, window: tuple[int, int, int]):
    """Whole clips uint8 (n,3,T,S,S) of a demo list, and the foreground's share of each token, (n,N) in [0,1]."""
    clips, shares = [], []
    for record in tqdm(read_list(list_path), desc="decoding", disable=not sys.stderr.isatty()):
        with open_video(record.path) as video:
            indices = pretrain_indices(0, video.num_frames, num_frames, sampling_rate)
            frames = resize(video.get_frames(indices), [size, size], antialias=True)  # (T,3,S,S)
        clips.append(frames.transpose(0, 1))
        mask = np.load(Path(record.path).with_suffix(".npz"))["mask"][indices]  # (T,H,W)
        shares.append(adaptive_avg_pool3d(torch.from_numpy(mask)[None].float(), window).flatten())
    return torch.stack(clips), torch.stack(shares)


@torch.no_grad()
def judge(model, clips: torch.Tensor, shares: torch.Tensor, ratio: float, batch_size: int = 50) -> dict:
    """The statistics of one model on clips uint8 (n,3,T,H,W); every model is shown the same random masks."""
    masking = MaskingGenerator(mask_type="random", mask_ratio=ratio, window=model.window)
    error, zero, times, own = (torch.zeros_like(shares) for _ in range(4))  # sums over the masks, (n,N)
    probs = torch.zeros_like(shares)
    torch.manual_seed(0)
    for rows in torch.arange(len(clips)).split(batch_size):
        pixels = to_pixels(clips[rows])
        for _ in range(NUM_MASKS):
            visible = masking(torch.zeros_like(shares[rows]).log_softmax(1)).visible
            out = model(normalize(pixels), visible)
            target = reconstruction_targets(pixels, out.masked, model.patch)
            error[rows] += scattered(reconstruction_error(out.prediction, target), out.masked, masking.num_tokens)
            zero[rows] += scattered(target.square().mean(2), out.masked, masking.num_tokens)
            times[rows] += scattered(torch.ones_like(target[:, :, 0]), out.masked, masking.num_tokens)
            if out.log_probs is not None:
                out = model(normalize(pixels))  # masks of the sampler's own
                target = reconstruction_targets(pixels, out.masked, model.patch)
                own[rows] += scattered(
                    reconstruction_error(out.prediction, target), out.masked, masking.num_tokens
                )
                probs[rows] = out.log_probs.exp()

    foreground = shares >= FOREGROUND
    result = {
        "loss": ratio_of(error, times),
        "loss_predicting_means": ratio_of(zero, times),
        "foreground_error": ratio_of(error[foreground], times[foreground]),
        "foreground_error_predicting_means": ratio_of(zero[foreground], times[foreground]),
        "foreground_share": shares.mean().item(),
    }
    if out.log_probs is not None:
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum(1).mean() / math.log(masking.num_tokens)
        result |= {
            "foreground_mass": mass_over_uniform(probs, shares),
            "foreground_mass_predicted": mass_over_uniform(own, shares),
            "entropy": entropy.item(),
        }
    return result


def scattered(values: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
    """Values (B,n) at their tokens' places in zeros (B,length)."""
    return values.new_zeros(len(values), length).scatter(1, index, values)


def ratio_of(total: torch.Tensor, times: torch.Tensor) -> float:
    return (total.sum() / times.sum()).item()


def mass_over_uniform(weight: torch.Tensor, shares: torch.Tensor) -> float:
    """How much of a distribution over tokens lies on the foreground, over what a uniform one has there.

    weight (n,N) non-negative, normalised within each clip here; shares (n,N). Mean over the clips.
    """
    probs = weight / weight.sum(1, keepdim=True)
    return ((probs * shares).sum(1).mean() / shares.mean()).item()


def draw(report: dict, curves: dict[str, list[dict]], path: Path) -> None:
    """Training curves beside the two comparisons of the report, as a PNG."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, epochs in curves.items():
        left.plot([e["epoch"] + 1 for e in epochs], [e["loss_reconstruction"] for e in epochs], label=name)
    plateau = next(iter(report.values()))["loss_predicting_means"]
    left.axhline(plateau, color="grey", linestyle=":", label="predicting each patch's mean")
    left.set(title="training loss under each model's own masks", xlabel="epoch", ylabel="normalised MSE")
    left.legend(frameon=False)

    places = np.arange(2)
    for k, (name, r) in enumerate(report.items()):
        bars = middle.bar(places + 0.38 * k, [r["loss"], r["foreground_error"]], 0.36, label=name)
        middle.bar_label(bars, fmt="%.2f")
    limit = r["foreground_error_predicting_means"]
    middle.axhline(limit, color="grey", linestyle=":", label="predicting each patch's mean")
    middle.set_xticks(places + 0.19, ["all tokens", "foreground tokens"])
    middle.set(title="held-out error, the same random masks", ylim=(0, 1.5 * limit))
    middle.legend(frameon=False, loc="upper left")

    adaptive = next((r for r in report.values() if "foreground_mass" in r), None)
    if adaptive is not None:
        values = [1.0, adaptive["foreground_mass"], adaptive["foreground_mass_predicted"]]
        bars = right.bar(
            ["uniform", "sampler's P", "predicted by\nthe error map"], values, color=["grey", "C0", "C2"]
        )
        right.bar_label(bars, fmt="%.2f")
        right.set(
            title="probability on the foreground / uniform",
            xlabel=f"entropy of P: {adaptive['entropy']:.3f} of log N",
            ylim=(0, 1.2 * max(values)),
        )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="list of held-out demo videos")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="output folders")
    parser.add_argument("--output", type=Path, required=True, help="folder of report.json and report.png")
    args = parser.parse_args()

    report, curves = {}, {}
    for name, folder in (entry.split("=", 1) for entry in args.models):
        checkpoint = epoch_checkpoints(folder)[0]
        flags = read_checkpoint(checkpoint)["args"]
        model = load_pretrain_model(load_weights(checkpoint))
        size = model.window[1] * model.patch
        clips, shares = load_clips(args.data, flags["num_frames"], flags["sampling_rate"], size, model.window)
        report[name] = judge(model, clips, shares, flags["mask_ratio"])
        curves[name] = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
        report[name]["seconds"] = sum(epoch["seconds"] for epoch in curves[name])
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in report[name].items()))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, curves, args.output / "report.png")
    print(f"wrote {args.output / 'report.json'} and {args.output / 'report.png'}")


if __name__ == "__main__":
    main()
