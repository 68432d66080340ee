"""A classifier or pre-training model as Hugging Face's VideoMAE: its files, and what has no place there."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from augment import COLOUR_STATISTICS
from modeling_blocks import SeparateAttention
from modeling_finetune import colour_statistics
from modeling_pretrain import PRETRAIN_MODELS
from runs.checkpoints import CheckpointError
from targets import Pixels
from tools.exporting.exported import Exported
from tools.inference.trained import trained_clips
from utils import whole_file
from weights.names import hugging_face_names
from weights.pretraining import trained_target

OTHER_EPS = 1e-5  # of one norm there, whatever config.json says; ours has 1e-6 as published
SAMPLER = ("encoder.pos_embed_probs", "encoder.get_token_probs.")


def to_huggingface(exported: Exported, folder: Path) -> list[str]:
    """Writes config.json, preprocessor_config.json and model.safetensors; returns what a user must know.

    Raises:
        CheckpointError: the model has parts that VideoMAE lacks, or does not predict pixels.
    """
    exported.check_no_pool()
    describe = classifier_files if exported.is_classifier else pretraining_files
    config, shown, notes = describe(exported)
    kept = {name: x for name, x in exported.model.state_dict().items() if not name.startswith(SAMPLER)}
    for name, content in (
        ("config.json", {**config, "training": exported.training}),
        ("preprocessor_config.json", shown),
    ):
        with whole_file(folder / name, "w") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    with whole_file(folder / "model.safetensors") as file:
        file.write(save(hugging_face_names(kept), metadata={"format": "pt"}))
    if change := effect_of_eps(exported):
        notes.append(
            f"One LayerNorm has eps 1e-5 there and 1e-6 here: on a clip of noise it changes outputs by {change:.0e}."
        )
    return notes


def classifier_files(exported: Exported) -> tuple[dict, dict, list[str]]:
    """The config.json of `VideoMAEForVideoClassification`, the preprocessor_config.json, and notes."""
    model, found = exported.model, exported.found
    _refuse(found.path, [*_unlike(model), (model.slots > 1, "pooling of time slots")])
    names = found.class_names or tuple(f"LABEL_{k}" for k in range(model.head.out_features))
    config = {
        "architectures": ["VideoMAEForVideoClassification"],
        **_shape(model, model.window),
        "use_mean_pooling": model.mean_pooling,
        "id2label": dict(enumerate(names)),
        "label2id": {name: k for k, name in enumerate(names)},
    }
    clips = trained_clips(found, model, {})
    notes = [
        f"In training, clips had one frame in {clips.sampling_rate} ({clips.sampling} sampling). The pipeline spreads "
        "them over the whole video or takes the first frames, depending on the version of transformers.",
        f"Videos whose short side is not {clips.short_side} pixels are resized with antialias there, and without here. "
        "The centre of an odd margin is rounded down there, and to even here.",
    ]
    shown = preprocessor_config(clips.short_side, clips.input_size, clips.statistics)
    return config, shown, notes


def pretraining_files(exported: Exported) -> tuple[dict, dict, list[str]]:
    """The config.json of `VideoMAEForPreTraining`, the preprocessor_config.json, and notes."""
    model, found = exported.model, exported.found
    target = trained_target(exported.settings, found.flags, patch=model.patch)
    plain = isinstance(target, Pixels) and not target.joint and target.frames is None
    unfit = [
        (model.dense_encoder, "dense encoder"),
        (not plain, "target but the pixels of all frames, each channel apart"),
    ]
    _refuse(found.path, _unlike(model.encoder) + unfit)
    blocks = model.decoder.blocks
    config = {
        "architectures": ["VideoMAEForPreTraining"],
        **_shape(model.encoder, model.window),
        "use_mean_pooling": False,
        "decoder_hidden_size": model.mask_token.shape[-1],
        "decoder_num_hidden_layers": len(blocks),
        "decoder_num_attention_heads": blocks[0].attn.heads,
        "decoder_intermediate_size": blocks[0].mlp.fc1.out_features,
        "norm_pix_loss": target.normalize,
    }
    imagenet = found.flags.get("imagenet_default_mean_and_std", True)
    statistics = colour_statistics(PRETRAIN_MODELS[exported.settings["name"]].statistics, imagenet=imagenet)
    size, notes = config["image_size"], []
    if model.masking.adaptive:
        notes.append(
            "AdaMAE's sampler is left out, for which `VideoMAEForPreTraining` has no place: --to native keeps it."
        )
    if statistics != "imagenet":
        notes.append("`VideoMAEForPreTraining` computes its loss as if clips were normalised by ImageNet's colours.")
    return config, preprocessor_config(size, size, statistics), notes


def _unlike(encoder: nn.Module) -> list[tuple[bool, str]]:
    """What an encoder may have that VideoMAE lacks: whether it does, and in words."""
    return [
        (encoder.cls_token is not None, "class token"),
        (isinstance(encoder.blocks[0].attn, SeparateAttention), "biased keys"),
        (encoder.pos_kind != "sinusoid_1d", f"{encoder.pos_kind} positions"),
    ]


def _refuse(path: Path, unfit: list[tuple[bool, str]]) -> None:
    if lacking := [what for it_has, what in unfit if it_has]:
        raise CheckpointError(
            f"{path} can't become Hugging Face's VideoMAE, which has no {', no '.join(lacking)}: --to native keeps all"
        )


def _shape(encoder: nn.Module, window: tuple[int, int, int]) -> dict:
    tubelet, patch, _ = encoder.patch_embed.proj.kernel_size
    block = encoder.blocks[0]
    return {
        "model_type": "videomae",
        "image_size": window[1] * patch,
        "patch_size": patch,
        "num_channels": 3,
        "num_frames": window[0] * tubelet,
        "tubelet_size": tubelet,
        "hidden_size": encoder.patch_embed.proj.out_channels,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "qv_bias": True,
        "dtype": "float32",
    }


def preprocessor_config(short_side: int, input_size: int, statistics: str) -> dict:
    """The preprocessor_config.json that makes Hugging Face's clips those of our evaluation's middle view.

    Args:
        short_side, input_size: of the resized video and its central crop, in pixels.
        statistics: a key of `COLOUR_STATISTICS`.
    """
    mean, std = COLOUR_STATISTICS[statistics]
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": short_side},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": input_size, "width": input_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


@torch.inference_mode()
def effect_of_eps(exported: Exported) -> float:
    """The largest change of the outputs for a clip of noise, where the norm before the head has Hugging Face's eps."""
    model, tokens = exported.model, torch.arange(math.prod(exported.model.window))[None]
    encoder, norm = (model, model.fc_norm) if exported.is_classifier else (model.encoder, model.decoder.norm)
    if norm is None:  # the classifier normalises tokens, with the eps of config.json
        return 0.0
    shape = [n * size for n, size in zip(model.window, encoder.patch_embed.proj.kernel_size, strict=True)]
    clip = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    outputs = []
    for eps in (OTHER_EPS, norm.eps):
        norm.eps = eps
        outputs.append(model(clip) if exported.is_classifier else model(clip, tokens[:, ::2]).prediction)
    return (outputs[1] - outputs[0]).abs().max().item()
