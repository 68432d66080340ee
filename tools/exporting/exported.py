"""The model to export, and what is known of it."""

import sys
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from clips.class_names import read_labels
from modeling_pretrain import PretrainVisionTransformer
from probes import Probe
from runs.checkpoints import CheckpointError
from weights.classifier import classifier_settings, load_classifier
from weights.names import Weights, load_weights
from weights.pretraining import load_pretrain_model, pretrain_settings

# Flags of a run that say which clips a model takes and what it predicts.
KEPT_FLAGS = (
    *("data_set", "sampling", "sampling_rate", "num_frames", "num_segments", "input_size", "short_side_size"),
    *("test_num_segment", "test_num_crop", "imagenet_default_mean_and_std", "normalize_target", "normlize_target"),
)


class Exported(NamedTuple):
    """A model to export, in evaluation mode, and what is known of it."""

    found: Weights  # with the class names to export
    model: nn.Module
    settings: dict  # that rebuild the model
    training: dict  # flags of the run, of `KEPT_FLAGS`

    @property
    def is_classifier(self) -> bool:
        return not isinstance(self.model, PretrainVisionTransformer)

    def check_no_pool(self) -> None:
        """Checks that it is no attentive probe.

        Raises:
            CheckpointError: it is.
        """
        if isinstance(self.model, Probe):
            raise CheckpointError(f"{self.found.path} is an attentive probe, which only --to published can keep")


def read_model(path: str, *, model_key: str, labels: str | None) -> Exported:
    """Loads the model of a checkpoint.

    Args:
        labels: file of class names, instead of those in the checkpoint.

    Raises:
        CheckpointError: as `load_weights`, `load_classifier` and `load_pretrain_model`.
        ListError: the labels are not those of the model.
    """
    found = load_weights(path, model_key=model_key)
    training = {name: found.flags[name] for name in KEPT_FLAGS if found.flags.get(name) is not None}
    if found.kind.endswith("pre-training"):
        return Exported(found, load_pretrain_model(found), pretrain_settings(found), training)
    model = load_classifier(found, report=lambda text: print(text, file=sys.stderr))
    settings = classifier_settings(found)
    if labels:
        found = replace(found, class_names=read_labels(labels, model.head.out_features).names)
    if isinstance(model, Probe) and not model.pools:
        model, settings = without_probe(model), {k: v for k, v in settings.items() if k != "probe"}
    return Exported(found, model, settings, training)


def without_probe(probe: Probe) -> nn.Module:
    """Makes a linear probe the classifier that computes the same; its standardisation goes into the head."""
    model, head = probe.encoder, probe.head
    if isinstance(probe.norm, nn.BatchNorm1d):
        with torch.no_grad():
            head.weight /= (probe.norm.running_var + probe.norm.eps).sqrt()
            head.bias -= head.weight @ probe.norm.running_mean
    model.head = head
    return model.requires_grad_(True).eval()
