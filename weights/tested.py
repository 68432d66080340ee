"""What --eval tests: which file, whether it fits the flags, whether all processes have the same weights."""

import argparse
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

from datasets import DATA_SETS
from modeling_finetune import CLASSIFIERS, VisionTransformer
from probes import Probe
from runs.checkpoints import BEST, CheckpointError, epoch_checkpoints
from utils import World, gather_from_ranks
from weights.classifier import classifier_settings, fit_weights, refuse_grid
from weights.names import Weights, load_weights, plain_name


def find_tested(*, finetune: str, resume: str, output_dir: str, last: bool = False, **place: str) -> Weights:
    """Reads the weights to test.

    They are in the first file with a head of: `finetune`; `resume`, or else the best or newest in `output_dir`, with
    `last` the newest only. `place` holds `model_key` and `prefix` of `load_weights`, for the first of these files only.

    Raises:
        CheckpointError: there is no such file, or none with a head; or it holds a grid of probes.
    """
    paths = [path for path in (finetune, resume) if path]
    if output_dir and not resume:
        best = Path(output_dir) / BEST
        paths += [best] if best.is_file() and not last else epoch_checkpoints(output_dir)[:1]
    if not paths:
        raise CheckpointError("--eval has nothing to test: set --finetune to a fine-tuned checkpoint")
    for path in paths:
        found = load_weights(path, **(place if path == paths[0] else {}))
        refuse_grid(found)
        if "head.weight" in found.tensors:
            return found
    raise CheckpointError(f"{path} has no head: --eval needs a fine-tuned checkpoint")


# Flags of an evaluation that follow from the run that trained the weights, where its checkpoint has its flags. Those of
# a data set go together, and a short side belongs to one input size.
OF_THE_RUN = ("sampling_rate", "imagenet_default_mean_and_std", "view_fusion")
OF_ITS_DATA = ("data_set", "sampling", "test_num_segment", "test_num_crop")
OF_ITS_MODEL = {"model": "name", "input_size": "input_size", "tubelet_size": "tubelet", "pos_embed": "pos_embed",
                "use_mean_pooling": "mean_pooling", "slot_pooling": "slot_pooling"}  # fmt: skip


def take_trained(args: argparse.Namespace, given: Collection[str], found: Weights) -> None:
    """Sets the flags of an evaluation that are not given as the tested checkpoint says, as far as it does.

    Raises:
        CheckpointError: as `classifier_settings`.
    """
    settings, run, found_flags = classifier_settings(found), {}, found.flags
    run |= {flag: settings[name] for flag, name in OF_ITS_MODEL.items() if settings.get(name) is not None}
    run |= {name: found_flags[name] for name in OF_THE_RUN if found_flags.get(name) is not None}
    if not {"num_frames", "num_segments"} & given:
        run |= {"num_frames": settings["num_frames"], "num_segments": 1}
    if not {"linear_probe", "attentive_probe", "probe_batch_norm", "probe_blocks"} & given:
        probe = settings.get("probe") or {"kind": ""}
        run |= {f"{kind}_probe": probe["kind"] == kind for kind in ("linear", "attentive")}
        run |= {"probe_batch_norm": probe.get("batch_norm", False), "probe_blocks": probe.get("blocks", 1)}
    data_set = args.data_set if "data_set" in given else found_flags.get("data_set")
    if found_flags.get("data_set") in DATA_SETS and found_flags["data_set"] == data_set:
        run |= {name: found_flags[name] for name in OF_ITS_DATA if found_flags.get(name) is not None}
    if data_set == "custom" and settings.get("num_classes"):
        run["nb_classes"] = settings["num_classes"]
    if "input_size" not in given or args.input_size == settings.get("input_size"):
        run["short_side_size"] = found_flags.get("short_side_size")
    vars(args).update({name: value for name, value in run.items() if name not in given})


# Settings that the shapes of the weights do not show, and their flags.
SET_BY = {
    "num_frames": "--num_frames and --num_segments",
    "input_size": "--input_size",
    "tubelet": "--tubelet_size",
    "pos_embed": "--pos_embed",
    "mean_pooling": "--use_cls",
    "slot_pooling": "--slot_pooling",
    "probe": "--linear_probe, --attentive_probe, --probe_blocks and --probe_batch_norm",
}


def check_tested(found: Weights, model_settings: dict) -> None:
    """Checks that a checkpoint of ours was trained with the settings of this test, where weights do not show them.

    Raises:
        CheckpointError: it was not; names the setting, both values and the flags.
    """
    if found.settings.get("name") not in CLASSIFIERS:
        return  # not one of ours
    for name in SET_BY:
        old, new = (_described(settings, name) for settings in (found.settings, model_settings))
        if (name in found.settings or name == "probe") and old != new:
            raise CheckpointError(
                f"{found.path} was trained with {name} = {old}, this test has {name} = {new}: change {SET_BY[name]}"
            )


def _described(settings: dict, name: str) -> object:
    value = settings.get(name)
    if name == "probe" and value:
        blocks = f" of {value['blocks']} blocks" if value.get("blocks", 1) > 1 else ""
        return value["kind"] + blocks + " with batch norm" * value.get("batch_norm", False)
    if name == "pos_embed" and not value:
        return CLASSIFIERS[settings["name"]].settings.get("pos_embed", "sinusoid_1d")
    return value


def load_tested(found: Weights, model: VisionTransformer | Probe, report: Callable[[str], None] = print) -> None:
    """Loads the weights to test, all of them, into a classifier or probe; see `load_classifier_weights`.

    Raises:
        CheckpointError: as `fit_weights`; or the file lacks a weight of the model, or has a norm, pooling or head
            that the model lacks.
    """
    theirs, ours = (tuple(tensor.shape) for tensor in (found.tensors["head.weight"], model.head.weight))
    if theirs != ours:
        raise CheckpointError(f"{found.path}: head.weight is {theirs} in the file and {ours} in the model")
    tensors, became = fit_weights(found, model)
    if became.fresh:
        raise CheckpointError(f"{found.path} can't be tested: {became.fresh[0]} of the model is not in the file")
    for name in became.ignored:
        if plain_name(name).startswith(("norm.", "fc_norm.", "pool.")):
            raise CheckpointError(
                f"{found.path} can't be tested: {name} is not in the model; --use_cls and the flags of probes "
                "must be those of its training"
            )
    model.load_state_dict(tensors)
    report(str(became))


def check_same_on_all_ranks(tested: str, model: VisionTransformer | Probe, world: World) -> None:
    """Checks that all processes test the same weights, which `tested` names.

    Raises:
        CheckpointError: the head's weights differ between ranks.
    """
    if world.size == 1:
        return
    head = model.head.weight.detach().float().cpu().numpy()
    ranks = gather_from_ranks((tested, hashlib.sha256(head.tobytes()).hexdigest()))
    if len({digest for _, digest in ranks}) > 1:
        names = ", ".join(f"rank {rank}: {name}" for rank, (name, _) in enumerate(ranks))
        raise CheckpointError(
            f"the processes would test different weights ({names}): --output_dir and the checkpoints must be in "
            "folders that all machines see"
        )
