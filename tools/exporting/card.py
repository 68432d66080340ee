"""The README.md of exported weights: the hub's metadata, how to load them, recipe, data, numbers, licence."""

import json
from pathlib import Path

from runs.checkpoints import CheckpointError
from weights.names import Weights

# Flags of a run that its card tells, in this order; the machine's folders are nobody's business.
RECIPE = (
    *("model", "mask_type", "mask_ratio", "sampler", "sampling_loss", "target", "decoder_depth"),
    *("num_frames", "num_segments", "sampling_rate", "input_size", "num_sample", "epochs", "warmup_epochs"),
    *("batch_size", "update_freq", "lr", "min_lr", "weight_decay", "opt_betas", "layer_decay", "drop_path"),
    *("fc_drop_rate", "smoothing", "mixup", "cutmix", "reprob", "aa", "seed"),
)
LOADING = {
    ("huggingface", True): "model = transformers.VideoMAEForVideoClassification.from_pretrained(FOLDER)",
    ("huggingface", False): "model = transformers.VideoMAEForPreTraining.from_pretrained(FOLDER)",
    ("native", True): "model = weights.native.Classifier.from_pretrained(FOLDER)  # in its repository",
    ("native", False): "model = weights.native.PretrainingModel.from_pretrained(FOLDER)  # in its repository",
    ("published", True): 'weights = torch.load("checkpoint.pth")["model"]',
    ("published", False): 'weights = torch.load("checkpoint.pth")["model"]',
}


def choose_licence(given: str | None, found: Weights) -> str:
    """The licence that the card names: `given`, else this repository's for what was trained here from random weights.

    Raises:
        CheckpointError: none is given for weights that are, or started from, those of others, or may have.
    """
    if given:
        return given
    known = "AdaMAE's repository is mit, VideoMAE's and MAE-ST's are cc-by-nc-4.0, this one is mit"
    if started := found.flags.get("finetune"):
        raise CheckpointError(f"{found.path} started from {started}: name its licence with --license ({known})")
    if not found.settings or "epochs" not in found.flags:  # exports have settings, but not all flags of the run
        raise CheckpointError(f"{found.path} doesn't say who trained it: name its licence with --license ({known})")
    return "mit"


def model_card(found: Weights, *, to: str, classifier: bool, licence: str, notes: list[str]) -> str:
    """The text of the card.

    Args:
        to: the kind of export.
        notes: what a user of the weights must know, a sentence each.
    """
    flags = found.flags
    tags = ["video-classification"] if classifier else ["video", "masked-autoencoder"]
    library = "transformers" if to == "huggingface" else "pytorch"
    head = ["---", f"license: {licence}", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags)]
    if classifier:
        head.append("pipeline_tag: video-classification")
    started = flags.get("finetune")
    begun = f"Training started from `{Path(started).name}`." if started else ""
    parts = [
        "\n".join([*head, "---"]),
        f"# {found.kind} of `{Path(found.path).name}`",
        "The method: [AdaMAE](https://arxiv.org/abs/2211.09120), [VideoMAE](https://arxiv.org/abs/2203.12602), "
        "[MAE-ST](https://arxiv.org/abs/2205.09113).",
        f"    {LOADING[to, classifier]}",
        "\n".join(f"- {note}" for note in notes),
        f"## Data\n\n{data_of(flags, classifier)}",
        f"## Recipe\n\n{recipe_of(flags)}",
        f"## Numbers\n\n{numbers_of(found.path)}",
        f"## Licence\n\n{licence}. {begun}",
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def data_of(flags: dict, classifier: bool) -> str:
    name = flags.get("data_set") if classifier else None
    named = {None: "The checkpoint does not name its data set.", "custom": "A data set of the author's own."}
    return named.get(name, f"Labels and videos of {name}.")


def recipe_of(flags: dict) -> str:
    told = [f"| `--{name}` | {flags[name]} |" for name in RECIPE if flags.get(name) not in (None, "", [])]
    return "\n".join(["| flag | value |", "|---|---|", *told]) if told else "The checkpoint does not hold its flags."


def numbers_of(path: Path) -> str:
    """The table of the test.json beside a checkpoint, and which weights it is of."""
    file = path.parent / "test.json"
    if not file.is_file():
        return "None are known."
    test = json.loads(file.read_text(encoding="utf-8"))
    rows = [f"| {name} | {value:.2f} |" for name, value in test.items() if isinstance(value, float)]
    measured = f"Measured on {test['videos']} videos with {Path(test['tested']).name}."
    return "\n".join(["| test | % |", "|---|---|", *rows, "", measured])
