"""Entry points for `torch.hub.load(REPOSITORY, NAME, ...)`.

    model = torch.hub.load(".", "vit_base_patch16_224", source="local", num_classes=400)          # random weights
    model = torch.hub.load(".", "classifier", "output/checkpoint-best.pth", source="local")       # a checkpoint's

Every classifier and pre-training model is an entry point under its name. Its arguments are those of `create_classifier`
and `create_pretrain_model`. Clips are (B,3,T,H,W), normalised by the colours of `augment.COLOUR_STATISTICS`.
"""

from functools import partial as _partial
from functools import update_wrapper as _update_wrapper

from torch import nn as _nn

from modeling_finetune import CLASSIFIERS as _CLASSIFIERS
from modeling_finetune import create_classifier as _create_classifier
from modeling_pretrain import PRETRAIN_MODELS as _PRETRAIN_MODELS
from modeling_pretrain import create_pretrain_model as _create_pretrain_model
from weights.classifier import load_classifier as _load_classifier
from weights.names import load_weights as _load_weights
from weights.pretraining import load_pretrain_model as _load_pretrain_model

dependencies = ["torch", "torchvision", "timm", "einops", "numpy", "safetensors", "huggingface_hub"]

for _names, _create in ((_CLASSIFIERS, _create_classifier), (_PRETRAIN_MODELS, _create_pretrain_model)):
    for _name in _names:
        globals()[_name] = _update_wrapper(_partial(_create, _name), _create)


def classifier(checkpoint: str, **changes) -> _nn.Module:
    """The classifier of a checkpoint, in evaluation mode.

    Args:
        checkpoint: what the tools take as --model: a file, a folder, or a repository of the Hugging Face hub.
        changes: settings of `create_classifier` that replace the checkpoint's, e.g. `num_frames`.

    Raises:
        CheckpointError: as `load_classifier`.
    """
    return _load_classifier(_load_weights(checkpoint), **changes)


def pretraining_model(checkpoint: str, **changes) -> _nn.Module:
    """The pre-training model of a checkpoint, in evaluation mode; arguments and errors as of `classifier`."""
    return _load_pretrain_model(_load_weights(checkpoint), **changes)
