"""The sizes at which the tables can be run: in full, or in a small world on a few CPU cores.

A small world has a recipe of its own for each kind of published ones, and a row's differences are carried over to it.
What is relative to a model or a budget (`RELATIVE`) keeps its proportion to the published recipe, all else its value.
Mask ratios too: each rule rounds them to whole tokens, tubes or time slots of the small window.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

RELATIVE = ("epochs", "warmup_epochs", "lr", "decoder_dim", "sampler_dim")


class Recipe(NamedTuple):
    """A recipe of a small world: path below scripts/ without .sh, further flags, videos a step if not its own."""

    path: str
    flags: str = ""
    total_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size.

    Args:
        recipes: start of a published recipe's name -> the recipe in its place. Without any, the published ones are run.
        environment: of every run; see scripts/launch.sh.
        data: folder of train.csv, val.csv and test.csv, and the command that makes it.
    """

    title: str
    recipes: dict[str, Recipe] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    data: tuple[str, str] = ("", "")


# 1500 steps of 16 clips, as the others; frames by their number, since the videos have few
DEMO_MAE_ST = (
    "--model pretrain_mae_st_tiny_patch8_64 --pos_embed separable --sampling pretrain --mask_type agnostic "
    "--mask_ratio 0.9 --num_sample 4 --epochs 3 --lr 0.064 --min_lr 0"
)
# six times the steps of the others, at a rate of its own for all layers (RESULTS.md)
DEMO_SCRATCH = "--epochs 12 --layer_decay 1 --lr 0.016 --min_lr 0.00016"
SCALES = {
    "full": Scale(title="as published"),
    "demo": Scale(
        title="the demo's moving sprites, 32 pixels, 128 tokens",
        recipes={
            "pretrain_adamae": Recipe("demo/pretrain", "--mask_type adaptive --mask_ratio 0.95"),
            "pretrain_mae_st": Recipe("demo/pretrain", DEMO_MAE_ST, 4),
            "finetune_adamae": Recipe("demo/finetune", "--view_fusion logits"),
            "finetune_mae_st": Recipe("demo/finetune", "--model vit_tiny_mae_st_patch8_64 --sampling dense"),
            "scratch_mae_st": Recipe("demo/finetune", f"--model vit_tiny_mae_st_patch8_64 {DEMO_SCRATCH}"),
        },
        environment={"LAUNCHER": "none"},
        data=("output/demo/videos", "python tools/make_demo_videos.py --output output/demo/videos --num_test 1000"),
    ),
}
