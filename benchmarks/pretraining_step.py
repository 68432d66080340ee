"""Seconds and memory of one pre-training step, beside two named peers in the same run.

    python benchmarks/pretraining_step.py --batch_size 4 --precision off bf16

- `this`: AdaMAE as `run_mae_pretraining.py` trains it; `this (tube)`: its VideoMAE model.
- `published way`: the same AdaMAE network computed the way its published code does: attention written out,
  tokens chosen by boolean masks, one Categorical object a sample, targets of a clip that is normalised and
  brought back, an optimiser that walks the parameters, a look at loss and gradient norm in every step.
- `Hugging Face VideoMAE`: `VideoMAEForPreTraining` of the same size, tube masks, no sampler.

Each runs in a process of its own, to measure its own peak memory, and reports its median step. Ratios are
peer / this: above 1 means that this is faster or lighter.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from augment import IMAGENET_MEAN, IMAGENET_STD, normalize, to_pixels
from modeling_pretrain import create_pretrain_model
from optim import create_optimizer
from runs.console import memory_gib
from runs.engine import Engine, resolve_amp
from targets import Losses, create_target, patchify

MODEL = "pretrain_videomae_base_patch16_224"
PEERS = {"this": "published way", "this (tube)": "Hugging Face VideoMAE"}


def this(device, amp, settings, mask_type="adaptive"):
    """One step of ours, as a function of a uint8 batch (B,3,T,H,W)."""
    model = create_pretrain_model(MODEL, mask_type=mask_type, mask_ratio=settings.mask_ratio).to(device)
    optimizer = create_optimizer(model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    engine = Engine(model, optimizer, device=device, amp=amp, compile_model=settings.compile)
    losses = Losses(target=create_target("pixels", patch=model.patch))

    def step(clips):
        pixels = to_pixels(clips)
        engine.backward(losses(engine(normalize(pixels)), pixels)["loss"])
        engine.step()

    return step


def published_forward(model, clip):
    """Prediction (B,Nm,P), P (B,N) and boolean mask (B,N) of a normalised clip, the slow way."""
    encoder = model.encoder
    tokens = encoder.patch_embed(clip)  # (B,N,D)
    batch, _, dim = tokens.shape
    probs = encoder.get_token_probs(tokens + encoder.pos_embed_probs).squeeze(2).float().nan_to_num().softmax(1)
    mask = torch.ones(probs.shape, dtype=torch.bool, device=clip.device)
    mask.scatter_(1, torch.multinomial(probs, model.masking.num_visible), False)
    x = (tokens + encoder.positions.type_as(tokens).to(clip.device).clone())[~mask].reshape(batch, -1, dim)
    x = model.encoder_to_decoder(encoder.norm(encoder.blocks(x)))
    places = model.positions.expand(batch, -1, -1).type_as(x).to(clip.device).clone()
    seen, hidden = (places[chosen].reshape(batch, -1, x.shape[2]) for chosen in (~mask, mask))
    full = torch.cat([x + seen, model.mask_token + hidden], 1)
    return model.decoder(full, hidden.shape[1]), probs, mask


def published_way(device, amp, settings):
    """The same network the slow way; see the module's docstring."""
    model = create_pretrain_model(MODEL, mask_ratio=settings.mask_ratio).to(device)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, foreach=False)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))

    def step(clips):
        clip = normalize(to_pixels(clips))
        with torch.no_grad():
            tokens = patchify(clip * std + mean, model.patch).unflatten(2, (-1, 3))
            target = (tokens - tokens.mean(2, keepdim=True)) / (tokens.std(2, keepdim=True) + 1e-6)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            prediction, probs, mask = published_forward(model, clip)
            target = target.flatten(2)[mask].reshape(prediction.shape)
            error = (prediction.float() - target).square().mean(2)
            sampling = torch.zeros((), device=device)
            for p, m, e in zip(probs, mask, error.detach()):
                log_p = torch.distributions.Categorical(p).log_prob(torch.arange(len(p), device=device))
                sampling = sampling - (log_p[m] * e).mean() / len(probs)
            loss = error.mean() + 1e-4 * sampling
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face(device, amp, settings):
    """Hugging Face's VideoMAE with this size and ratio, its own loss, AdamW."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = VideoMAEConfig(decoder_num_hidden_layers=4, use_mean_pooling=False, norm_pix_loss=True)
    model = VideoMAEForPreTraining(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def step(clips):
        clip = normalize(to_pixels(clips)).transpose(1, 2)
        tube = torch.rand(len(clip), 196, device=device).argsort(1) < int(settings.mask_ratio * 196)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = model(clip, bool_masked_pos=tube.repeat(1, 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {
    "this": this,
    "published way": published_way,
    "this (tube)": lambda *rest: this(*rest, mask_type="tube"),
    "Hugging Face VideoMAE": hugging_face,
}


def measure(name: str, precision: str, settings: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step and peak memory in GiB, of this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    step = STEPS[name](device, resolve_amp(precision, device), settings)
    clips = torch.randint(0, 256, (settings.batch_size, 3, 16, 224, 224), dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(settings.warmup + settings.steps):
        started = time.perf_counter()
        step(clips)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": sorted(seconds[settings.warmup :])[settings.steps // 2], "gib": memory_gib(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--mask_ratio", type=float, default=0.95)
    parser.add_argument("--precision", nargs="+", default=["off", "bf16"], choices=["off", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # name and precision, in a child process
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(*args.only, args)))
        return
    for precision in args.precision:
        found = {}
        for name in STEPS:
            child = [sys.executable, *sys.argv, "--only", name, precision]
            lines = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            found[name] = json.loads(lines[-1])
            print(f"{precision:5} {name:22} {found[name]['seconds']:7.3f} s  {found[name]['gib']:6.2f} GiB")
        for ours, peer in PEERS.items():
            faster, lighter = (found[peer][k] / found[ours][k] for k in ("seconds", "gib"))
            print(f"{precision:5} {peer} / {ours}: {faster:.2f} x the time, {lighter:.2f} x the memory")


if __name__ == "__main__":
    main()
