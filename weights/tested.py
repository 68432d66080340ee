"""The weights that are tested: which file they come from, whether they fit, whether all ranks have the same."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import nn

from modeling_finetune import CLASSIFIERS
from runs.checkpoints import CheckpointError, Weights, epoch_checkpoints, load_weights, plain_name
from utils import World
from weights.classifier import fit_weights

BEST = "checkpoint-best.pth"


def find_tested(args: argparse.Namespace) -> tuple[Path, Weights]:
    """The file that --eval tests, and its weights.

    It is --finetune if that has a head, else --resume, or the best or newest in --output_dir. Raises
    CheckpointError where there is none, or one without a head.
    """
    folder = Path(args.output_dir)
    trained = [Path(args.resume)] if args.resume else []
    if args.output_dir:
        trained += [folder / BEST] * (folder / BEST).is_file() + epoch_checkpoints(folder)
    paths = [*([Path(args.finetune)] if args.finetune else []), *trained[:1]]
    if not paths:
        raise CheckpointError("--eval has nothing to test: set --finetune to a fine-tuned checkpoint")
    for path in paths:
        from_flag = path == paths[0]  # --model_key and --model_prefix are about this file
        place = {"model_key": args.model_key, "prefix": args.model_prefix} if from_flag else {}
        found = load_weights(path, **place)
        if "head.weight" in found.tensors:
            return path, found
    raise CheckpointError(f"{path} has no head: --eval needs a fine-tuned checkpoint")


SHAPED_BY = {
    "num_frames": "--num_frames and --num_segments",
    "input_size": "--input_size",
    "tubelet": "--tubelet_size",
    "pos_embed": "--pos_embed",
    "mean_pooling": "--use_cls",
    "slot_pooling": "--slot_pooling",
    "probe": "--linear_probe, --attentive_probe and --probe_batch_norm",
}


def check_tested(path: Path, found: Weights, model_settings: dict) -> None:
    """Compares the settings that weights do not show with those that a checkpoint of ours was trained with.

    Raises:
        CheckpointError: names the setting, both values, and its flags.
    """
    theirs = found.settings
    if theirs.get("name") not in CLASSIFIERS:
        return  # not one of ours
    for name in SHAPED_BY:
        old, new = (_told(settings, name) for settings in (theirs, model_settings))
        if (name in theirs or name == "probe") and old != new:
            raise CheckpointError(
                f"{path} was trained with {name} = {old}, this test has {name} = {new}: change {SHAPED_BY[name]}"
            )


def _told(settings: dict, name: str) -> object:
    value = settings.get(name)
    if name == "probe" and value:
        return value["kind"] + " with batch norm" * value.get("batch_norm", False)
    if name == "pos_embed" and not value:
        return CLASSIFIERS[settings["name"]].get("pos_embed", "sinusoid_1d")
    return value


def load_tested(args: argparse.Namespace, model: nn.Module, report: Callable[[str], None]) -> str:
    """Loads the file that --eval tests, all of it, into a classifier or probe; returns its name.

    Raises:
        CheckpointError: as `find_tested` and `fit_weights`, or the file lacks a weight of the model, or has a
            norm, a pooling or a head that the model has not.
    """
    path, found = find_tested(args)
    heads = [tuple(tensor.shape) for tensor in (found.tensors["head.weight"], model.head.weight)]
    if heads[0] != heads[1]:
        raise CheckpointError(f"{path}: head.weight is {heads[0]} in the file and {heads[1]} in the model")
    tensors, became = fit_weights(found, model.state_dict(), window=model.window, path=path)
    if became.fresh:
        raise CheckpointError(f"{path} can't be tested: {became.fresh[0]} of the model is not in the file")
    for name in became.ignored:
        if plain_name(name).startswith(("norm.", "fc_norm.", "pool.")):
            raise CheckpointError(
                f"{path} can't be tested: {name} has no place in the model; --use_cls and the flags of probes "
                "must be those of its training"
            )
    model.load_state_dict(tensors)
    report(str(became))
    return str(path)


def check_same_on_all_ranks(tested: str, model: nn.Module, world: World) -> None:
    """Raises CheckpointError where the ranks would merge the scores of different weights."""
    if world.size == 1:
        return
    head = model.head.weight.detach().float().cpu().numpy()
    told = [None] * world.size
    dist.all_gather_object(told, (tested, hashlib.sha256(head.tobytes()).hexdigest()))
    if len({digest for _, digest in told}) > 1:
        names = ", ".join(f"rank {rank}: {name}" for rank, (name, _) in enumerate(told))
        raise CheckpointError(
            f"the processes would test different weights ({names}): --output_dir and the checkpoints must be in "
            "folders that all machines see"
        )
