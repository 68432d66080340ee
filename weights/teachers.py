"""Frozen networks that make targets for pre-training (`targets.Features`), from their files."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from augment import COLOUR_STATISTICS, normalize
from masking_generator import Window
from modeling_blocks import TUBELET
from modeling_finetune import CLASSIFIERS, colour_statistics
from modeling_pretrain import PretrainVisionTransformer
from probes import Probe
from utils import SettingError, gather_from_ranks
from weights.classifier import classifier_settings, load_classifier
from weights.names import load_weights, weights_file


class Teacher(nn.Module):
    """The encoder of a checkpoint: clips (B,3,T,H,W) float32 in [0,1] -> features (B,N,D) of the last block.

    Where the checkpoint has a norm of tokens they go through it: in pre-training, MAE-ST, and classifiers of the first
    token. The `fc_norm` of other classifiers is left out, since it normalises the mean of all tokens.

    Args:
        file: a checkpoint that `load_weights` reads, of pre-training or of a classifier.
        patch, window: of the model to train: side of a token in pixels, tokens (T',H',W').

    Raises:
        CheckpointError: as `load_weights` and `load_classifier`.
        SettingError: its tokens are not those of the model to train.
    """

    amp: torch.dtype | None = None  # of mixed precision

    def __init__(self, file: str, *, patch: int, window: Window):
        super().__init__()
        found = load_weights(file)
        model = load_classifier(found, headless=True, report=lambda text: None)
        self.encoder = model.encoder if isinstance(model, Probe) else model
        theirs = (*self.encoder.patch_embed.proj.kernel_size, *self.encoder.window)
        if theirs != (ours := (TUBELET, patch, patch, *window)):
            raise SettingError(
                f"--teacher {file} has {describe(*theirs)}, this model has {describe(*ours)}; they must agree "
                "(--model, --input_size, --num_frames)"
            )
        self.norm = nn.Identity()
        if "norm.weight" in found.plain:
            self.norm = nn.LayerNorm(self.encoder.dim, eps=1e-6)
            self.norm.load_state_dict({name: found.plain[f"norm.{name}"] for name in ("weight", "bias")})
        imagenet = found.flags.get("imagenet_default_mean_and_std", True)
        family = CLASSIFIERS[classifier_settings(found)["name"]]
        self.colours = COLOUR_STATISTICS[colour_statistics(family.statistics, imagenet=imagenet)]
        self.settings = {"width": self.encoder.dim, "network": f"--teacher of sha256 {sha256(weights_file(file))}"}
        self.requires_grad_(False).eval()

    def place(self, device: torch.device, amp: torch.dtype | None) -> "Teacher":
        """Moves it to a device; `amp` is the type of its mixed precision, if any."""
        self.amp = amp
        return self.to(device)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B,N,D) of clips (B,3,T,H,W)."""
        with torch.autocast(pixels.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.norm(self.encoder.forward_tokens(normalize(pixels, *self.colours)))


FROZEN = {"features": "teacher"}  # targets that need a frozen network, and the flag that names its file


def load_frozen(target: str, file: str, *, patch: int, window: Window) -> Teacher | None:
    """Loads the frozen network of a target; None for a target without one. Arguments as in `Teacher`.

    Its `settings` are those of the target that the model to train must remember.

    Raises:
        CheckpointError, SettingError: as `Teacher`; or there is no file for the target, or one for another target.
    """
    if bool(file) != (target in FROZEN):
        needs = f"needs --{FROZEN[target]} FILE" if target in FROZEN else "takes no --teacher"
        raise SettingError(f"--target {target} {needs}")
    return Teacher(file, patch=patch, window=window) if file else None


def load_same(settings: dict, file: str, model: PretrainVisionTransformer) -> Teacher:
    """Loads the frozen network of a trained model and its settings again.

    Raises:
        CheckpointError, SettingError: as `load_frozen`, or it is another network.
    """
    teacher = load_frozen(settings.get("target", "pixels"), file, patch=model.patch, window=model.window)
    was, now = settings["target_settings"]["network"], teacher.settings["network"]
    if was != now:
        raise SettingError(f"{file} is the {now}, the model was trained with the {was}")
    return teacher


def check_same_on_all_ranks(teacher: Teacher) -> None:
    """Checks that all processes have read the same file; all of them call it together.

    Raises:
        SettingError: they have not.
    """
    found = gather_from_ranks(teacher.settings["network"])
    if len(set(found)) > 1:
        listed = ", ".join(f"rank {rank}: {network}" for rank, network in enumerate(found))
        raise SettingError(f"the processes have read different files ({listed}): all machines must see the same one")


def describe(tubelet: int, height: int, width: int, *window: int) -> str:
    grid = " x ".join(map(str, window))
    return f"{grid} tokens of {tubelet} x {height} x {width} (frames x pixels)"


def sha256(file: Path) -> str:
    """The first 16 digits of a file's checksum."""
    checksum = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()[:16]
