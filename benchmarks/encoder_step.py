"""Seconds and memory of one pre-training step of MAE-ST, with its sparse and its dense encoder.

    python benchmarks/encoder_step.py
    python benchmarks/encoder_step.py --batch_size 32 --compile       on a GPU

- `sparse`: the encoder gets the visible tokens, 156 of 1568 (agnostic masking at ratio .9).
- `dense`: it gets all tokens, the masked ones as a learned vector (the paper's "dense encoder with [M] tokens").

Each runs in a process of its own. The paper: 81.0 against 627.5 GFLOPs (it counts a multiplication and an addition as
one), 24.5 against 141.1 hours without loading.
"""

import json

import harness
import pretraining_step
import published
import torch

MODEL = "pretrain_mae_st_large_patch16_224"
PAIRS = [("this, sparse", "this, dense")]
DENSE = {name: name.endswith("dense") for name in PAIRS[0]}


def build(device: torch.device, amp: torch.dtype | None, *, dense: bool, model: str, compiled: bool = False):
    return pretraining_step.this(
        device, amp, model=model, ratio=0.9, mask_type="agnostic", dense_encoder=dense, compiled=compiled
    )


def flops(name: str, model: str) -> float:
    """Floating-point operations of one clip's step, counted with attention written out."""
    published.use_published_kernels()
    step = build(torch.device("cpu"), None, dense=DENSE[name], model=model)
    return harness.flops_of(lambda: step(torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8)))


def main() -> None:
    parser = harness.step_parser(__doc__, list(DENSE), batch_size=1)
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    args = parser.parse_args()
    if args.only == "flops":
        print(json.dumps({name: flops(name, args.model) for name in DENSE}))
    elif args.only:
        harness.measure_child(build, args, dense=DENSE[args.only], model=args.model, compiled=args.compile)
    else:
        harness.run_steps(args, PAIRS)


if __name__ == "__main__":
    main()
