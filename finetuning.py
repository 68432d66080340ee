"""A fine-tuning run, assembled: its epochs, validations, best checkpoint, and the test at its end."""

import argparse
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch.utils.data import DataLoader

from augment import ClipErasing, ClipMixup
from datasets import DataSet
from engine_for_finetuning import finetune_one_epoch, score_views, validate
from evaluation import accuracies, is_finite, write_results
from optim import Engine
from runs.checkpoints import BEST, read_checkpoint
from runs.flags import build_schedule
from runs.logs import Console, Progress, RunLog
from runs.resuming import Checkpoints, Start
from runs.signals import SAVED, Stopped, StopSignals
from utils import World, sum_over_ranks
from weights.tested import check_same_on_all_ranks

NO_BEST = {"top1": -1.0}


class Run(NamedTuple):
    """Everything a run needs, assembled and checked."""

    args: argparse.Namespace
    model_settings: dict
    data_set: DataSet
    world: World
    loaders: dict[str, DataLoader]
    engine: Engine
    console: Console
    log: RunLog
    normalization: tuple
    signals: StopSignals
    class_names: list[str] | None = None
    tested: str = ""  # the file whose weights the model has, with --eval
    start: Start | None = None  # the rest is None where nothing is trained
    checkpoints: Checkpoints | None = None
    books: dict | None = None  # of what goes wrong, for `Progress`


def steps_per_epoch(args: argparse.Namespace, loaders: dict[str, DataLoader]) -> int:
    return loaders["train"].sampler.steps_per_epoch // args.update_freq if "train" in loaders else 0


def train(run: Run) -> dict:
    """The epochs of a run: training, validation of the weights and of their average, checkpoints.

    Returns the best validation: its top-1, epoch and source.
    """
    args, engine, loader = run.args, run.engine, run.loaders["train"]
    schedule = build_schedule(
        args, args.batch_size * args.update_freq * run.world.size, steps_per_epoch(args, run.loaders)
    )
    augmentation = {
        "erasing": ClipErasing(prob=args.reprob, mode=args.remode, count=args.recount),
        "mixup": ClipMixup(
            num_classes=run.data_set.num_classes,
            mixup=args.mixup,
            cutmix=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            smoothing=args.smoothing,
        ),
    }
    num_batches = loader.sampler.steps_per_epoch
    first_batch, state = run.start.batch, run.start.state.get("progress")
    best = recall_best(run)
    run.console.start((run.start.epoch * num_batches + first_batch) // args.update_freq)
    for epoch in range(run.start.epoch, args.epochs):
        loader.sampler.set_epoch(epoch, first_batch)
        progress = Progress(
            world=run.world,
            console=run.console,
            log=run.log,
            epoch=epoch,
            log_freq=args.log_freq,
            state=state,
            **run.books,
        )

        def more(best: dict = best, progress: Progress = progress) -> dict:
            return {"best": best, "progress": progress.state_dict()}

        means = finetune_one_epoch(
            engine,
            loader,
            num_batches=num_batches,
            first_batch=first_batch,
            **augmentation,
            normalization=run.normalization,
            schedule=schedule,
            seed=args.seed,
            progress=progress,
            step_done=partial(run.checkpoints.step_done, epoch, more=more),
        )
        first_batch, state = 0, None
        found = validate_all(run)
        run.checkpoints.pause(epoch, num_batches, more)  # a validation that was cut short is made again
        best = keep_best(run, found, best, epoch)
        step = (epoch + 1) * steps_per_epoch(args, run.loaders)
        for name, values in found.items():
            run.log.scalars(step, {f"{name}_{k}": v for k, v in values.items()})
            text = f"{name} top-1 {values['top1']:.2f}  top-5 {values['top5']:.2f}"
            run.console.say(f"epoch {epoch}  {text}  best so far {best['top1']:.2f}")
        run.log.epoch({"epoch": epoch, **means, "validation": found, "best": best})
        if (epoch + 1) % args.save_ckpt_freq == 0 or epoch + 1 == args.epochs:
            run.checkpoints.epoch_done(epoch, best=best)
    run.console.close()
    run.checkpoints.finish()
    return best


def validate_all(run: Run) -> dict[str, dict[str, float]]:
    """What the validation finds of the weights (`model`) and of their average (`ema`); empty without one."""
    if "val" not in run.loaders:
        return {}
    how = {"normalization": run.normalization, "stop": lambda: bool(run.signals.status)}
    how["report_bad"] = run.books["bad_videos"].add
    which = ["model", "ema"] if run.engine.ema is not None else ["model"]
    return {name: validate(run.engine, run.loaders["val"], ema=name == "ema", **how) for name in which}


def keep_best(run: Run, found: dict[str, dict[str, float]], best: dict, epoch: int) -> dict:
    """Writes checkpoint-best.pth where the validation is better than ever; returns the best so far."""
    before = best
    for source, values in found.items():
        if not math.isfinite(values["loss"]):
            run.console.say_error(
                f"epoch {epoch}: the validation of {source} is not finite, so it can't be the best"
            )
        elif values["top1"] > best["top1"]:
            best = {"top1": values["top1"], "epoch": epoch, "source": source}
    if found and best.get("epoch") == epoch:
        chosen = "model_ema" if best["source"] == "ema" else "model"
        more = {"epoch": epoch, "best": best}
        written = run.checkpoints.write(BEST, more, only=lambda state: {"model": state[chosen]})
        if run.checkpoints.folder is not None and not written:
            return before  # what is remembered is what the file holds
    return best


def recall_best(run: Run) -> dict:
    """The best so far of the checkpoint that was resumed, if --output_dir or --resume's folder has its file.

    A file beside --resume is copied to --output_dir. Without one the best starts anew.
    """
    best, folder = run.start.state.get("best", NO_BEST), run.checkpoints.folder
    if best["top1"] < 0 or folder is None:
        return best
    told = [best]
    if run.world.rank == 0 and not (folder / BEST).is_file() and not copy_best(run, best):
        run.console.warn(f"the file of the best so far, {best['top1']:.2f}, is not there: the best starts anew")
        told = [NO_BEST]
    if run.world.size > 1:
        dist.broadcast_object_list(told, device=run.world.device)
    return told[0]


def copy_best(run: Run, best: dict) -> bool:
    """Copies checkpoint-best.pth from beside --resume to --output_dir; False unless it is that of `best`."""
    source, target = Path(run.args.resume).parent / BEST, run.checkpoints.folder / BEST
    if not run.args.resume or not source.is_file() or read_checkpoint(source).get("best") != best:
        return False
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        run.console.warn(f"{target} could not be written ({error})")
        target.unlink(missing_ok=True)
        return False
    run.console.say(f"{source}, the best so far, is copied to {target.parent}")
    return True


def load_for_test(run: Run, best: dict) -> str:
    """Loads the weights to be tested; returns their name.

    After training that is the best checkpoint, or without one the last weights; with --eval they are loaded.
    Raises CheckpointError where ranks would test different weights.
    """
    args, model, path = run.args, run.engine.module, Path(run.args.output_dir) / BEST
    kept = best["top1"] >= 0 and args.save_ckpt and args.output_dir and path.is_file()
    if run.tested:
        return run.tested
    tested = "the last weights"
    if kept and not args.disable_eval_during_finetuning:
        model.load_state_dict(read_checkpoint(path)["model"])
        tested = str(path)
    check_same_on_all_ranks(tested, model, run.world)
    return tested


def test(run: Run, best: dict) -> int:
    """The multi-view test; returns the exit status, 1 where videos could not be read.

    best: of `train`. Raises FloatingPointError where no score is finite, and as `load_for_test`.
    """
    args, loader = run.args, run.loaders["test"]
    tested = load_for_test(run, best)
    views = loader.dataset.views
    run.console.say(f"testing {tested}: {len(loader.dataset)} videos x {len(views)} views")
    scores = score_views(
        run.engine,
        loader,
        num_classes=run.data_set.num_classes,
        num_views=len(views),
        num_batches=len(loader),
        normalization=run.normalization,
        fusion=args.view_fusion,
        clips_at_once=max(1, 3 * args.batch_size // 2),
        stop=lambda: bool(run.signals.status),
        console=Console(total_steps=len(loader), show=run.world.rank == 0),
    )
    if sum_over_ranks(run.signals.status, run.world.device):
        raise Stopped(
            "stopped during the test: start the same command again to repeat it", run.signals.status or SAVED
        )
    if len(scores.index) and not is_finite(scores).any():
        raise FloatingPointError(f"{tested}: no video has finite scores; its weights are of no use")
    videos = loader.dataset.videos
    found = accuracies(scores, videos.labels, skip_unreadable=args.skip_unreadable)
    if run.world.rank == 0:
        run.console.say("  ".join(f"{name} {value:.2f}" for name, value in found.items()))
        if args.output_dir:
            (Path(args.output_dir) / "test.json").write_text(
                json.dumps({"tested": tested, "view_fusion": args.view_fusion, **found}, indent=1) + "\n"
            )
            write_results(Path(args.output_dir), scores, videos, run.class_names)
        for _, path, reason in scores.bad:
            print(f"unreadable test video: {path}: {reason}", file=sys.stderr)
    return 1 if scores.bad and not args.skip_unreadable else 0
