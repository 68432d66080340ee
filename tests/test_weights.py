"""Weights of every known kind of file into a classifier: exactly what fits, and nothing silently else."""

import argparse
from pathlib import Path

import pytest
import torch
from golden import cases, manifest, needs_golden, tensors, under
from safetensors.torch import save_file

from modeling_blocks import TUBELET
from modeling_finetune import CLASSIFIERS, Size, VisionTransformer, create_classifier
from modeling_pretrain import create_pretrain_model
from probes import make_probe
from runs.checkpoints import CheckpointError, save_checkpoint
from weights.classifier import classifier_settings, group_names, load_classifier, load_classifier_weights
from weights.names import Weights, load_weights
from weights.positions import resize_positions

TINY = "vit_tiny_patch8_64"
TINY_MAE_ST = "vit_tiny_mae_st_patch8_64"
SMALL = {"num_frames": 4, "input_size": 32}


def quiet(text: str) -> None:
    pass


def load_into(model, path, *, report=print, **place):
    return load_classifier_weights(model, load_weights(path, **place), report)


def rebuild(path, **changes):
    return load_classifier(load_weights(path), **changes)


def classifier(name=TINY, num_classes=5, **settings):
    """A classifier whose every parameter is random, so that each of them shows whether it was loaded."""
    model = create_classifier(name, num_classes=num_classes, **{**SMALL, **settings})
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model.eval()


def mae_st_pretrain_weights(model):
    """What a pre-training checkpoint of MAE-ST holds for the encoder of a classifier."""
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    return {**encoder, "mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(64, 128)}


def save(tmp_path, state, name="a.pth"):
    save_checkpoint(tmp_path / name, state)
    return tmp_path / name


# --- against the published code -----------------------------------------------------------------------------


def golden_classifier(name, state, num_classes, **settings):
    config = manifest()["cases"][name]["config"]
    blocks = {k.split("blocks.")[1].split(".")[0] for k in state if "blocks." in k and "decoder" not in k}
    grid = config["img"] // config["patch"]
    size = Size(config["dim"], len(blocks), config["heads"], 0, 0)
    return VisionTransformer(
        size=size, patch=config["patch"], window=(8, grid, grid), num_classes=num_classes, **settings
    )


def assert_equal_weights(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@needs_golden
@pytest.mark.parametrize("name", cases("finetune_mapping"))
def test_golden_pretrained_into_classifier(name, tmp_path):
    e1 = under("e1", tensors(name))
    weights, fresh, result = under("ckpt", e1), under("init", e1), under("result", e1)
    stated = manifest()["cases"][name]["subcases"]["e1"]["official_messages_paraphrase"]
    weights |= {k: torch.zeros(1) for k in stated["unused_from_ckpt"] if k not in weights}  # the decoder
    model = golden_classifier(name, weights, len(fresh["head.weight"]))
    model.load_state_dict(fresh, strict=False)
    report = load_into(model, save(tmp_path, {"model": weights}), report=quiet)
    assert_equal_weights(model, result)
    assert sorted(report.fresh) == sorted(stated["not_initialised"])
    assert sorted(report.ignored) == sorted(stated["unused_from_ckpt"])
    assert sorted(report.loaded) == sorted(result.keys() - set(report.fresh))


@needs_golden
@pytest.mark.parametrize("name", cases("finetune_mapping"))
@pytest.mark.parametrize("form", ["module", "backbone."])
def test_golden_classifier_into_other_classes(name, form, tmp_path):
    """The head of other classes is dropped, everything else equals the checkpoint."""
    numbers = tensors(name)
    result, head, fresh = under("e1.result", numbers), under("e2.ckpt", numbers), under("e2.init", numbers)
    weights = {**result, **head}
    model = golden_classifier(name, weights, len(fresh["head.weight"]))
    model.load_state_dict(fresh, strict=False)
    state = {f"backbone.{k}": v for k, v in weights.items()} if form == "backbone." else {"module": weights}
    report = load_into(model, save(tmp_path, state), report=quiet)
    assert_equal_weights(model, {**weights, **fresh})
    assert sorted(report.fresh) == ["head.bias", "head.weight"]
    prefix = form if form == "backbone." else ""
    assert sorted(report.ignored) == [f"{prefix}head.bias", f"{prefix}head.weight"]
    assert len(report.notes) == 2 and all(" dropped: " in note for note in report.notes)


@needs_golden
@pytest.mark.parametrize("name", cases("finetune_mapping"))
def test_golden_table_of_positions(name, tmp_path):
    e4, weights = under("e4", tensors(name)), under("e1.result", tensors(name))
    config, old, new = manifest()["cases"][name]["config"], e4["pos_embed_ckpt"], e4["pos_embed_result"]
    slots = old.shape[1] // manifest()["cases"][name]["subcases"]["e4"]["g"] ** 2
    grid = int((new.shape[1] // slots) ** 0.5)
    model = VisionTransformer(
        size=Size(config["dim"], 1, config["heads"], 0, 0),
        patch=config["patch"],
        window=(slots, grid, grid),
        num_classes=len(weights["head.weight"]),
        pos_embed="learnable",
    )
    path = save(tmp_path, {**weights, "pos_embed": old})
    report = load_into(model, path, report=quiet)
    torch.testing.assert_close(model.pos_embed.data, new, rtol=0, atol=1e-6)
    assert report.fresh == [] and len(report.notes) == 1


@needs_golden
@pytest.mark.parametrize("name", cases("mae_st_finetune"))
@pytest.mark.parametrize("key", ["model", "model_state"])
def test_golden_mae_st_into_classifier(name, key, tmp_path):
    case, numbers = manifest()["cases"][name], tensors(name)
    pretrain = tensors(name.replace("finetune", "pretrain"))
    weights, head = under("state", pretrain), under("state", numbers)
    family = {"class_token": True, "separate_qkv": True, "encoder_norm": True, "pos_embed": "separable"}
    model = golden_classifier(name, weights, case["config"]["classes"], **family)
    report = load_into(model, save(tmp_path, {key: weights}), report=quiet)
    assert report.fresh == case["missing_keys"]
    assert sorted(report.ignored) == sorted(case["unexpected_keys"])
    model.load_state_dict(head, strict=False)
    logits = model.eval()(pretrain["in.clip"])
    assert (logits - numbers["out.logits"]).abs().max() < 1e-4 * numbers["out.logits"].abs().max()


# --- kinds of files -----------------------------------------------------------------------------------------


def as_file(form, model, tmp_path):
    """The path of a classifier's weights in one of the forms they come in."""
    weights = model.state_dict()
    slowfast = {k.replace("head.", "head.projection."): v for k, v in weights.items()}
    forms = {
        "model": {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "bare": weights,
        "backbone": {f"backbone.{k}": v for k, v in weights.items()},
        "parallel": {"model": {f"module.{k}": v for k, v in weights.items()}},
        "pyslowfast": {"model_state": slowfast, "cfg": "NUM_GPUS: 8"},
        "half": {"module": {k: v.bfloat16() for k, v in weights.items()}},
    }
    if form == "safetensors":
        save_file(weights, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"
    if form == "deepspeed":
        state = {"module": weights, "ds_version": "0.1", "param_shapes": [{"w": torch.Size([1])}]}
        save(tmp_path / "checkpoint-9", state, "mp_rank_00_model_states.pt")
        return tmp_path / "checkpoint-9"
    return save(tmp_path, forms[form])


FORMS = ["model", "bare", "backbone", "parallel", "pyslowfast", "safetensors", "deepspeed", "half"]


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_from_every_form_of_file(name, form, tmp_path):
    source, model = classifier(name), classifier(name)
    report = load_into(model, as_file(form, source, tmp_path), report=quiet)
    kind = torch.bfloat16 if form == "half" else torch.float32
    assert_equal_weights(model, {k: v.to(kind).float() for k, v in source.state_dict().items()})
    assert report.fresh == report.ignored == report.notes == []
    assert report.source.endswith(f"{'VideoMAE' if name == TINY else 'MAE-ST'} classifier checkpoint")


@pytest.mark.parametrize(("mask_type", "kind"), [("adaptive", "AdaMAE"), ("tube", "VideoMAE")])
def test_a_pretraining_encoder_of_ours(tmp_path, capsys, mask_type, kind):
    source = create_pretrain_model("pretrain_videomae_tiny_patch8_64", mask_type=mask_type, **SMALL)
    path, model = save(tmp_path, {"model": source.state_dict()}), classifier()
    head = model.head.weight.clone()
    report = load_into(model, path)
    assert torch.equal(model.blocks[3].attn.qkv.weight, source.encoder.blocks[3].attn.qkv.weight)
    assert torch.equal(model.head.weight, head)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: {kind} pre-training checkpoint\n  loaded: 54 tensors\n")
    assert "freshly initialised: fc_norm.* (2), head.* (2)\n" in printed
    assert "decoder.* (" in printed and "encoder.norm.* (2)" in printed and "mask_token" in printed
    assert len(report.loaded) + len(report.fresh) == len(model.state_dict())


def test_the_moving_average_is_another_key(tmp_path):
    straight, average, model = classifier(), classifier(), classifier()
    state = {"model": straight.state_dict(), "model_ema": average.state_dict()}
    load_into(model, save(tmp_path, state), model_key="model_ema", report=quiet)
    assert_equal_weights(model, average.state_dict())


def test_names_are_grouped_by_part():
    names = ["decoder.blocks.0.norm1.weight", "decoder.head.bias", "encoder.norm.weight", "mask_token"]
    assert group_names(names) == "decoder.* (2), encoder.norm.* (1), mask_token"
    assert group_names([]) == "-"


@pytest.mark.parametrize("mean_pooling", [True, False])
@pytest.mark.parametrize("published_names", [True, False])
def test_huggingface_classifier(tmp_path, mean_pooling, published_names):
    """The logits are equal; the files on their hub name the biases otherwise than the library."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        layer_norm_eps=1e-6,
        use_mean_pooling=mean_pooling,
        num_labels=5,
        initializer_range=0.2,
    )
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    weights = theirs.state_dict()
    if published_names:
        weights = {k.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): v for k, v in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    model = rebuild(tmp_path, report=quiet, **SMALL)
    clip = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(model(clip), theirs(clip.transpose(1, 2)).logits, rtol=1e-4, atol=1e-4)


# --- what does not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "model", "words"),
    [
        (
            {"name": "vit_small_patch16_224"},
            {},
            r"VideoMAE classifier checkpoint \(width 384, 12 blocks, patch 16\) does not fit .* "
            r"\(width 128, 4 blocks, patch 8\): patch_embed\.proj\.weight is \(384, 3, 2, 16, 16\) "
            r"in the file and \(128, 3, 2, 8, 8\) in the model, and \d+ more",
        ),
        ({"tubelet": 1}, {}, r"patch_embed\.proj\.weight is \(128, 3, 1, 8, 8\) in the file and \(128, 3, 2, 8, 8\)"),
        ({"name": TINY_MAE_ST}, {}, r"MAE-ST classifier .* does not fit the VideoMAE classifier"),
        ({}, {"name": TINY_MAE_ST}, r"VideoMAE classifier .* does not fit the MAE-ST classifier"),
        ({"pos_embed": "learnable"}, {}, r": pos_embed is not in the model$"),
    ],
    ids=["width", "tubelet", "MAE-ST", "not MAE-ST", "table"],
)
def test_another_architecture_is_one_clear_error(tmp_path, source, model, words):
    path, model = save(tmp_path, {"model": classifier(**source).state_dict()}), classifier(**model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        load_into(model, path, report=quiet)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert_equal_weights(model, before)


def test_a_learned_table_starts_fresh_where_positions_were_fixed(tmp_path):
    source, model = classifier(), classifier(pos_embed="learnable")
    start = model.pos_embed.detach().clone()
    report = load_into(model, save(tmp_path, {"model": source.state_dict()}), report=quiet)
    assert report.fresh == ["pos_embed"] and torch.equal(model.pos_embed, start)
    stated = {"model": source.state_dict(), "model_settings": {"pos_embed": "learnable"}}  # but has lost it
    with pytest.raises(CheckpointError, match=r": pos_embed is not in the file$"):
        load_into(model, save(tmp_path, stated), report=quiet)


@pytest.mark.parametrize("more", [True, False])
def test_another_depth_is_an_error(tmp_path, more):
    weights = classifier().state_dict()
    block = {k: v for k, v in weights.items() if k.startswith("blocks.3.")}
    if more:
        weights |= {k.replace("blocks.3.", "blocks.4."): v for k, v in block.items()}
        words = r"5 blocks.*: blocks\.4\.\S* is not in the model, and 12 more$"
    else:
        weights = {k: v for k, v in weights.items() if k not in block}
        words = r"3 blocks.*: blocks\.3\.\S* is not in the file, and 12 more$"
    with pytest.raises(CheckpointError, match=words):
        load_into(classifier(), save(tmp_path, weights), report=quiet)


def test_one_weight_of_another_shape_is_named(tmp_path):
    weights = {**classifier().state_dict(), "fc_norm.bias": torch.zeros(64)}
    with pytest.raises(CheckpointError, match=r": fc_norm\.bias is \(64,\) in the file and \(128,\) in the model$"):
        load_into(classifier(), save(tmp_path, weights), report=quiet)


def test_a_head_of_other_classes_is_reported(tmp_path):
    model, path = classifier(num_classes=7), save(tmp_path, classifier(num_classes=5).state_dict())
    head, lines = model.head.weight.clone(), []
    report = load_into(model, path, report=lines.append)
    assert torch.equal(model.head.weight, head) and report.fresh == report.ignored == ["head.weight", "head.bias"]
    assert "head.weight dropped: (5, 128) in the file and (7, 128) in the model" in lines[0]


def test_a_file_of_another_model_is_refused(tmp_path):
    path = save(tmp_path, {"model": {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}})
    for load in (lambda: load_into(classifier(), path), lambda: rebuild(path)):
        with pytest.raises(CheckpointError, match=r"no checkpoint of a known video ViT \(it holds conv1\.weight, "):
            load()


# --- position tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [((4, 3, 3), (8, 3, 3)), ((4, 3, 3), (4, 6, 6)), ((2, 4, 4), (5, 7, 7))])
def test_resizing_keeps_what_does_not_vary(old, new):
    """A table constant in time or in space stays so, and its values."""
    slots, slices = torch.randn(old[0], 1, 1, 6), torch.randn(1, *old[1:], 6)
    in_time = resize_positions(slots.expand(*old, 6).flatten(0, 2)[None], old, new).view(*new, 6)
    in_space = resize_positions(slices.expand(*old, 6).flatten(0, 2)[None], old, new).view(*new, 6)
    torch.testing.assert_close(in_time, in_time[:, :1, :1].expand_as(in_time))
    torch.testing.assert_close(in_space, in_space[:1].expand_as(in_space))
    if old[0] == new[0]:
        torch.testing.assert_close(in_time[:, 0, 0], slots[:, 0, 0])
    if old[1:] == new[1:]:
        torch.testing.assert_close(in_space[0], slices[0])


def test_time_is_resized_linearly():
    """Twice the slots: a ramp stays a ramp with half the step, but for the ends, which repeat."""
    ramp = torch.arange(4.0).view(1, 4, 1)
    resized = resize_positions(ramp, (4, 1, 1), (8, 1, 1)).flatten()
    torch.testing.assert_close(resized, (torch.arange(8) / 2 - 0.25).clamp(0, 3))


def test_mae_st_tables_follow_frames_and_pixels(tmp_path):
    source, model = classifier(TINY_MAE_ST), classifier(TINY_MAE_ST, num_frames=8, input_size=64)
    path = save(tmp_path, {"model": mae_st_pretrain_weights(source)})
    report = load_into(model, path, report=quiet)
    spatial = resize_positions(source.pos_embed_spatial.data, (1, 4, 4), (1, 8, 8))
    temporal = resize_positions(source.pos_embed_temporal.data, (2, 1, 1), (4, 1, 1))
    assert torch.equal(model.pos_embed_spatial, spatial) and torch.equal(model.pos_embed_temporal, temporal)
    assert torch.equal(model.pos_embed_class, source.pos_embed_class)
    assert report.fresh == ["head.weight", "head.bias"] and report.ignored == ["mask_token", "decoder_embed.weight"]
    assert report.notes == [
        "pos_embed_spatial resized from 1x4x4 to 1x8x8 tokens",
        "pos_embed_temporal resized from 2x1x1 to 4x1x1 tokens",
    ]


def test_a_table_that_is_no_square_is_named_with_both_shapes(tmp_path):
    weights = {**classifier(TINY_MAE_ST).state_dict(), "pos_embed_spatial": torch.zeros(1, 32, 128)}
    words = r": pos_embed_spatial is \(1, 32, 128\) in the file and \(1, 16, 128\) in the model$"
    with pytest.raises(CheckpointError, match=words):
        load_into(classifier(TINY_MAE_ST), save(tmp_path, weights), report=quiet)


@pytest.mark.parametrize("stated", [True, False])
def test_a_joint_table_keeps_the_row_of_the_class_token(tmp_path, stated):
    joint = {"name": TINY_MAE_ST, "pos_embed": "learnable", "num_frames": 8}
    source, model = classifier(**joint), classifier(**{**joint, "input_size": 64})
    state = {"model": source.state_dict(), **({"args": argparse.Namespace(num_frames=8)} if stated else {})}
    load_into(model, save(tmp_path, state), report=quiet)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(model.pos_embed[:, 1:], resize_positions(source.pos_embed[:, 1:], (4, 4, 4), (4, 8, 8)))


def test_the_file_states_the_window_of_a_joint_table(tmp_path):
    """4 x 4 x 4 positions and 1 x 8 x 8 are as many; the flags in the file decide."""
    source = classifier(pos_embed="learnable", num_frames=8)
    model = classifier(pos_embed="learnable", num_frames=2, input_size=64)
    state = {"model": source.state_dict(), "args": argparse.Namespace(num_frames=8)}
    report = load_into(model, save(tmp_path, state), report=quiet)
    assert report.notes == ["pos_embed resized from 4x4x4 to 1x8x8 tokens"]


def test_a_joint_table_of_more_frames_only(tmp_path):
    source, model = classifier(pos_embed="learnable"), classifier(pos_embed="learnable", num_frames=6)
    load_into(model, save(tmp_path, source.state_dict()), report=quiet)
    assert torch.equal(model.pos_embed, resize_positions(source.pos_embed, (2, 4, 4), (3, 4, 4)))


def test_other_fixed_positions_are_noted(tmp_path):
    settings = {"name": "pretrain_videomae_tiny_patch8_64", "pos_embed": "sinusoid_3d", **SMALL}
    source = create_pretrain_model(**settings)
    path = save(tmp_path, {"model": source.state_dict(), "model_settings": settings})
    report = load_into(classifier(), path, report=quiet)
    assert report.notes == ["positions: trained with sinusoid_3d, this model has sinusoid_1d"]
    assert rebuild(path, headless=True, report=quiet).pos_kind == "sinusoid_3d"


# --- rebuilding ---------------------------------------------------------------------------------------------


def clip_for(model):
    t, h, w = model.window
    return torch.randn(2, 3, t * TUBELET, h * model.patch, w * model.patch)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": TINY},
        {"name": TINY, "mean_pooling": False, "pos_embed": "sinusoid_3d"},
        {"name": TINY_MAE_ST, "fc_drop": 0.5},
    ],
)
def test_our_classifier_is_rebuilt(tmp_path, settings):
    source = classifier(**settings)
    stated = {**SMALL, **settings, "num_classes": 5}
    path = save(tmp_path, {"model": source.state_dict(), "model_settings": stated})
    clip = clip_for(source)
    model = rebuild(path, report=quiet)
    assert torch.equal(model(clip), source(clip)) and not model.training
    features = rebuild(path, headless=True, report=quiet)(clip)
    assert torch.equal(features, source.forward_pooled(clip))
    longer = rebuild(path, num_frames=8, report=quiet)
    assert longer.window == (4, 4, 4) and torch.equal(longer.head.weight, source.head.weight)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_our_probe_is_rebuilt(tmp_path, kind):
    probe = make_probe(classifier(), kind=kind, batch_norm=True).eval()
    stated = {"name": TINY, "num_classes": 5, **SMALL, "probe": {"kind": kind, "batch_norm": True}}
    path = save(tmp_path, {"model": probe.state_dict(), "model_settings": stated})
    clip = clip_for(probe)
    assert torch.equal(rebuild(path, report=quiet)(clip), probe(clip))
    features = rebuild(path, headless=True, report=quiet)(clip)
    assert torch.equal(features, probe.forward_pooled(clip))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": TINY},
        {"name": TINY, "mean_pooling": False},
        {"name": TINY, "pos_embed": "learnable"},
        {"name": TINY, "tubelet": 1},
        {"name": TINY_MAE_ST},
        {"name": TINY_MAE_ST, "pos_embed": "learnable"},
    ],
)
def test_a_published_classifier_is_rebuilt(tmp_path, settings):
    """No settings of ours in the file, but its shapes and the flags of its run."""
    source = classifier(**settings)
    flags = argparse.Namespace(num_frames=4, num_segments=1, input_size=32, model="of another code")
    model = rebuild(save(tmp_path, {"model": source.state_dict(), "args": flags}), report=quiet)
    assert_equal_weights(model, source.state_dict())
    clip = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(model(clip), source(clip))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_size_follows_from_its_shapes(name):
    with torch.device("meta"):
        state = create_classifier(name, num_classes=7).state_dict()
        found = Weights(path=Path("a.pth"), tensors=state, settings={}, flags={}, ignored=[])
        again = create_classifier(**classifier_settings(found)).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in again.items()}


def test_without_flags_it_is_16_frames_and_the_pixels_of_the_name(tmp_path):
    model = rebuild(save(tmp_path, classifier().state_dict()), report=quiet)
    assert model.window == (8, 8, 8)
    model = rebuild(save(tmp_path, classifier(TINY_MAE_ST).state_dict()), report=quiet)
    assert model.window == (2, 4, 4)  # as its tables show


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
def test_a_pretraining_checkpoint_has_features_but_no_classes(tmp_path, name):
    source = classifier(name)
    if name == TINY:
        pretrain = create_pretrain_model("pretrain_videomae_tiny_patch8_64", **SMALL)
        weights, encoder = pretrain.state_dict(), pretrain.encoder
    else:
        weights, encoder = mae_st_pretrain_weights(source), source
    path = save(tmp_path, {"model": weights, "args": argparse.Namespace(num_frames=4, input_size=32)})
    with pytest.raises(CheckpointError, match=r"pre-training checkpoint, which has no classifier: fine-tune it first"):
        rebuild(path, report=quiet)
    model = rebuild(path, headless=True, report=quiet)
    assert model(clip_for(model)).shape == (2, 128)
    assert torch.equal(model.patch_embed.proj.weight, encoder.patch_embed.proj.weight)
    assert rebuild(path, num_classes=9, report=quiet).head.weight.shape == (9, 128)


def test_a_width_that_no_model_has_is_refused(tmp_path):
    size = Size(dim=48, depth=2, heads=4, decoder_dim=0, decoder_heads=0)
    odd = VisionTransformer(size=size, patch=8, window=(2, 2, 2), num_classes=3)
    path = save(tmp_path, odd.state_dict())
    with pytest.raises(CheckpointError, match=r"no known classifier is .* of width 48, 2 blocks, patch 8"):
        rebuild(path, report=quiet)
