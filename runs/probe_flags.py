"""The flags of probes: which go together, and what they say about the model."""

import argparse
from math import inf

from utils import SettingError


def check_probe_flags(args: argparse.Namespace) -> None:
    """Validates the flags of probes, before anything is built.

    Raises:
        SettingError: says what to change.
    """
    probe = args.linear_probe or args.attentive_probe
    for clash, message in (
        (args.linear_probe and args.attentive_probe, "--linear_probe and --attentive_probe exclude each other"),
        (args.slot_pooling and not args.use_mean_pooling, "--slot_pooling and --use_cls exclude each other"),
        (args.slot_pooling and args.attentive_probe, "--slot_pooling and --attentive_probe exclude each other"),
        (args.probe_batch_norm and not probe, "--probe_batch_norm needs --linear_probe or --attentive_probe"),
        (args.probe_blocks > 1 and not args.attentive_probe, "--probe_blocks needs --attentive_probe"),
        (probe and not (args.finetune or args.eval), "a probe needs a frozen encoder: set --finetune"),
        (
            args.probe_batch_norm and not args.eval and args.batch_size * args.num_sample == 1,
            "--probe_batch_norm can't standardise a batch of one clip: raise --batch_size",
        ),
    ):
        if clash:
            raise SettingError(message)
    if asks_for_grid(args):
        check_grid_flags(args, probe)


def check_grid_flags(args: argparse.Namespace, probe: bool) -> None:
    """Validates what goes with --probe_lrs and --probe_weight_decays."""
    lrs, decays = rates_and_decays(args)
    several = "--probe_lrs and --probe_weight_decays"
    validated = args.output_dir and args.save_ckpt and not args.disable_eval_during_finetuning
    for clash, message in (
        (not probe, f"{several} need --linear_probe or --attentive_probe"),
        (not all(0 < lr < inf for lr in [*lrs, args.lr]), "--probe_lrs must be positive, and --lr, which they replace"),
        (not all(0 <= decay < inf for decay in decays), "--probe_weight_decays must be at least 0"),
        (any(len(set(map("{:g}".format, v))) < len(v) for v in (lrs, decays)), f"{several} must name no value twice"),
        (args.weight_decay_end is not None, f"{several} keep each decay constant: drop --weight_decay_end"),
        (args.clip_grad, f"{several} exclude --clip_grad, which would clip all probes together"),
        (args.test_last, f"{several} exclude --test_last: the probe to test is the best in validation"),
        (not validated, f"{several} need validation and --output_dir, where the best of the probes is kept"),
    ):
        if clash:
            raise SettingError(message)


def asks_for_grid(args: argparse.Namespace) -> bool:
    """Whether several probes are trained; a test is of one."""
    return bool(args.probe_lrs or args.probe_weight_decays) and not args.eval


def rates_and_decays(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    return args.probe_lrs or [args.lr], args.probe_weight_decays or [args.weight_decay]


def probe_settings(args: argparse.Namespace) -> dict:
    """The arguments of `make_probe`; those that have no effect are left out, as in checkpoints of before them."""
    settings = {"kind": "linear" if args.linear_probe else "attentive", "batch_norm": args.probe_batch_norm}
    if args.probe_blocks > 1:
        settings["blocks"] = args.probe_blocks
    if asks_for_grid(args):
        lrs, decays = rates_and_decays(args)
        settings["grid"] = [(lr, decay) for lr in lrs for decay in decays]
    return settings
