"""Which checkpoint a run resumes, and at which batch of which epoch it continues."""

from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from loaders import EpochSampler
from runs.checkpoints import CheckpointError, flags_of, newest_checkpoint, read_checkpoint
from runs.console import Console
from runs.engine import Engine
from runs.version import code_version
from utils import World, counted, gather_from_ranks, plain


class Start(NamedTuple):
    """Where training starts: `batch` batches of `epoch` are done. `state` is that of the checkpoint, or {}."""

    epoch: int
    batch: int
    state: dict


def resume(
    engine: Engine,
    sampler: EpochSampler,
    about: dict,
    neutral: Collection[str],
    *,
    given: Collection[str] = (),
    world: World,
    console: Console,
) -> Start:
    """Loads the checkpoint to resume into the engine, if there is one.

    Args:
        about: what the run's own checkpoints say of it (`Checkpoints`): its flags, which tell the checkpoint to look
            for, its model settings and class names.
        neutral: flags that change nothing that is computed, so that a change needs no mention.
        given: those on the command line. Where --warmup_epochs is not, `flags` gets that of the checkpoint: a run of
            more epochs must not warm up again, nor one whose default was another.

    Raises:
        CheckpointError: it can't be read, is of a model with other settings, of other labels or classes, or ranks find
            different ones.
    """
    flags = about["args"]
    found = find_checkpoint(flags, console)
    if found is None:
        start, lines = Start(flags["start_epoch"], 0, {}), []
    else:
        check_same_labels(found[0], flags_of(found[1]), flags)
        start, lines = load(engine, sampler, *found, about)
        if "warmup_epochs" not in given and "warmup_epochs" in flags_of(found[1]):
            flags["warmup_epochs"] = flags_of(found[1])["warmup_epochs"]
        lines += changes(found[1], flags, neutral)
    check_same_start(start, flags["output_dir"], world)
    if found is not None:
        inside = f", and {start.batch} of {sampler.steps_per_epoch} batches of the next" if start.batch else ""
        console.say(f"resumed {found[0]}: {start.epoch} of {flags['epochs']} epochs are done{inside}")
    for line in lines:
        console.say(line)
    return start


def find_checkpoint(flags: dict, console: Console) -> tuple[Path, dict] | None:
    """The checkpoint to resume and its content: the newest in --output_dir, or --resume at a run's first start."""
    found = None
    if flags["auto_resume"] and flags["output_dir"]:
        found = newest_checkpoint(flags["output_dir"], console.warn)
    if flags["resume"] and (found is None or flags_of(found[1]).get("resume") != flags["resume"]):
        return Path(flags["resume"]), read_checkpoint(flags["resume"])
    return found  # with --resume FILE: this command resumed it before, and has written its own since


def load(engine: Engine, sampler: EpochSampler, path: Path, state: dict, about: dict) -> tuple[Start, list[str]]:
    """Loads a checkpoint's content into the engine; returns where training starts, and what to say about it.

    Raises:
        CheckpointError: it is of another model, another optimiser, or no checkpoint of a training run.
    """
    check_same_classes(path, state.get("class_names") or [], about["class_names"])
    check_resumable(path, state.get("model_settings", {}), about["model_settings"])
    try:
        engine.load_state_dict(state)
        epoch, done = state["epoch"] + 1, state.get("batch", 0)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} can't be resumed by this run ({str(error).splitlines()[0]}): use the flags it was made with, "
            "another --output_dir, or --no_auto_resume"
        ) from error
    batch, lines = first_batch(done, state.get("layout", {}), layout_of(sampler))
    batch = min(batch, sampler.steps_per_epoch)
    kept = ["best", "progress"] if batch else ["best"]
    return Start(epoch, batch, {name: state[name] for name in kept if name in state}), lines


# Model settings that may change between a run and its continuation: they shape no weight.
CHANGEABLE = {
    *("checkpoint_activations", "drop_path", "drop", "attn_drop", "fc_drop", "init_scale", "attn_init"),
    *("sampler_options", "decoder_mask_type", "decoder_mask_ratio"),
}


def check_resumable(path: Path, old: dict, new: dict) -> None:
    """Checks that the model settings of a checkpoint and of this run agree, except those in `CHANGEABLE`.

    Raises:
        CheckpointError: they differ; names the setting and both values.
    """
    for name in sorted((old.keys() & new.keys()) - CHANGEABLE):
        if old[name] != new[name]:
            raise CheckpointError(
                f"{path} was made with {name} = {old[name]}, this run has {name} = {new[name]}; "
                "use the same flags, another --output_dir, or --no_auto_resume"
            )


def check_same_labels(path: Path, old: dict, new: dict) -> None:
    """Checks that a run with few labels goes on with the same ones, which depend on fraction and seed.

    Args:
        old, new: the flags of the checkpoint and of this run.

    Raises:
        CheckpointError: as `check_resumable`.
    """
    drawn = [{"label_fraction": f.get("label_fraction", 1.0), "seed": f.get("seed")} for f in (old, new)]
    if any(flags["label_fraction"] < 1 for flags in drawn):
        check_resumable(path, *drawn)


def check_same_classes(path: Path, old: Sequence[str], new: Sequence[str]) -> None:
    """Checks that the classes of a checkpoint and of this run have the same names, where both have names.

    Raises:
        CheckpointError: names the first class that differs.
    """
    for number, names in enumerate(zip_longest(old, new) if old and new else ()):
        if names[0] != names[1]:
            was, now = (f'"{name}"' if name is not None else "missing" for name in names)
            raise CheckpointError(
                f"{path} was made with {len(old)} class names, of which class {number} is {was}, and this run has "
                f"{len(new)}, where it is {now}: use the same training list or --labels, another --output_dir, or "
                "--no_auto_resume"
            )


def layout_of(sampler: EpochSampler) -> dict[str, int]:
    """What decides which videos a batch holds."""
    names = ("num_videos", "seed", "world_size", "batch_size", "update_freq")
    return {name: getattr(sampler, name) for name in names}


def first_batch(done: int, old: dict[str, int], new: dict[str, int]) -> tuple[int, list[str]]:
    """The batch of an epoch to continue at, where `done` batches are done in another layout.

    An epoch goes through one order of the videos, of which all processes together take the next ones in each
    step; so a position in it is found again in any layout, to within a step. Returns what to say about it, too.
    """
    if not old or old == new:
        return done, []
    if (old["num_videos"], old["seed"]) != (new["num_videos"], new["seed"]):
        was, now = (f"{counted(layout['num_videos'], 'video')} with --seed {layout['seed']}" for layout in (old, new))
        return 0, [f"{was} are now {now}, in another order{', so the epoch starts again' * bool(done)}"]
    _, was = _videos_a_step(old)
    step, now = _videos_a_step(new)
    first = done * old["batch_size"] * old["world_size"] // step * step
    inside = f", and the epoch continues at its video {first}" if done else ""
    return first // step * new["update_freq"], [f"a step was {was}, now it is {now}; --lr scales with it{inside}"]


def _videos_a_step(layout: dict[str, int]) -> tuple[int, str]:
    size, batch, freq = (layout[name] for name in ("world_size", "batch_size", "update_freq"))
    return (
        size * batch * freq,
        f"{counted(size, 'process')} x {counted(batch, 'video')} x {counted(freq, 'batch')} = {size * batch * freq}",
    )


def changes(state: dict, flags: dict, neutral: Collection[str]) -> list[str]:
    """What differs from when the checkpoint was written: flags, and the version of the code."""
    old, lines = flags_of(state), []
    changed = [
        f"--{name} {plain(old[name])} -> {plain(value)}"
        for name, value in flags.items()
        if name in old and name not in neutral and old[name] != value
    ]
    if changed:
        lines.append(f"changed since then: {', '.join(changed)}")
    if state.get("version", code_version()) != code_version():
        lines.append(f"it was written by version {state['version']} of the code, this is {code_version()}")
    return lines


def check_same_start(start: Start, output_dir: str, world: World) -> None:
    """Checks that all ranks start at the same place.

    Raises:
        CheckpointError: names each rank's place.
    """
    places = gather_from_ranks((start.epoch, start.batch))
    if len(set(places)) > 1:
        listed = ", ".join(f"rank {rank} at epoch {e}, batch {b}" for rank, (e, b) in enumerate(places))
        raise CheckpointError(
            f"the processes would start at different places ({listed}): --output_dir {output_dir} must be one "
            "folder that all machines see"
        )
