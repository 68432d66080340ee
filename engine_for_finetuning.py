"""The fine-tuning loop and validation, epoch by epoch."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import BatchAugmentation, Colours, normalize, to_pixels
from probes import ProbeGrid
from runs import watchdog
from runs.best import BestCheckpoint
from runs.engine import Engine
from runs.processes import wait_for_all
from runs.training import TrainingRun
from utils import seed_all, sum_over_ranks


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (...,B,classes) against target distributions (B,classes), in float32: (...)."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean(-1)


def finetune(
    run: TrainingRun,
    engine: Engine,
    loaders: dict[str, DataLoader],
    *,
    augmentation: BatchAugmentation,
    schedule: Callable[[int], tuple[float, float]],
    seed: int,
    best: BestCheckpoint,
    stop: Callable[[], bool],
) -> None:
    """Trains and validates the epochs that are left of a run, and keeps the best checkpoint.

    Args:
        loaders: "train", with batches of `clips` uint8 (B,3,T,H,W), `label` int64 (B,), `index` and `bad`; and
            "val" unless there is no validation.
        schedule: optimiser step -> (learning rate, weight decay).
        seed: with the batch's number and the rank it decides augmentation and dropout.
        stop: whether a signal asks this process to stop, which cuts a validation short.

    Raises:
        TrainingDiverged, TooManyBadVideos, Stopped: see `TrainingRun`.
    """
    run.start()
    for epoch in range(run.resumed.epoch, run.epochs):
        train = loaders["train"]
        finetune_one_epoch(run, engine, train, epoch=epoch, augmentation=augmentation, schedule=schedule, seed=seed)
        found = {}
        if "val" in loaders:
            settings = {"colours": augmentation.colours, "stop": stop, "report_bad": run.faults.videos.add}
            found = validate_all(engine, loaders["val"], show=run.world.is_main, **settings)
        run.stop_if_signalled()  # a validation that was cut short is repeated
        best.update(epoch, found)
        run.kept["best"] = best.value
        log_validation(run, found, best)
        lr = schedule(run.last_step)[0]
        run.log.epoch({"epoch": epoch, **run.end_epoch(), "lr": lr, "validation": found, "best": best.value})
        run.save_epoch()
    run.finish()


def finetune_one_epoch(
    run: TrainingRun,
    engine: Engine,
    loader: DataLoader,
    *,
    epoch: int,
    augmentation: BatchAugmentation,
    schedule: Callable[[int], tuple[float, float]],
    seed: int,
) -> None:
    """Trains what is left of one epoch; arguments as in `finetune`."""
    engine.module.train()
    first_batch = run.start_epoch(epoch)
    for index, batch in enumerate(loader, start=first_batch):
        run.start_batch(index, batch)

        # schedule
        number = run.batch_number(index)
        lr, weight_decay = schedule(run.step_number(index))
        engine.set_schedule(lr, weight_decay)
        seed_all(seed, number, run.world.rank)

        # batch
        rng = np.random.default_rng([seed, number, run.world.rank])
        clips = batch["clips"].to(engine.device, non_blocking=True)  # (B,3,T,H,W) uint8
        labels = batch["label"].to(engine.device, non_blocking=True)  # (B,)
        clips, targets = augmentation(clips, labels, rng)  # (B,3,T,H,W) float32, (B,K)

        # forward and loss
        losses = soft_cross_entropy(engine(clips), targets)  # (), or of K probes (K,)

        # step
        engine.backward(losses.sum())  # each probe's gradient is that of its own loss
        run.end_batch(batch, {"loss": losses.mean()})
        if engine.step():
            run.end_step(index, lr=lr, weight_decay=weight_decay)


def validate_all(engine: Engine, loader: Iterable[dict], **settings) -> dict[str, dict[str, float]]:
    """Validates the weights (`model`) and, if there is one, their moving average (`ema`); see `validate`.

    Of a grid of probes there is one result for each, such as `model lr 0.001, weight decay 0.01`.
    """
    sources = ["model", "ema"] if engine.ema is not None else ["model"]
    names = engine.module.names if isinstance(engine.module, ProbeGrid) else [""]
    found = {}
    for source in sources:
        results = validate(engine, loader, ema=source == "ema", num_probes=len(names), **settings)
        found |= {f"{source} {name}".strip(): values for name, values in zip(names, results, strict=True)}
    engine.end_validation()
    return found


def log_validation(run: TrainingRun, found: dict[str, dict[str, float]], best: BestCheckpoint) -> None:
    for source, values in found.items():
        run.log.scalars(run.last_step + 1, {f"{source}_{name}": value for name, value in values.items()})
    told = found if len(found) <= 2 else [max(found, key=lambda source: found[source]["top1"])]  # of many the best
    for source in told:
        values, others = found[source], f"  (best of {len(found)})" * (len(told) < len(found))
        text = f"{source} top-1 {values['top1']:.2f}  top-5 {values['top5']:.2f}{others}"
        run.console.say(f"epoch {run.epoch}  {text}  best so far {best.value['top1']:.2f}")


def validate(
    engine: Engine,
    loader: Iterable[dict],
    *,
    colours: Colours,
    ema: bool = False,
    stop: Callable[[], bool] = lambda: False,
    report_bad: Callable[[list[tuple[str, str]]], None] = lambda entries: None,
    num_probes: int = 1,
    show: bool = False,
) -> list[dict[str, float]]:
    """Cross-entropy, and top-1 and top-5 accuracy in per cent, over one clip of each video of all ranks.

    Every video counts once. One that can't be read counts as wrong, and so does one with non-finite logits, which
    make the loss non-finite too.

    Args:
        ema: evaluate the moving average of the weights.
        stop: where it becomes true the loop ends early, and the result is meaningless.
        report_bad: called with the (path, reason) of unreadable videos.
        num_probes: K of a grid of probes.
        show: whether to show a progress bar, on a terminal.

    Returns:
        One result, or one for each probe.
    """
    sums = torch.zeros(num_probes, 3, dtype=torch.float64, device=engine.device)  # loss, top-1, top-5
    num_bad = num_read = 0
    batches = tqdm(loader, "validation", leave=False, unit="batch", disable=None if show else True)
    for batch in until_stopped(batches, stop, "validation"):
        num_bad += len(batch["bad"])
        report_bad([(path, reason) for _, path, reason in batch["bad"]])
        if not len(batch["label"]):
            continue
        clips = batch["clips"].flatten(0, 1).to(engine.device, non_blocking=True)  # (n,3,T,H,W) one view a video
        labels = batch["label"].to(engine.device, non_blocking=True)  # (n,)
        logits = engine.evaluate(normalize(to_pixels(clips), *colours), ema=ema).float()  # ([K,]n,C)
        logits = logits.view(num_probes, len(labels), -1)  # (K,n,C)
        hits = logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[:, None]  # (K,n,5)
        hits &= logits.isfinite().all(2, keepdim=True)  # topk of NaN returns arbitrary classes
        loss = cross_entropy(logits.transpose(1, 2), labels.expand(num_probes, -1), reduction="none")  # (K,n)
        sums += torch.stack([loss.sum(1), hits[:, :, 0].sum(1), hits.sum((1, 2))], dim=1)
        num_read += len(labels)
    wait_for_all("validation")  # with --no_dist_eval only rank 0 validates
    read, bad = (sum_over_ranks(number, engine.device) for number in (num_read, num_bad))
    results, videos = [], max(1, read + bad)
    for row in sums.tolist():
        loss, top1, top5 = (sum_over_ranks(value, engine.device) for value in row)
        accuracy = {"top1": 100 * top1 / videos, "top5": 100 * top5 / videos}
        results.append({"loss": loss / max(1, read), **accuracy, "bad": bad})
    return results


def until_stopped(loader: Iterable[dict], stop: Callable[[], bool], what: str) -> Iterator[dict]:
    """The loader's batches, until `stop` is true; reports to the watchdog that the loop `what` advances."""
    for number, batch in enumerate(loader):
        watchdog.tick(f"{what}, batch {number}")
        if stop():
            return
        yield batch
