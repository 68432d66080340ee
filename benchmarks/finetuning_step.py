"""Seconds and memory of one fine-tuning step of ViT-B, beside two named peers in the same run.

    python benchmarks/finetuning_step.py
    python benchmarks/finetuning_step.py --batch_size 16 --compile       on a GPU

- `this`: the classifier on all 1568 tokens of a clip, as `run_class_finetuning.py` trains it, Mixup left out.
- `published way`: the same network computed the way the published code does (benchmarks/published.py).
- `Hugging Face VideoMAE`: `VideoMAEForVideoClassification` of the same size.
"""

import json
from collections.abc import Callable

import harness
import published
import torch
import torch.nn.functional as F
from torch import Tensor

from augment import normalize, to_pixels
from modeling_finetune import create_classifier
from optim import create_optimizer
from runs.engine import Engine
from utils import keep_freed_memory

MODEL, CLASSES = "vit_base_patch16_224", 174
PAIRS = [("this", "published way"), ("this", "Hugging Face VideoMAE")]  # ours, peer
Step = Callable[[Tensor], object]  # of uint8 clips (B,3,T,H,W)


def labels_of(clips: Tensor) -> Tensor:
    return torch.full((len(clips), CLASSES), 1 / CLASSES, device=clips.device)


def this(device: torch.device, amp: torch.dtype | None, *, compiled: bool) -> Step:
    keep_freed_memory()
    model = create_classifier(MODEL, num_classes=CLASSES, drop_path=0.1).to(device)
    optimizer = create_optimizer(model, lr=1e-4, weight_decay=0.05, layer_decay=0.75)
    engine = Engine(model, optimizer, device=device, amp=amp, compile_model=compiled)

    def step(clips: Tensor) -> None:
        engine.backward(F.cross_entropy(engine(normalize(to_pixels(clips))).float(), labels_of(clips)))
        engine.step()

    return step


def published_way(device: torch.device, amp: torch.dtype | None, **_) -> Step:
    amp = torch.float16 if amp and device.type == "cuda" else amp
    published.use_published_kernels()
    model = create_classifier(MODEL, num_classes=CLASSES, drop_path=0.1).to(device)
    training = published.PublishedTraining(model, device, amp)

    def step(clips: Tensor) -> None:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(normalize(to_pixels(clips)))
        training.step(F.cross_entropy(logits.float(), labels_of(clips)))

    return step


def hugging_face(device: torch.device, amp: torch.dtype | None, **_) -> Step:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    model = VideoMAEForVideoClassification(VideoMAEConfig(num_labels=CLASSES)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def step(clips: Tensor) -> None:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(normalize(to_pixels(clips)).transpose(1, 2)).logits
        F.cross_entropy(logits.float(), labels_of(clips)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"this": this, "published way": published_way, "Hugging Face VideoMAE": hugging_face}


def flops() -> float:
    """Floating-point operations of one clip's step, counted with attention written out."""
    published.use_published_kernels()
    step = this(torch.device("cpu"), None, compiled=False)
    return harness.flops_of(lambda: step(torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8)))


def main() -> None:
    args = harness.step_parser(__doc__, list(STEPS), batch_size=2).parse_args()
    if args.only == "flops":
        print(json.dumps({"this": flops()}))
    elif args.only:
        harness.measure_child(STEPS[args.only], args, compiled=args.compile)
    else:
        harness.run_steps(args, PAIRS)


if __name__ == "__main__":
    main()
