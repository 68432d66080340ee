"""What a run keeps to go on from: when it is written, what is in it, which file is resumed, and where it goes on.

    checkpoint-<epoch>.pth  after every --save_ckpt_freq epochs and the last one
    checkpoint-last.pth     every --save_ckpt_minutes, also within an epoch, and when the run is asked to stop
    checkpoint-previous.pth the one before it

What is random in a step is drawn from (seed, batch, rank), and what happens to a video from (seed, epoch, video):
so the position within the epoch is all the random state there is, and a run goes on bit for bit where it was.
"""

import argparse
import functools
import hashlib
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from loaders import EpochSampler
from optim import Engine
from runs import watchdog
from runs.checkpoints import (
    LAST,
    PREVIOUS,
    CheckpointError,
    epoch_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from runs.logs import Console
from runs.signals import Stopped, StopSignals, Votes
from utils import World

# Flags that may differ between two runs of one training without changing what is computed.
NEUTRAL = {
    *("resume", "auto_resume", "start_epoch", "save_ckpt_freq", "save_ckpt_minutes", "keep_ckpts"),
    *("output_dir", "log_dir", "log_freq", "vis_freq", "labels", "num_workers", "pin_mem", "decode_timeout"),
    *("max_bad_videos", "max_bad_steps", "device", "dist_url", "dist_eval", "dist_on_itp", "dist_timeout"),
    *("local_rank", "world_size", "batch_size", "update_freq"),  # what the last two change is told in full
}


class Start(NamedTuple):
    """Where training starts: `batch` batches of `epoch` are done. `state` is that of the checkpoint, or {}."""

    epoch: int
    batch: int
    state: dict


class Checkpoints:
    """Writes a run's checkpoints, and stops the run where a signal asks for it.

    Args:
        output_dir: where to; '' keeps nothing.
        about: goes into every checkpoint: flags, and the settings that rebuild the model.
        minutes: between two refreshments of checkpoint-last.pth; 0 leaves it to the signals.
        keep: how many checkpoint-<epoch>.pth to keep; 0 keeps all.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        sampler: EpochSampler,
        output_dir: str,
        about: dict,
        minutes: float,
        keep: int,
        signals: StopSignals,
        votes: Votes,
        world: World,
        console: Console,
    ):
        self.engine, self.sampler, self.world, self.console = engine, sampler, world, console
        self.folder = Path(output_dir) if output_dir else None
        self.about = {**about, "layout": _layout(sampler), "version": code_version()}
        self.about["optimizer_name"] = type(engine.optimizer).__name__
        self.seconds, self.keep = 60 * minutes, keep
        self.signals, self.votes = signals, votes
        self.saved_at = time.monotonic()
        self.unsaved = ""  # why the newest state is not on the disk
        if self.folder and world.rank == 0:
            for left in self.folder.glob(".checkpoint-*.tmp"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)

    def write(self, name: str, more: dict, only: Callable[[dict], dict] = lambda state: state) -> bool:
        """One file, by rank 0; every rank calls it, since DeepSpeed gathers the state, and waits for it.

        A disk that is full or fails costs this checkpoint and not the run: a warning says so, and what is
        returned, the same on all ranks. `only` chooses from the engine's state.
        """
        if self.folder is None:
            return False
        watchdog.tick(f"saving {name}")
        state = only(self.engine.state_dict())
        self.unsaved = ""
        if self.world.rank == 0:
            self._write(name, {**state, **more, **self.about})
        if self.world.size > 1:  # nobody leaves, and so has the launcher end rank 0, before it has written
            told = [self.unsaved]
            dist.broadcast_object_list(told, device=self.world.device)
            self.unsaved = told[0]
        return not self.unsaved

    def _write(self, name: str, state: dict) -> None:
        try:
            save_checkpoint(self.folder / name, state, keep_as=PREVIOUS if name == LAST else "")
        except (OSError, RuntimeError) as error:  # torch wraps what the file system raises
            self.unsaved = f"{self.folder / name} could not be written ({str(error).splitlines()[0]})"
            self.console.warn(
                f"{self.unsaved}: older checkpoints are untouched and the training goes on; free some space"
            )

    def epoch_done(self, epoch: int, **more) -> None:
        """checkpoint-<epoch>.pth; of the older ones as many stay as `keep` says."""
        saved = self.write(f"checkpoint-{epoch}.pth", {"epoch": epoch, "batch": 0, **more})
        self.saved_at = time.monotonic()
        if self.keep and saved and self.world.rank == 0:
            found = epoch_checkpoints(self.folder)
            newest = found.index(self.folder / f"checkpoint-{epoch}.pth")  # those of later epochs are not ours
            for old in found[newest + self.keep :]:
                old.unlink(missing_ok=True)

    def step_done(self, epoch: int, batch: int, more: Callable[[], dict]) -> None:
        """After an optimiser step, `batch` batches of the epoch being done: saves if it is time to.

        Args:
            more: makes what the checkpoint holds beside the engine's state; all ranks call it together.

        Raises:
            Stopped: a signal came and the state is saved.
        """
        due = self.seconds > 0 and time.monotonic() - self.saved_at > self.seconds
        self._act(self.votes(self.signals.status, due and self.world.rank == 0), epoch, batch, more)

    def pause(self, epoch: int, batch: int, more: Callable[[], dict]) -> None:
        """As `step_done` where the processes have to wait for each other anyway, for a signal alone."""
        self._act(self.votes.now(self.signals.status, 0), epoch, batch, more)

    def _act(self, outcome: list[int], epoch: int, batch: int, more: Callable[[], dict]) -> None:
        status, due = outcome
        if not status and (not due or self.engine.bad_steps.in_row > 0):  # weights in doubt replace no good ones
            return
        self.write(LAST, {"epoch": epoch - 1, "batch": batch, **more()})  # epoch: the last whole one
        self.saved_at = time.monotonic()
        if not status:
            return
        if self.folder is None or self.unsaved:
            raise Stopped(f"stopped in epoch {epoch}; {self.unsaved or 'nothing is kept without --output_dir'}", 1)
        raise Stopped(
            f"stopped in epoch {epoch} after {batch} of {self.sampler.steps_per_epoch} batches, saved in "
            f"{self.folder / LAST}: start the same command again to go on",
            status,
        )

    def finish(self) -> None:
        """Raises CheckpointError where the end state could not be written."""
        if self.unsaved:
            raise CheckpointError(f"{self.unsaved}; free some space and start the same command again")


def build_checkpoints(
    args: argparse.Namespace,
    engine: Engine,
    sampler: EpochSampler,
    model_settings: dict,
    *,
    output_dir: str,
    signals: StopSignals,
    to_close: ExitStack,
    world: World,
    console: Console,
) -> Checkpoints:
    """The checkpoints of a run with these flags; its votes are closed with `to_close`."""
    votes = Votes(timeout=1.5 * args.dist_timeout)  # the watchdog speaks first
    to_close.callback(votes.close)
    return Checkpoints(
        engine=engine,
        sampler=sampler,
        output_dir=output_dir,
        about={"args": vars(args), "model_settings": model_settings},
        minutes=args.save_ckpt_minutes,
        keep=args.keep_ckpts,
        signals=signals,
        votes=votes,
        world=world,
        console=console,
    )


def resume(
    args: argparse.Namespace,
    engine: Engine,
    sampler: EpochSampler,
    model_settings: dict,
    *,
    world: World,
    console: Console,
) -> Start:
    """Loads the checkpoint to go on from, if there is one, into the engine; tells where training starts.

    Raises:
        CheckpointError: it can't be read, is of a model with other settings, or not all ranks find the same.
    """
    found = None
    if args.auto_resume and args.output_dir:
        found = newest_checkpoint(args.output_dir, console.warn)
    if args.resume and (found is None or _flags(found[1]).get("resume") != args.resume):
        found = Path(args.resume), read_checkpoint(args.resume)  # else this command has been here already
    if found is None:
        start = Start(args.start_epoch, 0, {})
        _check_same_start(start, args.output_dir, world)
        return start
    path, state = found
    check_resumable(path, state.get("model_settings", {}), model_settings)
    try:
        engine.load_state_dict(state)
        epoch, done = state["epoch"] + 1, state.get("batch", 0)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint that this run can go on from ({error}): start from its weights with "
            "--finetune, or use another --output_dir"
        ) from error
    batch, what = _batch_to_start_at(done, state.get("layout", {}), _layout(sampler))
    batch = min(batch, sampler.steps_per_epoch)
    kept = ["best", "progress"] if batch else ["best"]
    start = Start(epoch, batch, {name: state[name] for name in kept if name in state})
    _check_same_start(start, args.output_dir, world)
    inside = f", and {batch} of {sampler.steps_per_epoch} batches of the next" if batch else ""
    console.say(f"resumed {path}: {epoch} of {args.epochs} epochs are done{inside}")
    for line in [what, *_changes(state, args)]:
        if line:
            console.say(line)
    return start


# Model settings that may change between a run and its continuation: they shape no weight.
CHANGEABLE = {
    *("checkpoint_activations", "drop_path", "drop", "attn_drop", "fc_drop", "init_scale", "attn_init"),
    "sampler_options",
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


def _layout(sampler: EpochSampler) -> dict[str, int]:
    """What decides which videos a batch holds."""
    names = ("num_videos", "seed", "world_size", "batch_size", "update_freq")
    return {name: getattr(sampler, name) for name in names}


def _batch_to_start_at(done: int, old: dict[str, int], new: dict[str, int]) -> tuple[int, str]:
    """The batch of an epoch to go on at, `done` of them being done in another layout; and what to tell of it.

    Epochs go through one order of the videos, of which all processes together take the next ones in each
    step; so a position in it is found again in any layout, down to a step.
    """
    if not old or old == new:
        return done, ""
    if (old["num_videos"], old["seed"]) != (new["num_videos"], new["seed"]):
        was, now = (f"{layout['num_videos']} videos with --seed {layout['seed']}" for layout in (old, new))
        return 0, f"{was} are now {now}, in another order{', so the epoch starts again' * bool(done)}"
    _, was = _videos_a_step(old)
    step, now = _videos_a_step(new)
    first = done * old["batch_size"] * old["world_size"] // step * step
    inside = f", and the epoch goes on at its video {first}" if done else ""
    return first // step * new["update_freq"], f"a step was {was}, now it is {now}; --lr scales with it{inside}"


def _videos_a_step(layout: dict[str, int]) -> tuple[int, str]:
    size, batch, freq = (layout[name] for name in ("world_size", "batch_size", "update_freq"))
    return size * batch * freq, f"{size} processes x {batch} videos x {freq} batches = {size * batch * freq}"


def _changes(state: dict, args: argparse.Namespace) -> list[str]:
    """What is not as it was when the checkpoint was written."""
    old, lines = _flags(state), []
    changed = [
        f"--{name} {old[name]} -> {value}"
        for name, value in vars(args).items()
        if name in old and name not in NEUTRAL and old[name] != value
    ]
    if changed:
        lines.append(f"changed since then: {', '.join(changed)}")
    if state.get("version", code_version()) != code_version():
        lines.append(f"it was written by version {state['version']} of the code, this is {code_version()}")
    return lines


def _flags(state: dict) -> dict:
    flags = state.get("args") or {}
    return flags if isinstance(flags, dict) else vars(flags)


def _check_same_start(start: Start, output_dir: str, world: World) -> None:
    if world.size == 1:
        return
    places = [None] * world.size
    dist.all_gather_object(places, (start.epoch, start.batch))
    if len(set(places)) > 1:
        told = ", ".join(f"rank {rank} at epoch {e}, batch {b}" for rank, (e, b) in enumerate(places))
        raise CheckpointError(
            f"the processes would start at different places ({told}): --output_dir {output_dir} must be one "
            "folder that all machines see"
        )


@functools.cache
def code_version() -> str:
    """The commit of this code, with "-dirty" where files have changed since; without git a digest of them."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history, or no git
        rooms = (root, *(root / name for name in ("clips", "pictures", "runs", "weights")))
        sources = b"".join(path.read_bytes() for room in rooms for path in sorted(room.glob("*.py")))
        return f"sources-{hashlib.sha256(sources).hexdigest()[:12]}"
