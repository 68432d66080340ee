"""Starting from other weights: pre-training from pre-trained and fine-tuned checkpoints."""

import pytest
import torch
from golden import cases, manifest, needs_golden, tensors, under
from programs import start
from safetensors.torch import save_file
from videos import write_list, write_videos

from modeling_finetune import Size, create_classifier
from modeling_pretrain import PretrainVisionTransformer, create_pretrain_model
from probes import make_probe
from run_mae_pretraining import main
from runs.checkpoints import CheckpointError, save_checkpoint
from weights.names import load_weights
from weights.pretraining import load_pretrain_model, load_pretraining_weights, trained_target

TINY = "pretrain_videomae_tiny_patch8_64"
SMALL = {"num_frames": 4, "input_size": 32, "mask_ratio": 0.75}


def pretrain_model(name=TINY, **settings) -> PretrainVisionTransformer:
    """A model whose every parameter is random, so that each of them shows whether it was loaded."""
    model = create_pretrain_model(name, **{**SMALL, "decoder_depth": 1, **settings})
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


def save(tmp_path, model, **more):
    save_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), **more})
    return tmp_path / "a.pth"


def begin(model, path, parts="all"):
    """Loads a file; returns the report, and the names whose values are those of before and those of the file."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_pretraining_weights(model, load_weights(path), parts=parts, report=lambda text: None)
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert kept == set(report.fresh) and before.keys() - kept == set(report.loaded)
    return report, kept


def assert_equal(model, source, names):
    theirs = source.state_dict()
    for name in names:
        assert torch.equal(model.state_dict()[name], theirs[name]), name


@pytest.mark.parametrize("mask_type", ["adaptive", "tube"])
def test_a_model_starts_as_another_one_ended(tmp_path, mask_type):
    source, model = pretrain_model(mask_type=mask_type), pretrain_model(mask_type=mask_type)
    report, kept = begin(model, save(tmp_path, source))
    assert not kept and report.ignored == report.notes == []
    assert_equal(model, source, source.state_dict())
    kind = "AdaMAE" if mask_type == "adaptive" else "VideoMAE"
    assert str(report).startswith(f"{tmp_path / 'a.pth'}: {kind} pre-training checkpoint\n  loaded: ")


@needs_golden
@pytest.mark.parametrize("name", [*cases("adamae_pretrain"), *cases("videomae_pretrain")])
@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_published_files(tmp_path, name, parts):
    config, published = manifest()["cases"][name]["config"], under("state", tensors(name))
    adaptive, grid = "encoder.pos_embed_probs" in published, config["img"] // config["patch"]
    model = PretrainVisionTransformer(
        size=Size(config["dim"], config["depth"], config["heads"], config["ddim"], config["dheads"]),
        patch=config["patch"],
        window=(config.get("num_frames", 16) // 2, grid, grid),
        target_width=len(published["decoder.head.bias"]),
        mask_type="adaptive" if adaptive else "tube",
        mask_ratio=config["ratio"],
        decoder_depth=config["ddepth"],
    )
    save_checkpoint(tmp_path / "a.pth", {"model": published, "epoch": 799})
    report = load_pretraining_weights(model, load_weights(tmp_path / "a.pth"), parts=parts, report=lambda text: None)
    loaded = {name for name in published if name in report.loaded}
    encoder = {name for name in published if name.startswith("encoder.") and "probs" not in name}
    assert loaded == (published.keys() if parts == "all" else encoder) == published.keys() - set(report.ignored)
    assert all(torch.equal(model.state_dict()[name], published[name]) for name in loaded)


@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_a_folder_of_hugging_face(tmp_path, parts):
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        **{"image_size": 32, "patch_size": 8, "num_frames": 4, "use_mean_pooling": False},
        **{"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
        **{"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        **{"decoder_intermediate_size": 256},
    )
    save_file(transformers.VideoMAEForPreTraining(config).state_dict(), tmp_path / "model.safetensors")
    model = pretrain_model(mask_type="tube")
    report = load_pretraining_weights(model, load_weights(tmp_path), parts=parts, report=lambda text: None)
    assert all(name.startswith(("decoder.", "encoder_to_decoder.", "mask_token")) for name in report.fresh)
    assert bool(report.fresh) == (parts == "encoder") and "VideoMAE pre-training" in report.source


@pytest.mark.parametrize(("theirs", "ours"), [("adaptive", "tube"), ("tube", "adaptive")])
def test_a_sampler_that_only_one_has_is_left_out_and_reported(tmp_path, theirs, ours):
    source, model = pretrain_model(mask_type=theirs), pretrain_model(mask_type=ours)
    report, kept = begin(model, save(tmp_path, source))
    sampler = {n for m in (source, model) for n in m.state_dict() if "probs" in n}
    assert set(report.ignored if theirs == "adaptive" else kept) == sampler
    assert_equal(model, source, model.state_dict().keys() - sampler)


def test_another_number_of_tokens_leaves_the_samplers_table_as_it_was(tmp_path):
    source, model = pretrain_model(), pretrain_model(num_frames=8)
    report, kept = begin(model, save(tmp_path, source))
    assert kept == {"encoder.pos_embed_probs"}
    shapes = "(1, 32, 128) in the file and (1, 64, 128) in the model"
    assert report.notes == [f"encoder.pos_embed_probs dropped: {shapes}"]


def test_another_target_leaves_the_decoders_head_as_it_was(tmp_path):
    source, model = pretrain_model(), pretrain_model()
    model.decoder.head = torch.nn.Linear(64, 7)
    report, kept = begin(model, save(tmp_path, source))
    assert kept == {"decoder.head.weight", "decoder.head.bias"}
    assert report.notes[0] == "decoder.head.weight dropped: (384, 64) in the file and (7, 64) in the model"


def features(network: str) -> dict:
    """A target as wide as pixels are in a token of these models."""
    return {"target": "features", "target_settings": {"width": 384, "network": network}}


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({}, {"target_settings": {"pred_t_dim": 4}}, ()),
        ({}, {"target_settings": {"joint": True}}, ("(2 of 2 frames, each channel,", "(2 of 2 frames, all channels,")),
        ({}, {"normalize_target": False}, ("each channel, normalised)", "each channel, raw)")),
        ({}, features("a"), ("pixels (", "features of the a (normalised)")),
        (features("a"), features("b"), ("features of the a", "features of the b")),
        (features("a"), features("a"), ()),
        (features("a"), {**features("a"), "target": "tokens"}, ("features of the a", "tokens of the a")),
        ({"target": "hog"}, {}, ("hog (normalised)", "pixels (")),
    ],
)
def test_another_target_is_told_even_where_the_heads_shape_fits(tmp_path, theirs, ours, words):
    settings = {"name": TINY, **SMALL, "decoder_depth": 1, **theirs}
    path = save(tmp_path, create_pretrain_model(**settings), model_settings=settings)
    target = trained_target({**SMALL, **ours}, ours, patch=8)
    report = load_pretraining_weights(pretrain_model(), load_weights(path), target=target, report=lambda text: None)
    told = [note for note in report.notes if note.startswith("target: trained with ")]
    assert len(told) == bool(words)
    if words:
        was, now = told[0].split(", this run has ")
        assert words[0] in was and words[1] in now


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dense_encoder": True}, 'encoder.mask_token"'),
        ({"pos_embed": "separable"}, 'Unexpected key.*"encoder.pos_embed_spatial"'),
        ({"sampler": {"kind": "mlp"}}, "Missing key.*get_token_probs"),
    ],
)
def test_a_file_without_settings_that_its_shapes_do_not_show_is_one_line(tmp_path, settings, words):
    source = create_pretrain_model(TINY, **SMALL, decoder_depth=1, **settings)
    path = save(tmp_path, source, args={"num_frames": 4, "input_size": 32})
    with pytest.raises(CheckpointError, match=words) as caught:
        load_pretrain_model(load_weights(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["pre-training", "classifier", "first token", "probe"])
def test_the_encoder_alone(tmp_path, kind):
    """From a deeper and wider decoder, or from a classifier of ours; the norm of a mean is none of tokens."""
    if kind == "pre-training":
        source = pretrain_model(decoder_depth=3, mask_type="random")
        encoder, norm = source.encoder, True
    else:
        source = encoder = create_classifier(
            "vit_tiny_patch8_64", num_classes=3, num_frames=4, input_size=32, mean_pooling=kind != "first token"
        )
        norm = kind == "first token"
        source = make_probe(source, kind="linear") if kind == "probe" else source
    model = pretrain_model()
    report, _ = begin(model, save(tmp_path, source), parts="encoder")
    encoders = {n for n in model.state_dict() if n.startswith(("encoder.patch_embed", "encoder.blocks"))}
    norms = {"encoder.norm.weight", "encoder.norm.bias"} if norm else set()
    assert set(report.loaded) == encoders | norms
    theirs = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    assert all(torch.equal(model.state_dict()[name], theirs[name]) for name in encoders | norms)


def test_other_positions_are_noted(tmp_path):
    settings = {"name": TINY, "pos_embed": "sinusoid_3d", **SMALL, "decoder_depth": 1}
    path = save(tmp_path, create_pretrain_model(**settings), model_settings=settings)
    report, _ = begin(pretrain_model(), path)
    assert report.notes == ["positions: trained with sinusoid_3d, this model has sinusoid_1d"]


ADVICE = "; --finetune_parts encoder takes the encoder alone"


@pytest.mark.parametrize(
    ("source", "parts", "words"),
    [
        (lambda: pretrain_model("pretrain_videomae_small_patch16_224"), "all", "width 384, 12 blocks, patch 16"),
        (lambda: create_classifier("vit_base_patch16_224", num_classes=3), "encoder", "width 768, 12 blocks, patch 16"),
        (lambda: create_classifier("vit_tiny_mae_st_patch8_64", num_classes=3), "encoder", "MAE-ST classifier"),
        (lambda: create_classifier("vit_tiny_patch8_64", num_classes=3), "all", "mask_token is not in the file"),
        (lambda: pretrain_model(decoder_depth=2), "all", "decoder.blocks.1.norm1.weight is not in the model"),
        (lambda: pretrain_model(sampler={"width": 64}), "all", "encoder.get_token_probs.0."),
        (lambda: pretrain_model(sampler={"kind": "mlp"}), "all", "encoder.get_token_probs."),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "encoder", "no checkpoint of a known video ViT"),
    ],
    ids=["width", "patch", "MAE-ST", "no decoder", "decoder", "sampler's width", "sampler's kind", "no ViT"],
)
def test_what_does_not_fit_is_one_line_and_loads_nothing(tmp_path, source, parts, words):
    model = pretrain_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_pretraining_weights(model, load_weights(save(tmp_path, source())), parts=parts)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.pth'}: ") and words in message and "\n" not in message
    fits_the_encoder = words.startswith(("decoder.", "encoder.get", "mask_token"))
    assert message.endswith(ADVICE) == fits_the_encoder
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the program --------------------------------------------------------------------------------------------

RUN = [
    *("--model", TINY, "--input_size", "32", "--mask_ratio", "0.9", "--num_frames", "4", "--decoder_depth", "1"),
    *("--batch_size", "4", "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.05", "--sampling_rate", "1"),
    *("--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav"),
    *("--save_ckpt_freq", "1", "--vis_freq", "0"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_list(folder / "list.csv", *(f"{name} 0" for name in write_videos(folder, 4 * [8], size=(40, 48))))
    return folder / "list.csv"


def pretrain(videos, output, *flags):
    return start(main, *RUN, "--data_path", videos, "--output_dir", output, *flags)


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_a_run_starts_from_a_file_and_resumes_from_its_own(videos, tmp_path):
    source, other = save(tmp_path, pretrain_model()), tmp_path / "other.pth"
    save_checkpoint(other, {"model": pretrain_model().state_dict()})
    frozen = pretrain(videos, tmp_path / "frozen", "--finetune", source, "--lr", "0", "--min_lr", "0")
    assert frozen.returncode == 0 and f"{source}: AdaMAE pre-training checkpoint\n  loaded: " in frozen.stdout
    assert "target: trained with" not in frozen.stdout
    after = weights(tmp_path / "frozen" / "checkpoint-1.pth")
    assert all(torch.equal(value, after[name]) for name, value in weights(source).items())

    straight = pretrain(videos, tmp_path / "a", "--finetune", source)
    assert straight.returncode == 0, straight.stderr
    expected = weights(tmp_path / "a" / "checkpoint-1.pth")
    (tmp_path / "a" / "checkpoint-1.pth").unlink()
    resumed = pretrain(videos, tmp_path / "a", "--finetune", other)
    assert "1 of 2 epochs are done" in resumed.stdout and f"--finetune {source} -> {other}" in resumed.stdout
    again = weights(tmp_path / "a" / "checkpoint-1.pth")
    assert all(torch.equal(value, again[name]) for name, value in expected.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--finetune", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (["--finetune", "SOURCE", "--decoder_depth", "2"], "decoder.blocks.1.norm1.weight is not in the file"),
    ],
)
def test_a_wrong_file_is_one_line(videos, tmp_path, flags, words):
    source = save(tmp_path, pretrain_model())
    done = pretrain(videos, "", *(str(source) if flag == "SOURCE" else flag for flag in flags))
    assert done.returncode == 1 and words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
