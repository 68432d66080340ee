"""Estimates the GPU memory of a training step from what autograd keeps, without a GPU and without computing anything.

    python benchmarks/memory.py                                  every model of the recipes, in bfloat16
    python benchmarks/memory.py vit_base_patch16_224 --use_checkpoint

    memory = 16 bytes per parameter (float32 weights, gradients, AdamW's two moments)
             + the weights' copies in mixed precision
             + clips x the bytes that the backward pass of one clip needs, and its pixels, normalised pixels and target

The weights' copies and what the backward pass needs are counted by torch's saved-tensor hooks over forward passes of
one and of two clips with fake tensors, which have shapes but no values, each storage once. With --use_checkpoint the
tensors of one block are added, since the backward pass recomputes one block at a time. Not counted: what kernels need
for the moment, fragmentation, and CUDA itself, together 1 to 2 GiB; so LIMIT is 22 of 24 GiB.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from modeling_finetune import CLASSIFIERS, create_classifier
from modeling_pretrain import create_pretrain_model

PIXELS = 3 * 4 * 3 * 16 * 224 * 224  # bytes of one clip's three float32 tensors
LIMIT = 22  # GiB for the tensors counted here on a GPU of 24 GB
MASKS = {"adaptive": 0.95, "tube": 0.9, "agnostic": 0.9}
MODELS = (
    *(f"pretrain_videomae_{size}_patch16_224:{mask}" for size in ("small", "base") for mask in ("adaptive", "tube")),
    *("pretrain_videomae_large_patch16_224:tube", "pretrain_mae_st_large_patch16_224:agnostic"),
    *("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"),
)


def build(name: str, checkpoint: bool) -> nn.Module:
    name, _, mask = name.partition(":")
    if name in CLASSIFIERS:
        return create_classifier(name, num_classes=100, drop_path=0.1, checkpoint_activations=checkpoint)
    depth = 12 if "large" in name and "mae_st" not in name else 4  # as the recipes
    return create_pretrain_model(
        name, mask_type=mask, mask_ratio=MASKS[mask], decoder_depth=depth, checkpoint_activations=checkpoint
    )


def kept_bytes(model: nn.Module, clips: int) -> int:
    """Bytes of the storages that are kept for the backward pass of so many clips."""
    kept = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return value

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autograd.graph.saved_tensors_hooks(note, lambda value: value),
        torch.autocast("cpu", torch.bfloat16),
    ):
        result = model(torch.zeros(clips, 3, 16, 224, 224))
    del result
    return sum(kept.values())


def estimate(name: str, checkpoint: bool) -> tuple[float, float]:
    """GiB that don't depend on the batch, and GiB of every clip."""
    model = build(name, checkpoint).train()
    one, two = kept_bytes(model, 1), kept_bytes(model, 2)
    fixed = 16 * sum(p.numel() for p in model.parameters()) + max(0, 2 * one - two)
    clip = two - one + PIXELS
    if checkpoint:
        whole = build(name, False).train()
        blocks = sum("attn.proj.weight" in parameter for parameter, _ in whole.named_parameters())
        clip += (kept_bytes(whole, 2) - kept_bytes(whole, 1) + PIXELS - clip) // blocks
    return fixed / 2**30, clip / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="a classifier, or PRETRAINING:MASK")
    parser.add_argument("--use_checkpoint", action="store_true", help="recompute activations")
    args = parser.parse_args()
    print("| model | fixed GiB | GiB per clip | clips in 24 GB |\n|---|---|---|---|")
    torch.set_num_threads(8)  # so that attention is torch's, as on a GPU (kernels/attention.py)
    for name in args.models:
        fixed, clip = estimate(name, args.use_checkpoint)
        print(f"| {name} | {fixed:.2f} | {clip:.3f} | {int((LIMIT - fixed) / clip)} |", flush=True)


if __name__ == "__main__":
    main()
