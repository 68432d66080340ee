"""What pre-training of a row costs: operations of a forward pass, memory of a step of 16 clips, visible tokens.

On the CPU the tensors have no data (torch's FakeTensorMode), so that a ViT-H is measured on a laptop. Memory is then
the peak of all tensors of a step as torch's MemTracker counts them (weights, gradients, AdamW's moments, activations),
without what kernels need for the moment. On a GPU it is the allocator's peak.
"""

import contextlib
import json
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from augment import normalize, to_pixels
from kernels.attention import FEW_THREADS
from modeling_pretrain import PRETRAIN_MODELS, create_pretrain_model
from optim import create_optimizer
from runs.console import memory_gib
from targets import Losses, create_target
from tools.reproducing.plan import Flags
from utils import whole_file

CLIPS = 16  # of AdaMAE's tables
NUMBERS = {"decoder_depth": int, "decoder_dim": int, "input_size": int, "num_frames": int, "mask_ratio": float}
WORDS = ("mask_type", "pos_embed", "target")
SAMPLER = {"sampler": ("kind", str), "sampler_dim": ("width", int), "sampler_depth": ("depth", int)}


def model_settings(flags: Flags) -> dict | None:
    """Arguments of `create_pretrain_model` from the flags of a run; None if the target needs a network."""
    if flags.get("target", ("pixels",))[0] not in ("pixels", "hog"):
        return None
    given = {name: words[0] for name, words in flags.items() if words}
    settings = {name: kind(given[name]) for name, kind in NUMBERS.items() if name in given}
    settings |= {name: given[name] for name in WORDS if name in given}
    sampler = {name: kind(given[flag]) for flag, (name, kind) in SAMPLER.items() if flag in given}
    switches = {"dense_encoder": "dense_encoder" in flags, "checkpoint_activations": "use_checkpoint" in flags}
    return {"name": given["model"], **settings, **switches} | ({"sampler": sampler} if sampler else {})


def attention_flop(q, k, v, *rest, out_shape=None, **settings) -> int:
    """Operations of torch's attention on the CPU, which its counter does not know."""
    return sdpa_flop_count(q, k, v)


def forward_flop(model: nn.Module, clip: torch.Tensor) -> int:
    """Floating-point operations of the products in a forward pass of a clip (1,3,T,H,W), two for a multiply-add."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={cpu_attention: attention_flop})
    model.eval()
    with torch.no_grad(), counter:
        model(clip)
    return counter.get_total_flops()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, losses: Losses, clips: torch.Tensor) -> None:
    """A step of pre-training on uint8 clips (B,3,T,H,W), in bfloat16."""
    pixels = to_pixels(clips)
    with torch.autocast(clips.device.type, dtype=torch.bfloat16):
        output = model(normalize(pixels))
    losses(output, pixels)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(settings: dict, clips: int = CLIPS, *, data: bool = False) -> dict[str, float]:
    """GFLOP of a clip's forward pass, GiB of a step of so many clips, and the numbers of visible and of all tokens.

    Args:
        settings: of `model_settings`.
        data: on the CPU, compute with real tensors.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = PRETRAIN_MODELS[settings["name"]].target if settings.get("target", "pixels") == "pixels" else {}
    model, side = create_pretrain_model(**settings, target_settings=own), settings.get("input_size")
    side = side or int(settings["name"].rpartition("_")[2])
    fake, shape = device.type == "cpu" and not data, (3, settings.get("num_frames", 16), side, side)
    found = {"visible": model.masking.num_visible, "tokens": model.masking.num_tokens}
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":  # the GPU's path through the attention, which stores the same
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(FEW_THREADS + 1)
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model.to_empty(device=device)  # `to` leaves weights on the CPU as they are
        else:
            model.to(device)
        found["gflop"] = forward_flop(model, torch.zeros(1, *shape, device=device)) / 1e9
        target = create_target(settings.get("target", "pixels"), patch=model.patch, **own)
        found["gib"] = step_gib(model.train(), Losses(target=target), torch.zeros(clips, *shape).byte().to(device))
    return found


def step_gib(model: nn.Module, losses: Losses, clips: torch.Tensor) -> float:
    """Peak GiB of a step that is not the first, so that the optimiser's moments are there."""
    optimizer = create_optimizer(model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    if clips.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(clips.device)
        train_step(model, optimizer, losses, clips)
        return memory_gib(clips.device)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, clips)
    with tracker:
        train_step(model, optimizer, losses, clips)
    return tracker.get_tracker_snapshot("peak")[clips.device]["Total"] / 2**30


class Measurements:
    """Measured costs by the settings of a model, in a JSON file; those of further files count where it has none."""

    def __init__(self, path: Path, *others: Path):
        self.path = path
        self.known, self.others = (
            {k: v for f in files if f.is_file() for k, v in json.loads(f.read_text()).items()}
            for files in ([path], others)
        )

    def of(self, flags: Flags) -> dict[str, float]:
        """The costs of a run with these flags, {} where they are not measured."""
        return self.known.get(self._key(flags)) or self.others.get(self._key(flags), {})

    def add(self, flags: Flags) -> bool:
        """Measures a run unless it is measured; returns whether it was."""
        if self._key(flags) in self.known or (settings := model_settings(flags)) is None:
            return False
        self.known[self._key(flags)] = measure(settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path, "w") as file:
            file.write(json.dumps(self.known, indent=1) + "\n")
        return True

    @staticmethod
    def _key(flags: Flags) -> str:
        return json.dumps(model_settings(flags), sort_keys=True)
