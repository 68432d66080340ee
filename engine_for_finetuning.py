"""The fine-tuning loop, validation, and the test on many views."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from augment import ClipErasing, ClipMixup, normalize, to_pixels
from evaluation import Scores, fuse_views, merge_ranks
from optim import Engine
from runs import watchdog
from runs.logs import Console, Progress
from runs.processes import wait_for_all
from utils import seed_all, sum_over_ranks

Normalization = tuple[Sequence[float], Sequence[float]]  # channel means and deviations of the model's input


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B,K) against target distributions (B,K), in float32."""
    return -(targets * logits.float().log_softmax(1)).sum(1).mean()


def finetune_one_epoch(
    engine: Engine,
    loader: Iterable[dict],
    *,
    num_batches: int,
    first_batch: int = 0,
    erasing: ClipErasing,
    mixup: ClipMixup,
    normalization: Normalization,
    schedule: Callable[[int], tuple[float, float]],
    seed: int,
    progress: Progress,
    step_done: Callable[[int], None] = lambda batches: None,
) -> dict[str, float]:
    """Trains on the batches of the loader, as those of the epoch of `progress` from `first_batch` on.

    Args:
        loader: batches with `clips` uint8 (B,3,T,H,W), `label` int64 (B,), `index` and `bad`.
        num_batches: batches an epoch, from which the number of the optimiser step follows.
        erasing, mixup: applied to the normalised batch on the device; `mixup` makes the soft targets.
        schedule: optimiser step -> (learning rate, weight decay).
        seed: with the batch's number and the rank it decides erasing, mixing and dropout.
        step_done: called after every optimiser step with the batches of the epoch that are done; may raise.

    Returns:
        Means of the epoch over all steps and ranks, and what went wrong (`Progress.epoch_means`).

    Raises:
        FloatingPointError: the loss stays not finite.
        TooManyBadVideos: too many videos are unreadable.
    """
    engine.module.train()
    for index, batch in progress.batches(loader, first_batch):
        # schedule
        batch_index = progress.epoch * num_batches + index
        step = batch_index // engine.update_freq
        lr, weight_decay = schedule(step)
        engine.set_schedule(lr, weight_decay)
        seed_all(seed, batch_index, progress.world.rank)

        # batch
        rng = np.random.default_rng([seed, batch_index, progress.world.rank])
        clips = batch["clips"].to(engine.device, non_blocking=True)  # (B,3,T,H,W) uint8
        labels = batch["label"].to(engine.device, non_blocking=True)  # (B)
        clips = erasing(normalize(to_pixels(clips), *normalization), rng)
        clips, targets = mixup(clips, labels, rng)  # (B,3,T,H,W), (B,K)

        # forward and loss
        loss = soft_cross_entropy(engine(clips), targets)

        # step
        engine.backward(loss)
        progress.add(batch, loss=loss)
        if engine.step():
            norms = {f"grad_norm_{name}": norm for name, norm in engine.grad_norms.items()}
            last = index + 1 == num_batches
            progress.step_done(step, last=last, lr=lr, weight_decay=weight_decay, **norms)
            step_done(index + 1)
    return progress.epoch_means() | {
        "lr": schedule((progress.epoch + 1) * num_batches // engine.update_freq - 1)[0]
    }


def unless_asked(loader: Iterable[dict], stop: Callable[[], bool], what: str) -> Iterator[dict]:
    """The loader's batches, until `stop` says so."""
    for number, batch in enumerate(loader):
        watchdog.tick(f"{what}, batch {number}")
        if stop():
            return
        yield batch


def validate(
    engine: Engine,
    loader: Iterable[dict],
    *,
    normalization: Normalization,
    ema: bool = False,
    stop: Callable[[], bool] = lambda: False,
    report_bad: Callable[[list[tuple[str, str]]], None] = lambda entries: None,
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 in per cent over one clip of each video, of all ranks together.

    Every video counts once; one that can't be read counts as wrong, and so does one whose logits are not
    finite; then the loss isn't either. `ema` takes the average of the weights.
    Where `stop` becomes true it is cut short, and what it returns means nothing. `report_bad` is told the
    (path, reason) of unreadable videos.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)  # loss, top-1, top-5, read
    num_bad = 0
    for batch in unless_asked(loader, stop, "validation"):
        num_bad += len(batch["bad"])
        report_bad([(path, reason) for _, path, reason in batch["bad"]])
        if not len(batch["label"]):
            continue
        clips = batch["clips"].flatten(0, 1).to(engine.device, non_blocking=True)  # one view a video
        labels = batch["label"].to(engine.device, non_blocking=True)
        logits = engine.evaluate(normalize(to_pixels(clips), *normalization), ema=ema).float()  # (n,K)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (n,5)
        hits &= logits.isfinite().all(1, keepdim=True)  # the largest of what is not a number is anything
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums[:3] += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        sums[3] += len(labels)
    wait_for_all("validation")  # with --no_dist_eval the others have nothing to do for long
    loss, top1, top5, read = (sum_over_ranks(x, engine.device) for x in sums.tolist())
    bad = sum_over_ranks(num_bad, engine.device)
    videos = max(1, read + bad)
    return {"loss": loss / max(1, read), "top1": 100 * top1 / videos, "top5": 100 * top5 / videos, "bad": bad}


def score_views(
    engine: Engine,
    loader: Iterable[dict],
    *,
    num_classes: int,
    num_views: int,
    num_batches: int,
    normalization: Normalization,
    fusion: str = "softmax",
    ema: bool = False,
    clips_at_once: int = 64,
    stop: Callable[[], bool] = lambda: False,
    console: Console,
) -> Scores:
    """The fused scores of every video of the loader's list, all ranks' merged; `stop` as in `validate`.

    Args:
        loader: batches of `loaders.collate_views`, V views to a video.
        clips_at_once: views in one forward pass.
    """
    index, label, fused, hits, bad = [], [], [], [], []
    console.start(0)
    for number, batch in enumerate(unless_asked(loader, stop, "test")):
        bad += batch["bad"]
        if len(batch["label"]):
            views = batch["clips"].flatten(0, 1)  # (n*V,3,T,H,W) uint8
            logits = [
                engine.evaluate(normalize(to_pixels(part.to(engine.device)), *normalization), ema=ema)
                for part in views.split(clips_at_once)
            ]
            logits = torch.cat(logits).unflatten(0, (-1, num_views))  # (n,V,K)
            scores, right = fuse_views(logits, batch["label"].to(engine.device), fusion)
            index.append(batch["index"].numpy())
            label.append(batch["label"].numpy())
            fused.append(scores.cpu().numpy())
            hits.append(right.cpu().numpy())
        console.advance()
        if (number + 1) % max(1, num_batches // 20) == 0:
            console.report(number + 1, "test", videos=str(sum(map(len, index))))
    console.close()
    wait_for_all("test")
    return merge_ranks(
        Scores(
            np.concatenate([np.zeros(0, np.int64), *index]),
            np.concatenate([np.zeros(0, np.int64), *label]),
            np.concatenate([np.zeros((0, num_classes), np.float32), *fused]),
            np.concatenate([np.zeros((0, 2), np.int64), *hits]),
            num_views,
            bad,
        )
    )
