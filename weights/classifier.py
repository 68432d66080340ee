"""The weights of any known checkpoint into a classifier: names, position tables, head, and a report."""

from collections import Counter
from collections.abc import Callable, Iterable
from math import isqrt, prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masking_generator import Window
from modeling_finetune import CLASSIFIERS, MAE_ST, VisionTransformer, create_classifier, parse_model_name
from probes import make_probe
from runs.checkpoints import CheckpointError, Weights, load_weights, plain_name, recognise

POSITION_TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal")


class LoadReport(NamedTuple):
    """What became of the weights of a checkpoint and of a model, by name."""

    source: str  # the file, and what it was recognised as
    loaded: list[str]  # of the model
    fresh: list[str]  # of the model: not in the file, or a head of other classes
    ignored: list[str]  # of the file
    notes: list[str]  # tables that were resized, a head that was dropped

    def __str__(self) -> str:
        lines = (
            self.source,
            f"loaded: {len(self.loaded)} tensors",
            f"freshly initialised: {group_names(self.fresh)}",
            f"ignored: {group_names(self.ignored)}",
            *self.notes,
        )
        return "\n  ".join(lines)


def group_names(names: Iterable[str]) -> str:
    """Names in one line, those of one part of the model together: "decoder.* (35), mask_token"."""
    counts = Counter()
    for name in names:
        plain = plain_name(name)
        part, dot, _ = plain.partition(".")
        counts[name.removesuffix(plain) + part + dot] += 1
    return ", ".join(f"{part}* ({n})" if part.endswith(".") else part for part, n in counts.items()) or "-"


def load_classifier_weights(
    model: VisionTransformer,
    path: str | Path,
    *,
    model_key: str = "model|module",
    prefix: str = "",
    report: Callable[[str], None] = print,
) -> LoadReport:
    """Loads a checkpoint, pre-trained or fine-tuned, into a classifier in place.

    All of the encoder must be there and fit, but for a learned position table where the file was trained with
    fixed positions: that one starts fresh, as the sinusoid. A head of other classes is dropped, and a final norm
    or head that is not in the file stays as the model was initialised. As in the published code that goes for
    the norm of AdaMAE and VideoMAE, which normalised tokens and not their mean; MAE-ST's is taken over.

    Args:
        path, model_key, prefix: as in `load_weights`.
        report: is given the report as text.

    Raises:
        CheckpointError: the file is unreadable, holds no video ViT, or one of another architecture; names
            the first weight that does not fit and both shapes.
    """
    found = load_weights(path, model_key=model_key, prefix=prefix)
    result = _load(model, found, path)
    trained_with = found.settings.get("pos_embed") or model.pos_kind
    if trained_with != model.pos_kind:
        result.notes.append(f"positions: trained with {trained_with}, this model has {model.pos_kind}")
    report(str(result))
    return result


def load_classifier(
    path: str | Path,
    *,
    model_key: str = "model|module",
    prefix: str = "",
    headless: bool = False,
    report: Callable[[str], None] = print,
    **changes,
) -> nn.Module:
    """Rebuilds the classifier or probe of a checkpoint, in evaluation mode.

    Args:
        path, model_key, prefix, report: as in `load_classifier_weights`.
        headless: put an identity in place of the head, so that the model returns the features (B,D) before
            it; a pre-training checkpoint will then do.
        changes: settings of `create_classifier` to use instead of the checkpoint's, e.g. `num_frames`.

    Raises:
        CheckpointError: as `load_classifier_weights`, or the checkpoint has no head.
    """
    found = load_weights(path, model_key=model_key, prefix=prefix)
    settings = {**classifier_settings(found, path), **changes}
    if headless:
        settings.setdefault("num_classes", 1)
    elif "num_classes" not in settings:
        raise CheckpointError(f"{path}: {found.kind} checkpoint, which has no classifier: fine-tune it first")
    probe = settings.pop("probe", None)
    model = create_classifier(**settings)
    model = model if probe is None else make_probe(model, **probe)
    report(str(_load(model, found, path)))
    if headless:
        model.head = nn.Identity()
    return model.eval()


def classifier_settings(found: Weights, path: str | Path) -> dict:
    """Arguments of `create_classifier` for a checkpoint, and for a probe those of `make_probe` as `probe`.

    Our classifiers tell theirs. Of other files the shapes tell most, and the flags of the run that made them
    frames and pixels; without flags these are 16 and those in the model's name. `num_classes` is missing
    where there is no head.

    Raises:
        CheckpointError: no known classifier has such shapes.
    """
    if found.settings.get("name") in CLASSIFIERS:
        return dict(found.settings)
    weights = {plain_name(name): value for name, value in found.tensors.items()}
    _check_known(found, path)
    _, _, tubelet, patch, _ = weights["patch_embed.proj.weight"].shape
    told = {**found.flags, **found.settings}
    settings = {
        "name": _classifier_name(found, path),
        "tubelet": tubelet,
        "num_frames": told.get("num_frames", 16) * told.get("num_segments", 1),
        "input_size": told.get("input_size"),
        "mean_pooling": found.kind != "VideoMAE classifier" or "norm.weight" not in weights,
        "class_token": "cls_token" in weights,
        "pos_embed": "learnable" if "pos_embed" in weights else found.settings.get("pos_embed"),
    }
    if "pos_embed_spatial" in weights:
        settings["pos_embed"] = "separable"
        settings["num_frames"] = weights["pos_embed_temporal"].shape[1] * tubelet
        settings["input_size"] = isqrt(weights["pos_embed_spatial"].shape[1]) * patch
    if "head.weight" in weights:
        settings["num_classes"] = len(weights["head.weight"])
    return settings


def _classifier_name(found: Weights, path: str | Path) -> str:
    """The classifier of the checkpoint's family, width, depth and patch; the one with the fewest pixels."""
    shape = architecture(found.tensors)
    for name in sorted(CLASSIFIERS, key=lambda n: parse_model_name(n, CLASSIFIERS)[2]):
        size, patch, _ = parse_model_name(name, CLASSIFIERS)
        same_family = (CLASSIFIERS[name] == MAE_ST) == found.kind.startswith("MAE-ST")
        if same_family and shape == (size.dim, size.depth, patch):
            return name
    raise CheckpointError(f"{path}: no known classifier is a {found.kind} model of {_described(found.tensors)}")


def _load(model: nn.Module, found: Weights, path: str | Path) -> LoadReport:
    tensors, report = fit_weights(found, model.state_dict(), window=model.window, path=path)
    model.load_state_dict(tensors, strict=False)
    return report


def fit_weights(
    found: Weights, target: dict[str, Tensor], *, window: Window, path: str | Path
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of a checkpoint under the names and in the shapes of a classifier, and the report.

    Args:
        target: the classifier's state dict; window: its tokens (T',H',W'); path: of the checkpoint, to name.

    Raises:
        CheckpointError: as `load_classifier_weights`.
    """
    _check_known(found, path)
    origin = {name if name in target else plain_name(name): name for name in found.tensors}
    taken = {name: found.tensors[origin[name]] for name in origin if name in target}
    notes = _resize_tables(taken, target, window, _time_slots(found)) + _drop_other_head(taken, target)
    homeless = [name for name in origin if name not in taken]

    fresh_table = _starts_a_table(found)
    problems = _misfits(taken, target, homeless, optional={"pos_embed"} if fresh_table else set())
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{path}: {found.kind} checkpoint ({_described(found.tensors)}) does not fit the "
            f"{recognise(target)} ({_described(target)}): {problems[0]}{more}"
        )
    return taken, LoadReport(
        source=f"{path}: {found.kind} checkpoint",
        loaded=list(taken),
        fresh=[name for name in target if name not in taken],
        ignored=[origin[name] for name in homeless] + found.ignored,
        notes=notes,
    )


def _check_known(found: Weights, path: str | Path) -> None:
    if not found.kind:
        names = ", ".join(sorted(found.tensors)[:3])
        raise CheckpointError(f"{path}: no checkpoint of a known video ViT (it holds {names}, ...)")


def _starts_a_table(found: Weights) -> bool:
    """Whether the checkpoint was trained with fixed positions, so that a learned table may start fresh."""
    has_table = any(plain_name(name) in POSITION_TABLES for name in found.tensors)
    return not has_table and found.settings.get("pos_embed") not in ("learnable", "separable")


def _misfits(
    taken: dict[str, Tensor], target: dict[str, Tensor], homeless: list[str], optional: set[str]
) -> list[str]:
    """What shows that a checkpoint is of another architecture, a sentence each."""
    shapes = [
        f"{name} is {tuple(value.shape)} in the file and {tuple(target[name].shape)} in the model"
        for name, value in taken.items()
        if value.shape != target[name].shape
    ]
    missing = [
        f"{name} is not in the file"
        for name in target
        if name not in taken and _in_encoder(name) and plain_name(name) not in optional
    ]
    return shapes + missing + [f"{name} has no place in the model" for name in homeless if _in_encoder(name)]


def _in_encoder(name: str) -> bool:
    """Whether features can't be what they were trained to be without this weight."""
    tables = ("cls_token", "pos_embed_class", *POSITION_TABLES)
    return plain_name(name).split(".")[0] in ("patch_embed", "blocks", *tables)


def _drop_other_head(taken: dict[str, Tensor], target: dict[str, Tensor]) -> list[str]:
    """Removes a head of another shape from `taken`; returns a note of it."""
    head = [name for name in taken if name.startswith("head.")]
    notes = [
        f"{name} dropped: {tuple(taken[name].shape)} in the file and {tuple(target[name].shape)} in the model"
        for name in head
        if taken[name].shape != target[name].shape
    ]
    for name in head if notes else ():
        del taken[name]
    return notes


def _resize_tables(
    taken: dict[str, Tensor], target: dict[str, Tensor], window: Window, slots: int | None
) -> list[str]:
    """Resizes the learned position tables in `taken` to the model's window; returns a note of each.

    A table that no window explains is left alone, and then reported as of another shape.
    """
    _, h, w = window
    notes = []
    for name in [n for n in taken if plain_name(n) in POSITION_TABLES]:
        table, extra = taken[name], 0
        if table.shape[2:] != target[name].shape[2:]:
            continue
        if name.endswith("pos_embed_spatial"):
            old, new = _square_slices(table.shape[1], 1), (1, h, w)
        elif name.endswith("pos_embed_temporal"):
            old, new = (table.shape[1], 1, 1), (window[0], 1, 1)
        else:
            extra = target[name].shape[1] - prod(window)  # the class token's row, in front
            old, new = _joint_window(table.shape[1] - extra, window, slots), window
        if old and old != new:
            resized = resize_positions(table[:, extra:], old, new)
            taken[name] = torch.cat([table[:, :extra], resized], dim=1)
            notes.append(f"{name} resized from {'x'.join(map(str, old))} to {'x'.join(map(str, new))} tokens")
    return notes


def _joint_window(length: int, window: Window, slots: int | None) -> Window | None:
    """The window of a table of `length` positions with square slices, for a model of `window`.

    Its time slots are those that the file tells, else the model's, as the published code assumes, else as
    many as leave the model's slices.
    """
    candidates = (slots, window[0], length // (window[1] * window[2]))
    return next(filter(None, (_square_slices(length, t) for t in candidates if t)), None)


def _square_slices(length: int, slots: int) -> Window | None:
    side = isqrt(length // slots)
    return (slots, side, side) if slots * side * side == length else None


def _time_slots(found: Weights) -> int | None:
    """Time slots of the model that a checkpoint was made with, where the file tells its frames."""
    told = {**found.flags, **found.settings}
    kernel = next(v for k, v in found.tensors.items() if plain_name(k) == "patch_embed.proj.weight")
    if "num_frames" not in told:
        return None
    return told["num_frames"] * told.get("num_segments", 1) // kernel.shape[2]


def resize_positions(table: Tensor, old: Window, new: Window) -> Tensor:
    """Resizes a position table (1,N,D) of one window to another: (1,N',D).

    Bicubic in space, slice by slice, as the published code; linear in time, which it leaves alone.
    """
    x = table.float().unflatten(1, old)[0].movedim(-1, 1)  # (t,D,h,w)
    if new[1:] != old[1:]:
        x = F.interpolate(x, size=new[1:], mode="bicubic", align_corners=False)  # (t,D,h',w')
    if new[0] != old[0]:
        rows = x.movedim(0, -1).flatten(0, 2)[None]  # (1,D*h'*w',t)
        rows = F.interpolate(rows, size=new[0], mode="linear", align_corners=False)  # (1,D*h'*w',t')
        x = rows[0].unflatten(0, x.shape[1:]).movedim(-1, 0)  # (t',D,h',w')
    return x.movedim(1, -1).flatten(0, 2)[None].to(table.dtype)


def architecture(tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    """Width, number of blocks and pixels of a patch's side of a video ViT."""
    plain = {plain_name(name): value for name, value in tensors.items()}
    kernel = plain["patch_embed.proj.weight"]  # (D,3,tubelet,p,p)
    return kernel.shape[0], len({n.split(".")[1] for n in plain if n.startswith("blocks.")}), kernel.shape[-1]


def _described(tensors: dict[str, Tensor]) -> str:
    return "width {}, {} blocks, patch {}".format(*architecture(tensors))
