"""The models as classes of Hugging Face's hub: `from_pretrained`, `save_pretrained`, `push_to_hub`.

    model = PretrainingModel.from_pretrained("org/name")    # or a folder of `tools/export.py --to native`
    model.push_to_hub("org/name")

The folder holds `model.safetensors`, with the published names, and `config.json`, with the settings that rebuild the
model.
"""

from collections.abc import Callable
from typing import ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from modeling_finetune import VisionTransformer, create_classifier
from modeling_pretrain import PretrainVisionTransformer, create_pretrain_model


class OnTheHub(PyTorchModelHubMixin):
    """What makes a model one that the hub's library loads and saves.

    Args:
        model_settings: arguments of `create`.
        training: flags of the run on which clips and targets depend.
        id2label: names of the classes, by their number.
    """

    create: ClassVar[Callable[..., nn.Module]]

    def __new__(cls, model_settings: dict | None = None, training: dict | None = None, id2label: dict | None = None):
        # `create` chooses the constructor's arguments, so it makes the object, which then changes its class.
        if model_settings is None:  # a copy, whose state follows
            return object.__new__(cls)
        return cls.of(cls.create(**model_settings), model_settings, training, id2label)

    def __init__(self, model_settings: dict, training: dict | None = None, id2label: dict | None = None):
        """Nothing: `__new__` has done it; the hub's library takes the names of the settings from here."""

    @classmethod
    def of(cls, model: nn.Module, model_settings: dict, training: dict | None = None, id2label: dict | None = None):
        """Makes a model of `create`, with its weights, one of this class."""
        model.__class__ = cls
        config = {"model_settings": model_settings, "training": training, "id2label": id2label}
        model._hub_mixin_config = {name: value for name, value in config.items() if value}
        return model


class PretrainingModel(
    OnTheHub,
    PretrainVisionTransformer,
    tags=["video", "masked-autoencoder"],
    paper_url="https://arxiv.org/abs/2211.09120",
):
    """The pre-training model with everything in it: encoder, sampler, decoder."""

    create = staticmethod(create_pretrain_model)


class Classifier(OnTheHub, VisionTransformer, tags=["video"], pipeline_tag="video-classification"):
    """The video classifier."""

    create = staticmethod(create_classifier)
