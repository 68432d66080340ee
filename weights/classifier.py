"""Any known checkpoint into a classifier: names, position tables, head, and a report on all weights."""

from collections import Counter
from collections.abc import Callable, Iterable
from math import isqrt
from typing import NamedTuple

from torch import Tensor, nn

from modeling_finetune import CLASSIFIERS, VisionTransformer, parse_model_name
from probes import Probe, build_classifier
from runs.checkpoints import CheckpointError
from weights.names import Weights, architecture, plain_name, recognise
from weights.positions import POSITION_TABLES, resize_tables


class LoadReport(NamedTuple):
    """What was loaded from a checkpoint into a model and what was not, by name."""

    source: str  # the file, and the model recognised in it
    loaded: list[str]  # in the model
    fresh: list[str]  # in the model, but not in the file; or a head for other classes
    ignored: list[str]  # in the file
    notes: list[str]  # resized tables, dropped heads

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
    """Joins names, grouped by part of the model: "decoder.* (35), mask_token"."""
    counts = Counter()
    for name in names:
        plain = plain_name(name)
        part, dot, _ = plain.partition(".")
        counts[name.removesuffix(plain) + part + dot] += 1
    return ", ".join(f"{part}* ({n})" if part.endswith(".") else part for part, n in counts.items()) or "-"


def load_classifier_weights(
    model: VisionTransformer, found: Weights, report: Callable[[str], None] = print
) -> LoadReport:
    """Loads the weights of a checkpoint, pre-trained or fine-tuned, into a classifier, and reports it as text.

    The whole encoder must be there and fit. Only a learned position table keeps its initial values, the sinusoid,
    where the checkpoint had fixed positions. A head for other classes is dropped; a head or final norm that the file
    lacks keeps its initial values. As in the published code, the final norm of MAE-ST is loaded, and that of AdaMAE
    and VideoMAE pre-training is not: it normalised tokens, not their mean.

    Raises:
        CheckpointError: the weights are those of no video ViT or of another architecture; names the first weight
            that does not fit and both shapes.
    """
    return load_fitted(model, found, fit_weights(found, model), report)


def load_fitted(
    model: nn.Module, found: Weights, fitted: tuple[dict[str, Tensor], LoadReport], report: Callable[[str], None]
) -> LoadReport:
    """Loads what `fit_weights` returned as weights to start from, and reports it as text."""
    tensors, result = fitted
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and len(missing) == len(result.fresh), (unexpected, missing)
    trained_with = found.settings.get("pos_embed") or model.pos_kind
    if trained_with != model.pos_kind:
        result.notes.append(f"positions: trained with {trained_with}, this model has {model.pos_kind}")
    report(str(result))
    return result


def load_classifier(
    found: Weights, *, headless: bool = False, report: Callable[[str], None] = print, **changes
) -> VisionTransformer | Probe:
    """Rebuilds the classifier or probe of a checkpoint, in evaluation mode.

    Args:
        headless: replace the head by an identity, so that the model returns its features (B,D); pre-training
            checkpoints then work too.
        changes: settings of `create_classifier` that replace the checkpoint's, e.g. `num_frames`.

    Raises:
        CheckpointError: as `load_classifier_weights`, or the checkpoint has no head, or holds a grid of probes.
    """
    refuse_grid(found)
    settings = {**classifier_settings(found), **changes}
    if headless:
        settings.setdefault("num_classes", 1)
    elif "num_classes" not in settings:
        raise CheckpointError(f"{found.path}: {found.kind} checkpoint, which has no classifier: fine-tune it first")
    model = build_classifier(settings)
    tensors, result = fit_weights(found, model)
    model.load_state_dict(tensors, strict=False)
    report(str(result))
    if headless:
        model.head = nn.Identity()
    return model.eval()


def refuse_grid(found: Weights) -> None:
    """Refuses the full state of a grid of probes as one model.

    Raises:
        CheckpointError: it is that.
    """
    grid = (found.settings.get("probe") or {}).get("grid")
    if grid:
        raise CheckpointError(
            f"{found.path} holds {len(grid)} probes: use checkpoint-best.pth beside it, which is the best of them"
        )


def classifier_settings(found: Weights) -> dict:
    """Returns the settings with which `build_classifier` rebuilds the model of a checkpoint.

    Files of ours contain them. For other files they follow from the shapes, and frames and pixels from the flags of
    the run; without flags these are 16 frames and the pixels in the model's name. Without a head there is no
    `num_classes`.

    Raises:
        CheckpointError: no known classifier has such shapes.
    """
    if found.settings.get("name") in CLASSIFIERS:
        return dict(found.settings)
    _check_known(found)
    weights = found.plain
    _, _, tubelet, patch, _ = weights["patch_embed.proj.weight"].shape
    settings = {
        "name": _classifier_name(found),
        "tubelet": tubelet,
        "num_frames": found.num_frames or 16,
        "input_size": found.settings.get("input_size", found.flags.get("input_size")),
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


def _classifier_name(found: Weights) -> str:
    """Finds the classifier of the same family, width, depth and patch, with the fewest pixels."""
    shape, separate_qkv = architecture(found.tensors), found.kind.startswith("MAE-ST")
    for name in sorted(CLASSIFIERS, key=lambda n: parse_model_name(n, CLASSIFIERS)[2]):
        size, patch, _ = parse_model_name(name, CLASSIFIERS)
        same_family = CLASSIFIERS[name].settings.get("separate_qkv", False) == separate_qkv
        if same_family and shape == (size.dim, size.depth, patch):
            return name
    raise CheckpointError(f"{found.path}: no known classifier is a {found.kind} model of {_describe(found.tensors)}")


def in_encoder(name: str) -> bool:
    """Whether features need this weight: not the case for final norm, head and decoder."""
    tables = ("cls_token", "pos_embed_class", *POSITION_TABLES)
    return plain_name(name).split(".")[0] in ("patch_embed", "blocks", *tables)


def fit_weights(
    found: Weights,
    model: nn.Module,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    needed: Callable[[str], bool] = in_encoder,
    spare: tuple[str, ...] = ("head.",),
) -> tuple[dict[str, Tensor], LoadReport]:
    """Gives the tensors of a checkpoint the names and shapes of a model; returns those to load, and the report.

    Args:
        model: classifier, probe or pre-training model.
        wanted: whether to take the weight of this name.
        needed: whether file and model must both have the weight of this name.
        spare: how the names begin (`plain_name`) of weights that are left out where the shapes differ.

    Raises:
        CheckpointError: as `load_classifier_weights`.
    """
    _check_known(found)
    target = model.state_dict()
    origin = {name if name in target else plain_name(name): name for name in found.tensors}
    taken = {name: found.tensors[origin[name]] for name in origin if name in target and wanted(name)}
    slots = found.num_frames and found.num_frames // found.plain["patch_embed.proj.weight"].shape[2]
    notes = resize_tables(taken, target, model.window, slots)
    wrong = {
        name: f"{tuple(value.shape)} in the file and {tuple(target[name].shape)} in the model"
        for name, value in taken.items()
        if value.shape != target[name].shape
    }
    for start in spare:
        if dropped := [name for name in wrong if plain_name(name).startswith(start)]:
            taken = {name: value for name, value in taken.items() if not plain_name(name).startswith(start)}
            notes += [f"{name} dropped: {wrong.pop(name)}" for name in dropped]
    unmatched = [name for name in origin if name not in taken]
    problems = [
        *(f"{name} is {shapes}" for name, shapes in wrong.items()),
        *(f"{name} is not in the file" for name in _expected(found, target) if needed(name) and name not in taken),
        *(f"{name} is not in the model" for name in unmatched if needed(name)),
    ]
    if problems:
        raise CheckpointError(_misfit(found, target, problems))
    return taken, LoadReport(
        source=f"{found.path}: {found.kind} checkpoint",
        loaded=list(taken),
        fresh=[name for name in target if name not in taken],
        ignored=[origin[name] for name in unmatched] + found.ignored,
        notes=notes,
    )


def _expected(found: Weights, target: dict[str, Tensor]) -> list[str]:
    """The names in a model, but for a learned position table where the file's positions were fixed."""
    had_table = any(name in POSITION_TABLES for name in found.plain)
    learned = had_table or found.settings.get("pos_embed") in ("learnable", "separable")
    return [name for name in target if learned or name.rpartition(".")[2] != "pos_embed"]


def _misfit(found: Weights, target: dict[str, Tensor], problems: list[str]) -> str:
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return (
        f"{found.path}: {found.kind} checkpoint ({_describe(found.tensors)}) does not fit the "
        f"{recognise(target)} ({_describe(target)}): {problems[0]}{more}"
    )


def _check_known(found: Weights) -> None:
    if not found.kind:
        names = ", ".join(sorted(found.tensors)[:3])
        raise CheckpointError(f"{found.path}: no checkpoint of a known video ViT (it holds {names}, ...)")
    if found.plain["patch_embed.proj.weight"].ndim == 4:
        raise CheckpointError(f"{found.path}: {found.kind} checkpoint: only fine-tuning can start from it (--finetune)")


def _describe(tensors: dict[str, Tensor]) -> str:
    return "width {}, {} blocks, patch {}".format(*architecture(tensors))
