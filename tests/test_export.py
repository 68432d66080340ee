"""Exported models: as Hugging Face's, on its hub, under published names, and back."""

import copy
import json

import numpy as np
import pytest
import torch
from hub import local_hub
from videos import write_video

from clips.decoders import resolve_decoder
from clips.video import open_video
from modeling_finetune import create_classifier
from modeling_pretrain import create_pretrain_model
from probes import make_probe
from runs.checkpoints import save_checkpoint
from targets import create_target
from tools import export, predict
from tools.exporting.exported import read_model
from utils import SettingError
from weights.classifier import load_classifier
from weights.names import load_weights
from weights.native import Classifier, PretrainingModel
from weights.pretraining import load_pretrain_model

TINY, TINY_MAE_ST = "vit_tiny_patch8_64", "vit_tiny_mae_st_patch8_64"
PRETRAIN, PRETRAIN_MAE_ST = "pretrain_videomae_tiny_patch8_64", "pretrain_mae_st_tiny_patch8_64"
SMALL = {"num_frames": 4, "input_size": 32}
NAMES = ["climb", "jump", "run", "sit", "über"]
FLAGS = {"data_set": "custom", "sampling_rate": 2, "data_path": "/home/me/secret", "lr": 1e-3, "epochs": 3}


def shaken(model):
    """A model whose every parameter is random, so that each of them counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape)) if p.ndim == 1 else p.normal_(std=p[0].numel() ** -0.5)
    return model.eval()


def write(folder, settings, *, probe=None, **flags):
    """A checkpoint of a classifier (of a probe of it) or a pre-training model, and the model."""
    create = create_pretrain_model if settings["name"].startswith("pretrain") else create_classifier
    model = shaken(create(**settings))
    if probe:
        settings = {**settings, "probe": probe}
        model = shaken(make_probe(model, **probe))
        if probe.get("batch_norm"):
            model.norm.running_mean.normal_()
            model.norm.running_var.uniform_(0.5, 2)
    state = {"model": model.state_dict(), "model_settings": settings, "args": FLAGS | flags}
    save_checkpoint(folder / "checkpoint-2.pth", state)
    return folder / "checkpoint-2.pth", model


def run(checkpoint, folder, to, *more):
    export.main(["--model", str(checkpoint), "--output", str(folder), "--to", to, *map(str, more)])
    return folder


def labels(folder):
    (folder / "labels.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return folder / "labels.txt"


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- Hugging Face ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "probe"),
    [
        ({}, None),
        ({"mean_pooling": False}, None),
        ({"tubelet": 1}, None),
        ({}, {"kind": "linear"}),
        ({}, {"kind": "linear", "batch_norm": True}),
    ],
    ids=["mean", "first token", "tubelets of one frame", "probe", "probe with batch norm"],
)
def test_a_classifier_has_the_same_logits_there_and_back(tmp_path, settings, probe):
    transformers = pytest.importorskip("transformers")
    checkpoint, model = write(tmp_path, {"name": TINY, "num_classes": 5, **SMALL, **settings}, probe=probe)
    folder = run(checkpoint, tmp_path / "there", "huggingface", "--labels", labels(tmp_path))
    theirs, loading = transformers.VideoMAEForVideoClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    clip = torch.randn(3, 3, 4, 32, 32)
    with torch.inference_mode():
        expected, logits = model(clip), theirs(clip.transpose(1, 2)).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        back = load_weights(folder)
        torch.testing.assert_close(load_classifier(back)(clip), expected, rtol=0, atol=1e-5)
    assert list(back.class_names) == NAMES == [theirs.config.id2label[k] for k in range(5)]
    assert back.flags["sampling_rate"] == 2 and back.num_frames == 4 and back.flags["input_size"] == 32


def test_right_heads_for_each_size(tmp_path):
    """They follow from no shape, and those of ViT-S are not the library's defaults."""
    settings = {"name": "vit_small_patch16_224", "num_classes": 2, "num_frames": 2, "input_size": 16}
    config = json.loads((run(write(tmp_path, settings)[0], tmp_path, "huggingface") / "config.json").read_text())
    assert (config["num_attention_heads"], config["intermediate_size"], config["layer_norm_eps"]) == (6, 1536, 1e-6)
    settings = {"name": "pretrain_videomae_small_patch16_224", "num_frames": 2, "input_size": 32, "mask_type": "tube"}
    settings |= {"decoder_depth": 1, "mask_ratio": 0.5}
    config = json.loads((run(write(tmp_path, settings)[0], tmp_path, "huggingface") / "config.json").read_text())
    assert (config["num_attention_heads"], config["decoder_num_attention_heads"]) == (6, 3)
    assert config["decoder_hidden_size"] == 192 and config["decoder_num_hidden_layers"] == 1


@pytest.mark.parametrize("mask_type", ["adaptive", "tube"])
@pytest.mark.parametrize("normalize_target", [True, False])
def test_a_pretraining_model_has_the_same_predictions_and_loss_there(tmp_path, mask_type, normalize_target, capsys):
    transformers = pytest.importorskip("transformers")
    settings = {"name": PRETRAIN, "mask_type": mask_type, "mask_ratio": 0.75, "decoder_depth": 2, **SMALL}
    checkpoint, model = write(tmp_path, settings, normalize_target=normalize_target)
    folder = run(checkpoint, tmp_path / "there", "huggingface")
    assert ("sampler is left out" in capsys.readouterr().out) == (mask_type == "adaptive")
    theirs, loading = transformers.VideoMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixels = torch.rand(2, 3, 4, 32, 32)
    shown = transformers.VideoMAEImageProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (shown.image_mean, shown.image_std))
    clip, target = (pixels - mean) / std, create_target("pixels", patch=8, normalize=normalize_target)
    with torch.inference_mode():
        ours = model(clip)
        hidden = torch.zeros(2, 32, dtype=torch.bool).scatter(1, ours.masked, True)
        out = theirs(clip.transpose(1, 2), bool_masked_pos=hidden)
    torch.testing.assert_close(out.logits, ours.prediction, rtol=0, atol=1e-4)
    loss = target.error(ours.prediction, target(pixels, ours.masked)).mean()
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-5)
    back = load_pretrain_model(load_weights(folder))
    kept = {name: x for name, x in model.state_dict().items() if "probs" not in name}
    assert back.window == model.window and back.state_dict().keys() == kept.keys()
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in kept.items())


@pytest.mark.parametrize(
    ("settings", "probe", "words"),
    [
        ({"name": TINY_MAE_ST}, None, "no class token, no biased keys, no separable positions: --to native"),
        ({"name": TINY, "pos_embed": "learnable"}, None, "no learnable positions"),
        ({"name": TINY, "pos_embed": "sinusoid_3d"}, None, "no sinusoid_3d positions"),
        ({"name": TINY, "slot_pooling": True}, None, "no pooling of time slots"),
        ({"name": TINY}, {"kind": "attentive"}, "is an attentive probe, which only --to published can keep"),
        ({"name": PRETRAIN_MAE_ST}, None, "no class token, no biased keys"),
        ({"name": PRETRAIN, "target": "hog"}, None, "no target but the pixels"),
        ({"name": PRETRAIN, "target_settings": {"joint": True}}, None, "no target but the pixels"),
        ({"name": PRETRAIN, "dense_encoder": True}, None, "no dense encoder"),
    ],
)
def test_what_videomae_lacks_is_one_clear_error(tmp_path, settings, probe, words, capsys):
    classes = {} if settings["name"].startswith("pretrain") else {"num_classes": 3}
    checkpoint, _ = write(tmp_path, {**SMALL, **classes, **settings}, probe=probe)
    with pytest.raises(SystemExit, match=words) as caught:
        run(checkpoint, tmp_path / "there", "huggingface")
    assert str(caught.value).startswith(f"export.py: error: {checkpoint} ") and "\n" not in str(caught.value)


def trained_as(folder):
    args = predict.get_args_parser().parse_args(["--model", str(folder), "any.mp4"])
    return predict.load_trained(args, report=lambda text: None, headless=False)


def evaluation_clip(trained, frames):
    """What our evaluation's middle crop of uint8 frames (T,3,H,W) is to the model: (1,3,T,S,S)."""
    return trained.run(lambda pixels: pixels, trained.clips.make_crops(1)(frames)[0].transpose(0, 1)[None])


@pytest.mark.parametrize("imagenet", [True, False])
def test_the_preprocessor_gives_our_evaluations_clip(tmp_path, imagenet):
    """Equal where nothing is resized; a resize has antialias there."""
    transformers = pytest.importorskip("transformers")
    flags = {"imagenet_default_mean_and_std": imagenet, "short_side_size": 36, "input_size": 32}
    checkpoint, _ = write(tmp_path, {"name": TINY, "num_classes": 5, **SMALL}, **flags)
    folder = run(checkpoint, tmp_path / "there", "huggingface")
    processor = transformers.VideoMAEImageProcessor.from_pretrained(folder)
    for given in (checkpoint, folder):
        trained = trained_as(given)
        frames = torch.randint(256, (4, 3, 36, 49), dtype=torch.uint8)
        theirs = processor(list(frames), return_tensors="pt").pixel_values  # (1,T,3,S,S)
        torch.testing.assert_close(theirs.transpose(1, 2), evaluation_clip(trained, frames), rtol=0, atol=2e-6)
        smooth = torch.linspace(0, 255, 98).expand(4, 3, 72, 98).to(torch.uint8)  # no detail: antialias changes little
        theirs = processor(list(smooth), return_tensors="pt").pixel_values
        torch.testing.assert_close(
            theirs.transpose(1, 2), evaluation_clip(trained, smooth), rtol=0, atol=3 / 255 / 0.22
        )


@pytest.mark.parametrize("processor", ["image", "video"])
def test_the_pipeline_reads_a_real_video(tmp_path, processor):
    """By either processor, of which the library takes the newer one, for which it needs torchcodec."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("av")
    checkpoint, model = write(tmp_path, {"name": TINY, "num_classes": 5, **SMALL}, input_size=32)
    folder = run(checkpoint, tmp_path / "there", "huggingface", "--labels", labels(tmp_path))
    video = str(tmp_path / "a.mp4")
    write_video(tmp_path / "a.mp4", 16, size=(32, 44))  # of the clip's short side: nothing is resized
    pipeline = transformers.pipeline("video-classification", model=str(folder), device="cpu")
    if processor == "image":
        pipeline.video_processor = None
    else:
        try:
            resolve_decoder("torchcodec")
        except SettingError as error:
            pytest.skip(str(error))
    found = {row["label"]: row["score"] for row in pipeline(video, top_k=5)}
    with open_video(video, "pyav") as opened:
        every = evaluation_clip(trained_as(folder), opened.get_frames(np.arange(16)))[0]  # (3,16,S,S)
    seen = pipeline.preprocess(video)["pixel_values"][0]  # (T,3,S,S)
    taken = [int((every.transpose(0, 1) - frame).abs().amax((1, 2, 3)).argmin()) for frame in seen]
    spread = getattr(pipeline, "video_processor", None) is not None
    assert taken == ([0, 4, 8, 12] if spread else [0, 1, 2, 3])  # it samples in its own way
    torch.testing.assert_close(every[:, taken].transpose(0, 1), seen, rtol=0, atol=2e-6)
    with torch.inference_mode():
        scores = model(every[:, taken][None]).softmax(1)[0]
    assert [found[name] for name in NAMES] == pytest.approx(scores.tolist(), abs=1e-4)


# --- the hub's classes, published names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"name": PRETRAIN, "sampler": {"kind": "attention", "depth": 2}, "pos_embed": "sinusoid_3d"},
        {"name": PRETRAIN, "target": "hog", "mask_type": "random", "mask_ratio": 0.5},
        {"name": PRETRAIN_MAE_ST},
        {"name": TINY, "num_classes": 5, "slot_pooling": True, "pos_embed": "learnable"},
        {"name": TINY_MAE_ST, "num_classes": 5},
    ],
    ids=["AdaMAE", "VideoMAE", "MAE-ST", "classifier", "MAE-ST's classifier"],
)
@pytest.mark.parametrize("to", ["native", "published"])
def test_every_model_comes_back_whole(tmp_path, settings, to):
    pretraining = settings["name"].startswith("pretrain")
    checkpoint, model = write(tmp_path, {**SMALL, **settings}, normalize_target=False)
    folder = run(checkpoint, tmp_path / "there", to)
    found = load_weights(folder / "checkpoint.pth" if to == "published" else folder)
    assert found.tensors.keys() == model.state_dict().keys() and found.settings == {**SMALL, **settings}
    assert found.flags["sampling_rate"] == 2 and found.flags["normalize_target"] is False
    assert same_weights(model, (load_pretrain_model if pretraining else load_classifier)(found))
    if to == "native":
        kind = PretrainingModel if pretraining else Classifier
        loaded = kind.from_pretrained(folder, strict=True)
        assert same_weights(model, loaded) and not loaded.training and isinstance(loaded, type(model))
        assert same_weights(model, copy.deepcopy(loaded))
        clip = torch.randn(2, 3, 4, 32, 32)
        outputs = []
        for each in (model, loaded, load_back(loaded, tmp_path / "again")):
            torch.manual_seed(1)
            with torch.inference_mode():
                outputs.append(each(clip).prediction if pretraining else each(clip))
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def load_back(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_class_names_of_a_native_folder_label_predictions(tmp_path, capsys):
    checkpoint, _ = write(tmp_path, {"name": TINY, "num_classes": 5, **SMALL})
    folder = run(checkpoint, tmp_path / "there", "native", "--labels", labels(tmp_path))
    write_video(tmp_path / "a.mp4", 16, size=(32, 44))
    capsys.readouterr()
    predict.main(["--model", str(folder), str(tmp_path / "a.mp4"), "--json", "-", "--num_workers", "0"])
    top = json.loads(capsys.readouterr().out)["predictions"][0]["top"]
    assert {row["class"]: row["label"] for row in top} == dict(enumerate(NAMES))


# --- the card -------------------------------------------------------------------------------------------------


def test_the_card_tells_recipe_numbers_and_licence_and_no_paths(tmp_path):
    checkpoint, _ = write(tmp_path, {"name": TINY, "num_classes": 5, **SMALL}, finetune="/home/me/published.pth")
    (tmp_path / "test.json").write_text(
        json.dumps({"tested": "/home/me/checkpoint-2.pth", "top1": 81.234, "videos": 99})
    )
    for to in ("huggingface", "native", "published"):
        with pytest.raises(SystemExit, match=r"started from /home/me/published.pth: name its licence with --license"):
            run(checkpoint, tmp_path / to, to)
        folder = run(checkpoint, tmp_path / to, to, "--license", "cc-by-nc-4.0")
        text = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix in (".md", ".json"))
        assert "/home/me" not in text
        card = (folder / "README.md").read_text()
        assert "license: cc-by-nc-4.0\n" in card and "Training started from `published.pth`." in card
        assert "| top1 | 81.23 |" in card and "99 videos with checkpoint-2.pth" in card
        assert "| `--lr` | 0.001 |" in card and "| `--epochs` | 3 |" in card


def test_only_what_was_trained_here_has_a_licence_by_default(tmp_path):
    checkpoint, model = write(tmp_path, {"name": PRETRAIN, "mask_type": "tube", **SMALL})
    assert "license: mit\n" in (run(checkpoint, tmp_path / "ours", "native") / "README.md").read_text()
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "args": {"num_frames": 4, "input_size": 32}})
    for others in (tmp_path / "a.pth", tmp_path / "ours"):  # which may have come from anywhere
        with pytest.raises(SystemExit, match="doesn't say who trained it: name its licence with --license"):
            run(others, tmp_path / "there", "native")
        folder = run(others, tmp_path / "there", "native", "--license", "cc-by-nc-4.0")
        assert "license: cc-by-nc-4.0\n" in (folder / "README.md").read_text()
        assert same_weights(model, load_pretrain_model(load_weights(folder)))


def test_labels_must_be_those_of_the_classes(tmp_path):
    checkpoint, _ = write(tmp_path, {"name": TINY, "num_classes": 4, **SMALL})
    with pytest.raises(SystemExit, match="has 5 class names for 4 classes"):
        run(checkpoint, tmp_path / "there", "native", "--labels", labels(tmp_path))


# --- the hub --------------------------------------------------------------------------------------------------


def test_a_pushed_model_can_be_named(tmp_path, monkeypatch):
    checkpoint, model = write(tmp_path, {"name": PRETRAIN, **SMALL})
    monkeypatch.chdir(tmp_path)
    with local_hub(monkeypatch, tmp_path / "cache") as repositories:
        run(checkpoint, tmp_path / "there", "native", "--push", "me/adamae")
        assert set(repositories["me/adamae"]) == {"README.md", "config.json", "model.safetensors"}
        found = load_weights("me/adamae")
        assert same_weights(model, load_pretrain_model(found)) and str(found.path) == "me/adamae"
        assert same_weights(model, PretrainingModel.from_pretrained("me/adamae", cache_dir=tmp_path / "other"))
        PretrainingModel.from_pretrained(tmp_path / "there").push_to_hub("me/again")
        assert same_weights(model, load_pretrain_model(load_weights("me/again")))
        repositories["me/old"] = {"config.json": b"{}", "pytorch_model.bin": checkpoint.read_bytes()}
        assert same_weights(model, load_pretrain_model(load_weights("me/old")))
        assert same_weights(model, read_model("me/adamae", model_key="model", labels=None).model)
        with pytest.raises(
            SystemExit, match=r"^export.py: error: me/none: no such file or folder here, and it can't be"
        ):
            run("me/none", tmp_path / "there", "native")
        (tmp_path / "me").mkdir()
        save_checkpoint(tmp_path / "me" / "adamae", {"model": {"other.weight": torch.zeros(1)}})
        assert load_weights("me/adamae").tensors.keys() == {"other.weight"}  # a local path wins


def test_without_the_hub_a_name_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"^predict.py: error: org/name: no such file or folder here, and it can't .*\)$"
    ):
        predict.main(["--model", "org/name", "a.mp4"])
    checkpoint, _ = write(tmp_path, {"name": PRETRAIN, **SMALL})
    with pytest.raises(SystemExit, match=r"^export.py: error: --push org/name: the Hugging Face hub did not take it"):
        run(checkpoint, tmp_path / "there", "native", "--push", "org/name")


def test_a_damaged_config_is_named(tmp_path):
    checkpoint, _ = write(tmp_path, {"name": PRETRAIN, **SMALL})
    folder = run(checkpoint, tmp_path / "there", "native")
    (folder / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"there/config.json is damaged: "):
        run(folder, tmp_path / "more", "native")
