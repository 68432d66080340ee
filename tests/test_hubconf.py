"""torch.hub finds the models, and loads checkpoints."""

import importlib.metadata
import re

import torch
from golden import ROOT

import hubconf
from modeling_finetune import CLASSIFIERS, create_classifier
from modeling_pretrain import PRETRAIN_MODELS, create_pretrain_model
from runs.checkpoints import save_checkpoint

SMALL = {"num_frames": 4, "input_size": 32}


def load(*names, **settings):
    return torch.hub.load(str(ROOT), *names, source="local", **settings)


def test_every_model_is_an_entry_point_with_a_description():
    entries = {
        name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")
    }  # hub.list
    assert entries == {*CLASSIFIERS, *PRETRAIN_MODELS, "classifier", "pretraining_model"}
    assert all(getattr(hubconf, name).__doc__ for name in entries)
    assert "Builds a model of `PRETRAIN_MODELS`" in hubconf.pretrain_videomae_base_patch16_224.__doc__


def test_models_and_checkpoints_load(tmp_path):
    assert load("vit_tiny_patch8_64", num_classes=3, **SMALL).head.out_features == 3
    assert load("pretrain_mae_st_tiny_patch8_64", decoder_depth=1, **SMALL).decoder.blocks[0]
    for entry, create, settings in (
        ("classifier", create_classifier, {"name": "vit_tiny_patch8_64", "num_classes": 3, **SMALL}),
        ("pretraining_model", create_pretrain_model, {"name": "pretrain_videomae_tiny_patch8_64", **SMALL}),
    ):
        model = create(**settings)
        save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "model_settings": settings})
        loaded = load(entry, str(tmp_path / "a.pth"))
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
        assert not loaded.training


def test_dependencies_are_pinned_and_all_there():
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    assert set(hubconf.dependencies) <= set(pinned)
    assert all(importlib.metadata.version(name) for name in hubconf.dependencies)
