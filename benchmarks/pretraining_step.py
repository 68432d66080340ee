"""Seconds and memory of one pre-training step, beside two named peers in the same run.

    python benchmarks/pretraining_step.py
    python benchmarks/pretraining_step.py --batch_size 32 64 --compile       on a GPU

- `this`: AdaMAE as `run_mae_pretraining.py` trains it; `this (tube)`: its VideoMAE model.
- `published way`: the same AdaMAE network computed the way its published code does (benchmarks/published.py). On a GPU
  it runs in float16, as published, where ours runs in bfloat16.
- `Hugging Face VideoMAE`: `VideoMAEForPreTraining` of the same size, tube masks, no sampler.

Each runs in a process of its own, to measure its own peak memory.
"""

import json
from collections.abc import Callable

import harness
import published
import torch
from torch import Tensor

from augment import normalize, to_pixels
from masking_generator import DECODER_ORDERS
from modeling_pretrain import create_pretrain_model
from optim import create_optimizer
from runs.engine import Engine
from targets import Losses, create_target
from utils import keep_freed_memory

MODEL = "pretrain_videomae_base_patch16_224"
PAIRS = [("this", "published way"), ("this (tube)", "Hugging Face VideoMAE")]  # ours, peer
Step = Callable[[Tensor], object]  # of uint8 clips (B,3,T,H,W)


def this(
    device: torch.device, amp: torch.dtype | None, *, ratio: float, compiled: bool, model: str = MODEL, **settings
) -> Step:
    keep_freed_memory()
    model = create_pretrain_model(model, mask_ratio=ratio, **settings).to(device)
    optimizer = create_optimizer(model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    engine = Engine(model, optimizer, device=device, amp=amp, compile_model=compiled)
    losses = Losses(target=create_target("pixels", patch=model.patch))

    def step(clips: Tensor) -> None:
        pixels = to_pixels(clips)
        engine.backward(losses(engine(normalize(pixels)), pixels)["loss"])
        engine.step()

    return step


def published_way(device: torch.device, amp: torch.dtype | None, *, ratio: float, **_) -> Step:
    amp = torch.float16 if amp and device.type == "cuda" else amp
    published.use_published_kernels()
    model = create_pretrain_model(MODEL, mask_ratio=ratio).to(device)
    training = published.PublishedTraining(model, device, amp)

    def step(clips: Tensor) -> None:
        clip, target = published.published_input(clips)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = published.published_loss(*published.published_forward(model, clip), target)
        training.step(loss)

    return step


def hugging_face(device: torch.device, amp: torch.dtype | None, *, ratio: float, **_) -> Step:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = VideoMAEConfig(decoder_num_hidden_layers=4, use_mean_pooling=False, norm_pix_loss=True)
    model = VideoMAEForPreTraining(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def step(clips: Tensor) -> None:
        clip = normalize(to_pixels(clips)).transpose(1, 2)
        tube = torch.rand(len(clip), 196, device=device).argsort(1) < int(ratio * 196)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = model(clip, bool_masked_pos=tube.repeat(1, 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {
    "this": this,
    "published way": published_way,
    "this (tube)": lambda *rest, **settings: this(*rest, **settings, mask_type="tube"),
    "Hugging Face VideoMAE": hugging_face,
}


def flops(name: str, settings: dict) -> float:
    """Floating-point operations of one clip's step, counted with attention written out."""
    published.use_published_kernels()
    step = STEPS[name](torch.device("cpu"), None, **settings, compiled=False)
    return harness.flops_of(lambda: step(torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8)))


def main() -> None:
    parser = harness.step_parser(__doc__, list(STEPS), batch_size=4)
    parser.add_argument("--mask_ratio", type=float, default=0.95)
    parser.add_argument("--decoder_mask_ratio", type=float, default=0.0, help="of ours")
    parser.add_argument("--decoder_mask_type", default="random", choices=list(DECODER_ORDERS))
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("decoder_mask_ratio", "decoder_mask_type")}
    settings["ratio"] = args.mask_ratio
    if args.only == "flops":
        print(json.dumps({name: flops(name, settings) for name, _ in PAIRS}))
    elif args.only:
        harness.measure_child(STEPS[args.only], args, **settings, compiled=args.compile)
    else:
        harness.run_steps(args, PAIRS)


if __name__ == "__main__":
    main()
