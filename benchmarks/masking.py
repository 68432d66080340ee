"""Time of choosing the visible tokens and of the sampling loss, over clips of more and more tokens.

    python benchmarks/masking.py --output benchmarks/results/masking.json

- `masks`: from random numbers and log-probabilities to the indices of visible and masked tokens, of every rule.
- `loss`: AdaMAE's sampling loss and its gradient with respect to the log-probabilities, of every form.

N runs from 392 tokens (8 frames at 112 pixels) to 12,544 (32 at 448), the batch from 1 to 256 clips. The exponent
is the slope of log seconds over log N: 1 for a cost linear in the number of tokens. With --step, the seconds of a whole
step with --step_clips clips of 1568 tokens (benchmarks/pretraining_step.py), the share of adaptive masks and the
published loss in it is printed; the target is 2 %.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import torch
from reports import Report, Spread

from masking_generator import RULES, MaskingGenerator, Window
from sampling import SAMPLING_LOSSES, sampling_loss
from utils import keep_freed_memory

WINDOWS = ((8, 7, 7), (4, 14, 14), (8, 14, 14), (16, 14, 14), (8, 28, 28), (16, 28, 28))  # 392 to 12,544 tokens
BATCHES = (1, 4, 16, 64, 256)
USUAL = (8, 14, 14)  # 16 frames of 224 pixels


def masks_of(rule: str, window: Window, batch: int, device: torch.device) -> Callable[[], object]:
    masking = MaskingGenerator(mask_type=rule, mask_ratio=0.75 if rule == "frame" else 0.9, window=window)
    log_p = torch.randn(batch, masking.num_tokens, device=device).log_softmax(1)
    return lambda: masking(log_p)


def loss_of(form: str, window: Window, batch: int, device: torch.device) -> Callable[[], object]:
    """As in a training step: the masks are given, the gradient goes back to the log-probabilities."""
    masking = MaskingGenerator(mask_type="adaptive", mask_ratio=0.95, window=window)
    log_p = torch.randn(batch, masking.num_tokens, device=device).log_softmax(1).requires_grad_()
    drawn = masking.draw(log_p)
    masked = masking(log_p).masked
    error = torch.rand(masked.shape, device=device)
    return lambda: torch.autograd.grad(sampling_loss(log_p, masked, error, form, drawn), log_p)


PARTS = {f"masks, {rule}": (masks_of, rule) for rule in RULES}
PARTS |= {f"loss, {form}": (loss_of, form) for form in SAMPLING_LOSSES}


def measure(name: str, window: Window, batch: int, *, device: torch.device, repeats: int) -> Spread:
    """Milliseconds of a call."""
    make, kind = PARTS[name]
    call = make(kind, window, batch, device)
    return Spread.of([1000 * s for s in harness.seconds_of(call, device=device, warmup=2, repeats=repeats)])


def exponent(tokens: list[int], times: list[float]) -> float:
    """The slope of log time over log tokens, by least squares."""
    return float(np.polyfit(np.log(tokens), np.log(times), 1)[0])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, nargs="+", default=list(BATCHES), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=11, help="timed calls (default: %(default)s)")
    parser.add_argument("--step", type=float, help="seconds of a whole step")
    parser.add_argument("--step_clips", type=int, default=4, help="clips of that step (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    args = parser.parse_args(argv)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(args.output, device, batch_size=args.batch_size, repeats=args.repeats)
    tokens, settings = [int(np.prod(w)) for w in WINDOWS], {"device": device, "repeats": args.repeats}
    for batch in args.batch_size:
        rows = []
        for name in PARTS:
            found = [measure(name, window, batch, **settings) for window in WINDOWS]
            slope = exponent(tokens, [spread.median for spread in found])
            rows.append({"": name, **{f"N {n}": s for n, s in zip(tokens, found)}, "exponent": slope})
        report.table(f"Milliseconds, batch {batch}", rows)
    if args.step:
        parts = [measure(name, USUAL, args.step_clips, **settings) for name in ("masks, adaptive", "loss, log")]
        share = sum(spread.median for spread in parts) / 1000 / args.step
        report.line("Share of a step", f"{share:.2%} of {args.step:g} s with {args.step_clips} clips of 1568 tokens")
    report.write()


if __name__ == "__main__":
    main()
