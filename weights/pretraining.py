"""The pre-training model of an AdaMAE, VideoMAE or MAE-ST checkpoint, ours or published, or started from one."""

from collections.abc import Callable
from dataclasses import replace
from math import isqrt
from textwrap import shorten

from modeling_blocks import TUBELET
from modeling_finetune import parse_model_name
from modeling_pretrain import PRETRAIN_MODELS, VIDEOMAE, PretrainVisionTransformer, create_pretrain_model
from runs.checkpoints import CheckpointError
from targets import Target, create_target
from weights.classifier import LoadReport, fit_weights, in_encoder, load_fitted
from weights.names import Weights, plain_name

PARTS = ("all", "encoder")  # of a model that may start from a checkpoint
SAMPLER = ("pos_embed_probs", "get_token_probs")
SPARE = ("decoder.head.", "decoder_pred.", "pos_embed_probs")  # depend on the target, and on the number of tokens


def pretrain_settings(found: Weights) -> dict:
    """The settings for `create_pretrain_model`: those in the file, or what the shapes of a published one show.

    The shapes of AdaMAE's and VideoMAE's files do not show frames and pixels: these are those of the run's flags or of
    Hugging Face's config.json, else the model's defaults.

    Raises:
        CheckpointError: it is no pre-training checkpoint, or no known model is so wide.
    """
    if not found.kind.endswith("pre-training"):
        raise CheckpointError(f"{found.path}: not a pre-training checkpoint (no decoder)")
    if found.settings:
        return found.settings
    is_mae_st = found.kind.startswith("MAE-ST")
    dim, _, tubelet, patch, _ = found.plain["patch_embed.proj.weight"].shape
    for name in sorted(PRETRAIN_MODELS):
        size, patch_of_name, _ = parse_model_name(name, PRETRAIN_MODELS)
        same_family = (PRETRAIN_MODELS[name] is not VIDEOMAE) == is_mae_st
        if same_family and (size.dim, patch_of_name, TUBELET) == (dim, patch, tubelet):
            return {"name": name} | (_mae_st_settings(found) if is_mae_st else _videomae_settings(found))
    raise CheckpointError(f"{found.path}: no known pre-training model has width {dim} and patch {patch}")


def _videomae_settings(found: Weights) -> dict:
    depth = len({k.split(".")[2] for k in found.tensors if k.startswith("decoder.blocks.")})
    rule, ratio = ("adaptive", 0.95) if "encoder.pos_embed_probs" in found.tensors else ("tube", 0.9)
    sizes = {"num_frames": found.num_frames or 16, "input_size": found.flags.get("input_size")}
    return {**sizes, "decoder_depth": depth, "mask_type": rule, "mask_ratio": ratio}


def _mae_st_settings(found: Weights) -> dict:
    tensors, flags = found.tensors, found.flags
    *_, tubelet, patch, _ = tensors["patch_embed.proj.weight"].shape
    frames, side = flags.get("num_frames", 16), flags.get("input_size", 224)
    if separable := "pos_embed_temporal" in tensors:
        frames = tensors["pos_embed_temporal"].shape[1] * tubelet
        side = isqrt(tensors["pos_embed_spatial"].shape[1]) * patch
    predicted = len(tensors["decoder_pred.bias"]) // (3 * patch**2) * frames // tubelet
    return {
        "num_frames": frames,
        "input_size": side,
        "decoder_depth": len({k.split(".")[1] for k in tensors if k.startswith("decoder_blocks.")}),
        "decoder_dim": len(tensors["decoder_embed.bias"]),
        "mask_type": "agnostic",
        "mask_ratio": flags.get("mask_ratio", 0.9),
        "pos_embed": "separable" if separable else "learnable",
        "class_token": "cls_token" in tensors,
        "target_settings": {"joint": True, "pred_t_dim": predicted},
    }


def load_pretrain_model(found: Weights, **changes) -> PretrainVisionTransformer:
    """Rebuilds the pre-training model of a checkpoint, in evaluation mode.

    `changes` replace the checkpoint's settings of `create_pretrain_model`, e.g. `mask_ratio`.

    Raises:
        CheckpointError: as `pretrain_settings`, or the weights do not fit the settings.
    """
    settings = {**pretrain_settings(found), **changes}
    model = create_pretrain_model(**settings)
    try:
        model.load_state_dict(found.tensors)
    except RuntimeError as error:  # its first line says nothing, the others can name every weight
        problem = shorten(str(error).partition("\n")[2], 200, placeholder=" ...")
        raise CheckpointError(f"{found.path} does not fit {settings['name']}: {problem}") from error
    return model.eval()


def load_pretraining_weights(
    model: PretrainVisionTransformer,
    found: Weights,
    *,
    parts: str = "all",
    target: Target | None = None,
    report: Callable[[str], None] = print,
) -> LoadReport:
    """Starts a pre-training model from a checkpoint, and reports it as text.

    A sampler is loaded where both have one. The decoder's head for a target of another width, and the sampler's table
    of positions for another number of tokens, keep their initial values.

    Args:
        parts: "encoder" (without the sampler, of a pre-training or fine-tuned checkpoint), or "all".
        target: what the model will be trained on; the report says so where the checkpoint's was another.

    Raises:
        CheckpointError: as `load_classifier_weights`; or there is no decoder, or one of another architecture.
    """
    ours = {plain_name(name): name for name in model.state_dict()}
    found = replace(found, tensors={ours.get(plain_name(name), name): x for name, x in found.tensors.items()})
    fitted = fit_weights(found, model, wanted=lambda name: in_encoder(name) or plain_name(name).startswith("norm."))
    if parts == "all":
        try:
            fitted = fit_weights(found, model, needed=_needed(found, model), spare=SPARE)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --finetune_parts encoder takes the encoder alone") from error
        if target is not None:
            trained = trained_target(pretrain_settings(found), found.flags, patch=model.patch).describe()
            if trained != target.describe():
                fitted[1].notes.append(f"target: trained with {trained}, this run has {target.describe()}")
    return load_fitted(model, found, fitted, report)


def _needed(found: Weights, model: PretrainVisionTransformer) -> Callable[[str], bool]:
    """All weights but the spare ones, and those of a sampler that only the file or only the model has."""
    both_have_one = model.masking.adaptive and "pos_embed_probs" in found.plain
    optional = SPARE if both_have_one else (*SPARE, *SAMPLER)
    return lambda name: not plain_name(name).startswith(optional)


def trained_target(settings: dict, flags: dict, *, patch: int, **more) -> Target:
    """The target that a checkpoint was trained on: normalised pixels unless its settings and flags say otherwise.

    Files of others have no model settings; the run's flags have our names or those of the published code. `more` are
    settings that no file has, e.g. `teacher`.
    """
    normalize = flags.get("normalize_target", flags.get("normlize_target", True))
    own = {"num_frames": settings.get("num_frames", 16)} | settings.get("target_settings", {}) | more
    return create_target(settings.get("target", "pixels"), patch=patch, normalize=normalize, **own)
