"""Evaluates pre-trained models on held-out demo videos, whose foreground is known, under random masks.

    python tools/demo_report.py --data output/demo/videos/test.csv --output output/demo \
        --models adaptive=output/demo/adaptive random=output/demo/random

For each model: the reconstruction error of masked tokens, of all of them and of the foreground's, and the error of
predicting zero, which for normalised pixels is predicting each patch's mean. For an adaptive sampler: how much of
its probability lies on the foreground, relative to the uniform distribution; what the error map predicts for that;
and the entropy of P. The sampling loss is stationary where P is proportional to a token's error when it is masked
times how often the sampler masks it, so that map is taken under the sampler's own masks. Writes report.json and
report.png.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from augment import COLOUR_STATISTICS, Colours, normalize, to_pixels
from clips.frame_indices import pretrain_indices
from clips.lists import read_list
from clips.video import open_video
from masking_generator import MaskingGenerator
from modeling_finetune import colour_statistics
from runs.checkpoints import epoch_checkpoints
from targets import Target
from tools.demo_table import named_folders
from utils import SettingError, UserError, whole_file
from weights.names import load_weights
from weights.pretraining import load_pretrain_model, trained_target

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOREGROUND = 0.5  # share of a token that moving sprites must cover for it to count as foreground
NUM_MASKS = 4  # random masks per clip


def load_clips(list_path: Path, num_frames: int, sampling_rate: int, size: int, window: tuple[int, int, int]):
    """Decodes a demo list: clips uint8 (n,3,T,S,S) of whole frames, and each token's share of foreground (n,N)."""
    clips, shares = [], []
    for record in tqdm(read_list(list_path), desc="decoding", disable=not sys.stderr.isatty()):
        with open_video(record.path) as video:
            indices = pretrain_indices(0, video.num_frames, num_frames, sampling_rate)
            frames = resize(video.get_frames(indices), [size, size], antialias=True)  # (T,3,S,S)
        clips.append(frames.transpose(0, 1))
        mask = np.load(Path(record.path).with_suffix(".npz"))["mask"][indices]  # (T,H,W)
        shares.append(adaptive_avg_pool3d(torch.from_numpy(mask)[None].float(), window).flatten())
    return torch.stack(clips), torch.stack(shares)


def sum_over_masks(model, target: Target, colours: Colours, pixels: Tensor, masking: MaskingGenerator) -> Tensor:
    """Runs NUM_MASKS random masks of clips (n,3,T,H,W) in [0,1], and as many of the sampler's own.

    Returns:
        Five tables (5,n,N): for each token the sums over the masks of its error, of the error of predicting zero,
        of the times it was masked, and of its error under the sampler's masks; then the sampler's P. The last two
        are 0 without a sampler.
    """
    sums = torch.zeros(5, len(pixels), masking.num_tokens)
    error, zero, times, own, probs = sums
    for _ in range(NUM_MASKS):
        out = model(normalize(pixels, *colours), masking(times).visible)  # random masks take only the shape
        truth = target(pixels, out.masked)
        error.scatter_add_(1, out.masked, target.error(out.prediction, truth))
        zero.scatter_add_(1, out.masked, target.error(torch.zeros_like(out.prediction), truth))
        times.scatter_add_(1, out.masked, torch.ones(out.masked.shape))
        if out.log_probs is not None:
            out = model(normalize(pixels, *colours))
            own.scatter_add_(1, out.masked, target.error(out.prediction, target(pixels, out.masked)))
            probs.copy_(out.log_probs.exp())
    return sums


@torch.no_grad()
def judge(
    model, target: Target, colours: Colours, clips: Tensor, shares: Tensor, ratio: float, batch_size: int = 50
) -> dict[str, float]:
    """The statistics of one model; every model gets the same random masks, which hide `ratio` of the tokens.

    The clips are uint8 (n,3,T,H,W), the foreground's shares of their tokens (n,N).
    """
    masking = MaskingGenerator(mask_type="random", mask_ratio=ratio, window=model.window)
    torch.manual_seed(0)
    parts = [sum_over_masks(model, target, colours, to_pixels(part), masking) for part in clips.split(batch_size)]
    error, zero, times, own, probs = torch.cat(parts, dim=1)  # (n,N) each
    foreground = shares >= FOREGROUND
    result = {
        "loss": ratio_of(error, times),
        "loss_predicting_means": ratio_of(zero, times),
        "foreground_error": ratio_of(error[foreground], times[foreground]),
        "foreground_error_predicting_means": ratio_of(zero[foreground], times[foreground]),
        "foreground_share": shares.mean().item(),
    }
    if model.masking.adaptive:
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum(1).mean() / math.log(masking.num_tokens)
        result |= {
            "foreground_mass": mass_over_uniform(probs, shares),
            "foreground_mass_predicted": mass_over_uniform(own, shares),
            "entropy": entropy.item(),
        }
    return result


def ratio_of(total: Tensor, times: Tensor) -> float:
    return (total.sum() / times.sum()).item()


def mass_over_uniform(weight: Tensor, shares: Tensor) -> float:
    """How much of a distribution over tokens lies on the foreground, relative to the uniform one: the clips' mean.

    `weight` (n,N) is the distribution, not yet normalised; `shares` (n,N) are the foreground's shares of the tokens.
    """
    probs = weight / weight.sum(1, keepdim=True)
    return ((probs * shares).sum(1).mean() / shares.mean()).item()


def draw(report: dict, curves: dict[str, list[dict]], path: Path) -> None:
    """Draws the training curves beside the two comparisons of the report, as a PNG."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    draw_curves(left, report, curves)
    draw_errors(middle, report)
    adaptive = next((r for r in report.values() if "foreground_mass" in r), None)
    if adaptive is not None:
        draw_foreground(right, adaptive)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_curves(axes: plt.Axes, report: dict, curves: dict[str, list[dict]]) -> None:
    for name, epochs in curves.items():
        axes.plot([e["epoch"] + 1 for e in epochs], [e["loss_reconstruction"] for e in epochs], label=name)
    plateau = next(iter(report.values()))["loss_predicting_means"]
    axes.axhline(plateau, color="grey", linestyle=":", label="predicting zero (patch mean)")
    axes.set(title="training loss under each model's own masks", xlabel="epoch", ylabel="reconstruction error")
    axes.legend(frameon=False)


def draw_errors(axes: plt.Axes, report: dict) -> None:
    places = np.arange(2)
    for k, (name, r) in enumerate(report.items()):
        bars = axes.bar(places + 0.38 * k, [r["loss"], r["foreground_error"]], 0.36, label=name)
        axes.bar_label(bars, fmt="%.2f")
    limit = r["foreground_error_predicting_means"]
    axes.axhline(limit, color="grey", linestyle=":", label="predicting zero (patch mean)")
    axes.set_xticks(places + 0.19, ["all tokens", "foreground tokens"])
    axes.set(title="held-out error, the same random masks", ylim=(0, 1.5 * limit))
    axes.legend(frameon=False, loc="upper left")


def draw_foreground(axes: plt.Axes, adaptive: dict) -> None:
    values = [1.0, adaptive["foreground_mass"], adaptive["foreground_mass_predicted"]]
    names = ["uniform", "sampler's P", "predicted by\nthe error map"]
    axes.bar_label(axes.bar(names, values, color=["grey", "C0", "C2"]), fmt="%.2f")
    axes.set(
        title="probability on the foreground / uniform",
        xlabel=f"entropy of P: {adaptive['entropy']:.3f} of log N",
        ylim=(0, 1.2 * max(values)),
    )


def report_on(folders: dict[str, Path], data: Path, output: Path) -> None:
    """Judges the newest model in each folder; writes report.json and report.png.

    Raises:
        SettingError: a folder has no checkpoint of an epoch.
    """
    report, curves = {}, {}
    for name, folder in folders.items():
        if not (checkpoints := epoch_checkpoints(folder)):
            raise SettingError(f"{folder} has no checkpoint-<epoch>.pth")
        found = load_weights(checkpoints[0])
        model, flags = load_pretrain_model(found), found.flags
        target = trained_target(found.settings, flags, patch=model.patch)
        if not target.ready:
            raise SettingError(f"{checkpoints[0]}: its error is {target.error_note}, which this report does not read")
        statistics = colour_statistics(model.statistics, imagenet=flags.get("imagenet_default_mean_and_std", True))
        colours = COLOUR_STATISTICS[statistics]
        size = model.window[1] * model.patch
        clips, shares = load_clips(data, flags["num_frames"], flags["sampling_rate"], size, model.window)
        report[name] = judge(model, target, colours, clips, shares, flags["mask_ratio"])
        curves[name] = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        report[name]["seconds"] = sum(epoch["seconds"] for epoch in curves[name])
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in report[name].items()))
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / "report.json", "w") as file:
        file.write(json.dumps(report, indent=1) + "\n")
    draw(report, curves, output / "report.png")
    print(f"wrote {output / 'report.json'} and {output / 'report.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="list of held-out demo videos")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="output folders")
    parser.add_argument("--output", type=Path, required=True, help="folder of report.json and report.png")
    args = parser.parse_args()
    try:
        report_on(named_folders(args.models), args.data, args.output)
    except (UserError, OSError) as error:
        raise SystemExit(f"demo_report.py: error: {error}") from error


if __name__ == "__main__":
    main()
