"""The tables of the papers: a row is its differences from a recipe in scripts/, and what was published for it.

Published numbers are those known to this project: of a row without them the paper's are not in our sources.
`{tokenizer}` in flags is a file that the user names with --path.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper reports. Accuracies in per cent; None: not in our sources."""

    top1: float | None = None
    top5: float | None = None
    gb: float | None = None  # memory for 16 clips on one GPU
    gflop: float | None = None  # forward pass of one clip, two for a multiplication with its addition
    hours: tuple[float, float] | None = None  # of pre-training, without and with loading


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Args:
        flags: differences of pre-training from the table's recipe.
        pretrain, finetune: recipes, instead of the table's; pretrain "" starts from `start` instead.
        start: MODEL of fine-tuning without pre-training: scratch or timm:NAME.
        total_batch: videos a step of pre-training, instead of the recipe's.
        small: whether a small world can run it: no other size, data set, nor files of others.
    """

    name: str
    label: str
    flags: str = ""
    finetune_flags: str = ""
    pretrain: str | None = None
    finetune: str | None = None
    start: str = ""
    total_batch: int | None = None
    published: Published = field(default_factory=Published)
    small: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: its rows differ from the recipes `pretrain` and `finetune`, paths below scripts/ without .sh."""

    title: str
    source: str
    rows: tuple[Row, ...]
    pretrain: str = ""
    finetune: str = ""


def row(name: str, label: str, flags: str = "", *numbers: float | None, **settings) -> Row:
    """A row with its published top-1, top-5 and memory."""
    published = dict(zip(("top1", "top5", "gb"), numbers, strict=False))
    published |= {key: settings.pop(key) for key in ("gflop", "hours") if key in settings}
    return Row(name=name, label=label, flags=flags, published=Published(**published), **settings)


def run_of(pretrain: str, finetune: str, label: str, *numbers: float | None, **settings) -> Row:
    """A row of whole recipes, that a small world does not have."""
    folder, _, stem = pretrain.partition("/")
    name = f"{folder}-{stem.removeprefix('pretrain_')}"
    return row(name, label, "", *numbers, pretrain=pretrain, finetune=f"{folder}/{finetune}", small=False, **settings)


ADAMAE = {"pretrain": "ssv2/pretrain_adamae_base_800e", "finetune": "ssv2/finetune_adamae_base_800e_50e"}
MAE_ST = {"pretrain": "kinetics/pretrain_mae_st_large_100e", "finetune": "kinetics/finetune_mae_st_large_100e_50e"}
BEST = (70.04, 92.70, 14.4)
ABLATION = "AdaMAE, ablation tables (SSv2, ViT-B)"
ZOO = "VideoMAE model zoo"
UNKNOWN = "MAE-ST, ablations (Kinetics-400, ViT-L)"

TABLES = {
    "adamae-a": Table(
        title="AdaMAE (a): masks",
        source=ABLATION,
        **ADAMAE,
        rows=(
            row("tube75", "tube, .75", "--mask_type tube --mask_ratio 0.75", 67.3, 91.5, 16.2),
            row("tube90", "tube, .9", "--mask_type tube --mask_ratio 0.9", 69.3, 92.3, 14.7),
            row("random75", "random, .75", "--mask_type random --mask_ratio 0.75", 67.9, 90.6, 16.2),
            row("random90", "random, .9", "--mask_type random --mask_ratio 0.9", 68.3, 91.8, 14.7),
            row("frame875", "frame, .875", "--mask_type frame --mask_ratio 0.875", 61.5, 87.6, 12.8),
            row("adaptive95", "adaptive, .95", "", *BEST),
        ),
    ),
    "adamae-b": Table(
        title="AdaMAE (b): mask ratio",
        source=ABLATION,
        **ADAMAE,
        rows=(
            row("98", ".98", "--mask_ratio 0.98", 68.85, 91.94, 14.1),
            row("95", ".95", "", *BEST),
            row("90", ".90", "--mask_ratio 0.9", 69.55, 92.62, 15.1),
            row("85", ".85", "--mask_ratio 0.85", 68.06, 91.38, 15.9),
            row("80", ".80", "--mask_ratio 0.8", 66.96, 90.91, 16.9),
        ),
    ),
    "adamae-c": Table(
        title="AdaMAE (c): decoder depth",
        source=ABLATION,
        **ADAMAE,
        rows=(
            row("1", "1 block", "--decoder_depth 1", 68.86, 92.07, 9.2),
            row("2", "2 blocks", "--decoder_depth 2", 69.13, 92.17, 11.0),
            row("4", "4 blocks", "", *BEST),
            row("8", "8 blocks", "--decoder_depth 8", 69.97, 92.67, 21.3),
        ),
    ),
    "adamae-d": Table(
        title="AdaMAE (d): reconstruction loss",
        source=ABLATION,
        **ADAMAE,
        rows=(
            row("l1", "L1, normalised", "--loss l1", 69.12, 91.42),
            row("l1-raw", "L1, raw", "--loss l1 --normalize_target false", 68.75, 91.47),
            row("mse", "MSE, normalised", "", *BEST[:2]),
            row("mse-raw", "MSE, raw", "--normalize_target false", 68.87, 91.45),
        ),
    ),
    "adamae-e": Table(
        title="AdaMAE (e): epochs of pre-training, each with its own schedule",
        source=ABLATION,
        **ADAMAE,
        rows=(
            row("200", "200", "--epochs 200", 66.42, 90.59),
            row("500", "500", "--epochs 500", 69.20, 92.50),
            row("600", "600", "--epochs 600", 69.47, 92.52),
            row("800", "800", "", *BEST[:2]),
        ),
    ),
    "adamae-f": Table(
        title="AdaMAE (f): sampler",
        source=ABLATION,
        **ADAMAE,
        rows=(
            row("mlp", "MLP", "--sampler mlp", 65.41, 89.22, 11.8),
            row("mha-1-384", "MHA, depth 1, width 384", "--sampler_dim 384", 69.56, 90.89, 14.0),
            row("mha-1-768", "MHA, depth 1, width 768", "", *BEST),
            row("mha-2-384", "MHA, depth 2, width 384", "--sampler_depth 2 --sampler_dim 384", 70.03, 92.74, 17.1),
        ),
    ),
    "adamae": Table(
        title="AdaMAE: results",
        source="AdaMAE, ablation tables and abstract; top-5 of Kinetics-400: a public leaderboard",
        rows=(
            run_of(ADAMAE["pretrain"], "finetune_adamae_base_800e_50e", "SSv2, ViT-B", *BEST),
            run_of(
                *("kinetics/pretrain_adamae_base_800e", "finetune_adamae_base_800e_100e"),
                *("Kinetics-400, ViT-B", 81.7, 95.2),
            ),
        ),
    ),
    "videomae": Table(
        title="VideoMAE: results",
        source=ZOO,
        rows=(
            *(
                run_of(
                    f"{data}/pretrain_videomae_{size}_{epochs}e", f"finetune_videomae_{size}_{epochs}e_{more}e", *rest
                )
                for data, size, epochs, more, *rest in (
                    ("ssv2", "small", 2400, 40, "SSv2, ViT-S, 2400 epochs", 66.8, 90.3),
                    ("ssv2", "base", 800, 50, "SSv2, ViT-B, 800 epochs", 69.6, 92.0),
                    ("ssv2", "base", 2400, 30, "SSv2, ViT-B, 2400 epochs", 70.8, 92.4),
                    ("kinetics", "small", 1600, 150, "Kinetics-400, ViT-S, 1600 epochs", 79.0, 93.8),
                    ("kinetics", "base", 800, 100, "Kinetics-400, ViT-B, 800 epochs", 80.0, 94.4),
                    ("kinetics", "base", 1600, 75, "Kinetics-400, ViT-B, 1600 epochs", 81.5, 95.1),
                    ("kinetics", "large", 1600, 35, "Kinetics-400, ViT-L, 1600 epochs", 85.2, 96.8),
                    ("kinetics", "huge", 1600, 50, "Kinetics-400, ViT-H, 1600 epochs", 86.6, 97.1),
                    ("ucf101", "base", 3200, 100, "UCF101, ViT-B, 3200 epochs", 91.3, 98.5),
                )
            ),
            row(
                *("kinetics-repeated", "Kinetics-400, ViT-B, 800 epochs, 2 copies in fine-tuning", "", 81.0, 94.8),
                **{"pretrain": "kinetics/pretrain_videomae_base_800e", "finetune_flags": "--num_sample 2"},
                **{"finetune": "kinetics/finetune_videomae_base_800e_100e", "small": False},
            ),
        ),
    ),
    "mae-st-encoder": Table(
        title="MAE-ST: sparse and dense encoder",
        source="MAE-ST, ViT-L on Kinetics-400; its FLOPs, of multiply-adds, doubled",
        **MAE_ST,
        rows=(
            row("sparse", "sparse", "", 84.4, gflop=2 * 81.0, hours=(24.5, 35.8)),
            row("dense", "dense, with [M] tokens", "--dense_encoder", 84.3, gflop=2 * 627.5, hours=(141.1, 147.5)),
        ),
    ),
    "mae-st-masks": Table(
        title="MAE-ST: mask type",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            row("agnostic90", "agnostic, .9", "", 84.4),
            row("space90", "space-only, .9", "--mask_type space_only", 83.5),
            row("time75", "time-only, .75", "--mask_type time_only --mask_ratio 0.75", 79.1),
            row("block75", "block, .75", "--mask_type block --mask_ratio 0.75", 83.2),
        ),
    ),
    "mae-st-ratio": Table(
        title="MAE-ST: mask ratio",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            row("60", ".6", "--mask_ratio 0.6"),
            row("75", ".75", "--mask_ratio 0.75"),
            row("90", ".9", "", 84.4),
            row("95", ".95", "--mask_ratio 0.95"),
        ),
    ),
    "mae-st-target": Table(
        title="MAE-ST: target",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            row("raw", "pixels, raw", "--normalize_target false"),
            row("normalised", "pixels, normalised", "", 84.4),
            row("hog", "HOG", "--target hog"),
            row(
                *("tokens", "tokens of an image tokenizer"),
                "--target tokens --tokenizer {tokenizer} --tokenizer_vocab 8192",
                small=False,
            ),
        ),
    ),
    "mae-st-crop": Table(
        title="MAE-ST: crop of pre-training",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            row("center", "centre crop, no flip", "--crop center --flip 0"),
            row("area08", "area .08 to 1", "--crop_scale 0.08 1"),
            row("area50", "area .5 to 1", "", 84.4),
            row("jitter", "area .5 to 1, colour jitter", "--color_jitter 0.4"),
        ),
    ),
    "mae-st-repeated": Table(
        title="MAE-ST: repeated sampling, the same clips a step and in all, the same peak rate",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            row("1", "1 clip a video", "--num_sample 1 --epochs 400 --warmup_epochs 20 --lr 4e-4", total_batch=1024),
            row("2", "2 clips a video", "--num_sample 2 --epochs 200 --warmup_epochs 10 --lr 8e-4", total_batch=512),
            row("4", "4 clips a video", "", 84.4),
        ),
    ),
    "mae-st-width": Table(
        title="MAE-ST: decoder width",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            *(row(str(width), str(width), f"--decoder_dim {width}") for width in (128, 256)),
            row("512", "512", "", 84.4),
            row("1024", "1024", "--decoder_dim 1024"),
        ),
    ),
    "mae-st-depth": Table(
        title="MAE-ST: decoder depth",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            *(row(str(depth), f"{depth} block{'s' * (depth > 1)}", f"--decoder_depth {depth}") for depth in (1, 2)),
            row("4", "4 blocks", "", 84.4),
            row("8", "8 blocks", "--decoder_depth 8"),
        ),
    ),
    "mae-st-start": Table(
        title="MAE-ST: initialisation of fine-tuning",
        source=UNKNOWN,
        **MAE_ST,
        rows=(
            row("random", "random", pretrain="", start="scratch"),
            *(
                row(name, label, pretrain="", start=f"timm:vit_large_patch16_224.{weights}", small=False)
                for name, label, weights in (
                    ("images", "images, supervised", "augreg_in21k_ft_in1k"),
                    ("mae", "images, MAE", "mae"),
                )
            ),
            row("video", "videos, MAE-ST", "", 84.4),
        ),
    ),
    "mae-st-scratch": Table(
        title="MAE-ST: from scratch against pre-trained, over hours",
        source="MAE-ST, Figure 5 and repository (84.35: on one view, see FINETUNE.md)",
        **MAE_ST,
        rows=(
            row(
                *("scratch", "200 epochs from scratch", "", 71.4),
                **{"pretrain": "", "finetune": "kinetics/scratch_mae_st_large_200e", "start": "scratch"},
            ),
            row("pretrained", "pre-trained 100 epochs, fine-tuned 50", "", 84.35),
        ),
    ),
}
