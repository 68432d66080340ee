"""The pre-training model of an AdaMAE or VideoMAE checkpoint, ours or published."""

from modeling_blocks import TUBELET
from modeling_finetune import parse_model_name
from modeling_pretrain import PRETRAIN_MODELS, PretrainVisionTransformer, create_pretrain_model
from runs.checkpoints import CheckpointError
from weights.names import Weights


def guess_pretrain_settings(found: Weights) -> dict:
    """Reads the settings for `create_pretrain_model` from the shapes of a published checkpoint.

    The shapes do not show frames and pixels: these stay the model's defaults (16 frames).

    Raises:
        CheckpointError: no known model is so wide.
    """
    dim, _, tubelet, patch, _ = found.tensors["encoder.patch_embed.proj.weight"].shape
    for name in sorted(PRETRAIN_MODELS):
        size, patch_of_name, _ = parse_model_name(name, PRETRAIN_MODELS)
        if (size.dim, patch_of_name, TUBELET) == (dim, patch, tubelet):
            depth = len({k.split(".")[2] for k in found.tensors if k.startswith("decoder.blocks.")})
            rule, ratio = ("adaptive", 0.95) if "encoder.pos_embed_probs" in found.tensors else ("tube", 0.9)
            return {"name": name, "decoder_depth": depth, "mask_type": rule, "mask_ratio": ratio}
    raise CheckpointError(f"{found.path}: no known pre-training model has width {dim} and patch {patch}")


def load_pretrain_model(found: Weights, **changes) -> PretrainVisionTransformer:
    """Rebuilds the pre-training model of a checkpoint, in evaluation mode.

    `changes` replace the checkpoint's settings of `create_pretrain_model`, e.g. `mask_ratio`.

    Raises:
        CheckpointError: it is no pre-training checkpoint, or does not fit the settings.
    """
    if "encoder.patch_embed.proj.weight" not in found.tensors:
        raise CheckpointError(f"{found.path}: not a pre-training checkpoint (no encoder.patch_embed.proj.weight)")
    settings = {**(found.settings or guess_pretrain_settings(found)), **changes}
    model = create_pretrain_model(**settings)
    try:
        model.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{found.path} does not fit {settings['name']}: {error}") from error
    return model.eval()
