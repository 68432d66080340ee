"""MAE-ST's pre-training model and target against the published implementation's numbers, and their own properties."""

import json

import pytest
import torch
from golden import cases, needs_golden, tensors, under
from golden import manifest as golden_manifest
from programs import start
from videos import write_list, write_videos

import run_class_finetuning
from augment import COLOUR_STATISTICS, normalize
from modeling_finetune import Size, create_classifier
from modeling_pretrain import MAE_ST, PRETRAIN_MODELS, PretrainVisionTransformer, create_pretrain_model
from pictures.reconstruction import predict_all
from probes import build_classifier
from run_mae_pretraining import main
from runs.checkpoints import save_checkpoint
from targets import create_target
from utils import SettingError
from weights.classifier import load_classifier_weights
from weights.names import load_weights
from weights.pretraining import load_pretrain_model, load_pretraining_weights

TINY = "pretrain_mae_st_tiny_patch8_64"


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def of_case(config: dict, state: dict, normalized: bool = True):
    """The model and the target of a golden case, with its weights."""
    grid, slots = config["img"] // config["patch"], config["num_frames"] // config["t_patch"]
    shape = {"patch": config["patch"], "num_frames": config["num_frames"], "pred_t_dim": config["pred_t_dim"]}
    target = create_target("pixels", normalize=normalized, joint=True, **shape)
    settings = MAE_ST.settings | {
        "pos_embed": "separable" if config["sep"] else "learnable",
        "class_token": config["cls"],
    }
    model = PretrainVisionTransformer(
        size=Size(config["dim"], config["depth"], config["heads"], config["ddim"], config["dheads"]),
        patch=config["patch"],
        window=(slots, grid, grid),
        target_width=target.width,
        mask_type="agnostic",
        mask_ratio=config["ratio"],
        decoder_depth=config["ddepth"],
        **settings,
    )
    model.load_state_dict(state)
    return model.eval(), target


def pixels_of(clip: torch.Tensor) -> torch.Tensor:
    """Undoes the normalisation of the model's input."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in COLOUR_STATISTICS["mae_st"])
    return clip * std + mean


@needs_golden
@pytest.mark.parametrize("name", cases("mae_st_pretrain"))
def test_mae_st_equals_the_published_code(name):
    config, golden = golden_manifest()["cases"][name]["config"], tensors(name)
    model, target = of_case(config, under("state", golden))
    assert target.frames is None or target.frames == golden["in.target_frame_idx"].tolist()
    clip, mask = golden["in.clip"], golden["in.mask"]
    visible = golden["in.noise"].argsort(1)[:, : config["keep"]]  # in the order of the noise, as published
    out, predicted = predict_all(model, clip, visible)
    assert torch.equal(torch.zeros_like(mask).scatter(1, out.masked, 1.0), mask)
    assert model.masking.num_visible == config["keep"]

    pixels = pixels_of(clip)
    everywhere = torch.arange(mask.shape[1]).expand(len(clip), -1)
    error = target.error(out.prediction, target(pixels, out.masked))
    error.mean().backward()
    assert_close(predicted, golden["out.pred_all_tokens"], 1e-4, "prediction of all tokens")
    assert_close(target(pixels, everywhere), golden["out.target_norm"], 1e-4, "target")
    assert_close(error, golden["out.l_per_token"].gather(1, out.masked), 1e-4, "error per token")
    assert_close(error.mean(), golden["out.loss_norm_pix"], 1e-4, "loss")
    raw = create_target(
        "pixels", normalize=False, joint=True, **{k: config[k] for k in ("patch", "num_frames", "pred_t_dim")}
    )
    assert_close(raw.error(out.prediction, raw(pixels, out.masked)).mean(), golden["out.loss_raw_pix"], 1e-4, "raw")

    gradients = {name: p.grad for name, p in model.named_parameters()}
    holder = PretrainVisionTransformer.state_dict  # the model's own renaming gives the published names
    for p in model.parameters():
        p.data = p.grad
    published = holder(model)
    assert len(published) == len(gradients)
    for key, theirs in under("grad", golden).items():
        assert_close(published[key], theirs, 5e-4, f"gradient of {key}")


@needs_golden
@pytest.mark.parametrize("name", cases("mae_st_pretrain"))
def test_the_encoder_gives_the_published_features(name):
    config, golden = golden_manifest()["cases"][name]["config"], tensors(name)
    model, _ = of_case(config, under("state", golden))
    keep = golden["in.noise"].argsort(1)
    visible, masked = keep[:, : config["keep"]], keep[:, config["keep"] :]
    latent = model.encoder(model.encoder.patch_embed(golden["in.clip"]), visible, masked)
    assert_close(latent, golden["out.latent"], 1e-4, "features")


COUNTS = {
    ("pretrain_mae_st_base_patch16_224", 4): 99_898_880,
    ("pretrain_mae_st_base_patch16_224", 8): 112_508_416,
    ("pretrain_mae_st_large_patch16_224", 4): 317_731_584,
    ("pretrain_mae_st_large_patch16_224", 8): 330_341_120,
    ("pretrain_mae_st_huge_patch14_224", 4): 645_232_460,
    ("pretrain_mae_st_huge_patch14_224", 8): 657_841_996,
}


def family_settings(name: str) -> dict:
    return {"mask_type": "agnostic", "mask_ratio": 0.9, "target_settings": PRETRAIN_MODELS[name].target}


@pytest.mark.parametrize(("name", "depth"), COUNTS)
def test_parameter_counts(name, depth):
    with torch.device("meta"):
        model = create_pretrain_model(name, decoder_depth=depth, **family_settings(name))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name, depth]


def test_weights_have_the_published_names():
    with torch.device("meta"):
        name = "pretrain_mae_st_large_patch16_224"
        model = create_pretrain_model(name, decoder_depth=4, **family_settings(name))
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(state) == 467
    assert state["decoder_pos_embed_spatial"] == (1, 196, 512) and state["pos_embed_class"] == (1, 1, 1024)
    assert state["decoder_pred.weight"] == (768, 512) and state["decoder_blocks.3.attn.v.bias"] == (512,)
    assert state["decoder_embed.bias"] == (512,) and state["mask_token"] == (1, 1, 512)


def test_weights_can_be_saved_and_loaded_inside_another_module():
    models = [create_pretrain_model(TINY, **family_settings(TINY)) for _ in range(2)]
    outer = [torch.nn.ModuleDict({"model": model}) for model in models]
    state = outer[0].state_dict()
    assert "model.decoder_embed.weight" in state and "model.cls_token" in state
    outer[1].load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_initial_values():
    torch.manual_seed(0)
    model = create_pretrain_model(
        "pretrain_mae_st_base_patch16_224", **family_settings("pretrain_mae_st_base_patch16_224")
    )
    state = model.state_dict()
    for name in ("pos_embed_spatial", "decoder_pos_embed_temporal", "cls_token", "mask_token", "pos_embed_class"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.15), name
    assert state["mask_token"].abs().max() > 0.021  # not cut at one deviation, as AdaMAE's is
    assert not state["decoder_cls_token"].any()
    kernel = state["patch_embed.proj.weight"]
    assert kernel.std().item() == pytest.approx((2 / (768 + 1536)) ** 0.5, rel=0.02)
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize("mask_type", ["agnostic", "adaptive", "tube", "frame", "block", "random"])
@pytest.mark.parametrize("settings", [{}, {"pos_embed": "learnable"}, {"class_token": False}, {"dense_encoder": True}])
def test_every_mask_and_every_setting_trains(mask_type, settings):
    ratio = 0.75
    model = create_pretrain_model(TINY, input_size=32, mask_type=mask_type, mask_ratio=ratio, **settings)
    out = model(torch.randn(2, 3, 16, 32, 32))
    assert out.prediction.shape == (2, 128 - model.masking.num_visible, 2 * 8 * 8 * 3)
    (out.prediction.square().mean() - (0 if out.log_probs is None else out.log_probs.mean())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    state = model.state_dict()
    other = create_pretrain_model(TINY, input_size=32, mask_type=mask_type, mask_ratio=ratio, **settings)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_dense_encoder_sees_nothing_of_masked_tokens():
    torch.manual_seed(0)
    model = create_pretrain_model(TINY, input_size=32, mask_type="agnostic", mask_ratio=0.9, dense_encoder=True).eval()
    clip, visible = torch.randn(1, 3, 16, 32, 32), torch.arange(0, 128, 10)[None]
    tokens = model.encoder.patch_embed(clip)
    masked = torch.tensor([[i for i in range(128) if i % 10]])
    other = tokens + torch.randn_like(tokens).index_fill(1, visible[0], 0.0)
    features = [model.encoder(x, visible, masked) for x in (tokens, other)]
    assert features[0].shape == (1, 128, 128)
    assert torch.equal(*features)


def test_only_the_frames_of_pred_t_dim_are_predicted():
    target = create_target("pixels", patch=8, joint=True, normalize=False, pred_t_dim=8)
    assert target.frames == [0, 2, 4, 6, 8, 10, 12, 15] and target.width == 8 * 8 * 3
    pixels = torch.rand(2, 3, 16, 32, 32)
    tokens = target(pixels, torch.arange(128).expand(2, -1))  # (B,N,192)
    first = normalize(pixels, *COLOUR_STATISTICS["mae_st"])[0, :, 15, :8, :8].permute(1, 2, 0).flatten()
    torch.testing.assert_close(tokens[0, 7 * 16], first)


@pytest.mark.parametrize("pred_t_dim", [5, 12, 32])
def test_frames_that_do_not_divide_are_refused(pred_t_dim):
    with pytest.raises(SettingError, match=f"--pred_t_dim {pred_t_dim} must be a multiple of the clip's 8 time slots"):
        create_target("pixels", patch=8, pred_t_dim=pred_t_dim)


def test_a_decoder_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="--decoder_dim 65 must be a multiple of the decoder's 2 heads"):
        create_pretrain_model(TINY, decoder_dim=65)


@pytest.mark.parametrize("settings", [{}, {"pos_embed": "learnable", "class_token": False, "decoder_dim": 32}])
def test_a_published_file_rebuilds_its_model_and_starts_a_classifier(settings, tmp_path):
    torch.manual_seed(0)
    model = create_pretrain_model(TINY, **family_settings(TINY), decoder_depth=3, **settings).eval()
    save_checkpoint(tmp_path / "published.pth", {"model": model.state_dict(), "args": {"input_size": 64}})
    found = load_weights(tmp_path / "published.pth")
    assert found.kind == "MAE-ST pre-training"
    loaded, clip = load_pretrain_model(found), torch.randn(1, 3, 16, 64, 64)
    visible = torch.arange(0, 512, 10)[None]
    assert torch.equal(loaded(clip, visible).prediction, model(clip, visible).prediction)
    assert loaded.statistics == "mae_st"

    positions = {name: settings[name] for name in ("pos_embed", "class_token") if name in settings}
    classifier = create_classifier("vit_tiny_mae_st_patch8_64", num_classes=5, **positions).eval()
    report = load_classifier_weights(classifier, found, lambda text: None)
    assert report.fresh == ["head.weight", "head.bias"]  # the encoder's norm is taken too
    tokens = model.encoder.patch_embed(clip)
    everywhere = torch.arange(512)[None]
    ours = model.encoder(tokens, everywhere, everywhere[:, :0])  # with all tokens visible
    theirs = classifier.norm(classifier.forward_tokens(clip))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"pos_embed": "learnable"}])
def test_pretraining_may_start_with_other_frames_and_pixels(settings, tmp_path):
    source = create_pretrain_model(TINY, input_size=32, num_frames=8, mask_ratio=0.75, **settings)
    save_checkpoint(
        tmp_path / "short.pth", {"model": source.state_dict(), "model_settings": {"num_frames": 8, **settings}}
    )
    target = create_pretrain_model(TINY, mask_ratio=0.75, **settings)
    report = load_pretraining_weights(target, load_weights(tmp_path / "short.pth"), report=lambda text: None)
    assert report.fresh == ["pos_embed_probs"]
    assert sum("resized" in note for note in report.notes) == (2 if settings else 4)


@pytest.mark.parametrize("settings", [{"class_token": False}, {"class_token": False, "pos_embed": "learnable"}, {}])
def test_finetuning_takes_positions_and_class_token_from_the_checkpoint(settings, tmp_path):
    built = {"name": TINY, "input_size": 32, "mask_type": "agnostic", "mask_ratio": 0.75, **settings}
    model = create_pretrain_model(**built)
    save_checkpoint(tmp_path / "ours.pth", {"model": model.state_dict(), "model_settings": built})
    flags = ["--model", "vit_tiny_mae_st_patch8_64", "--input_size", "32", "--nb_classes", "3"]
    found = load_weights(tmp_path / "ours.pth")
    chosen = run_class_finetuning.model_settings(run_class_finetuning.get_args_parser().parse_args(flags), 3, found)
    classifier = build_classifier(chosen)
    assert (classifier.cls_token is None) == ("class_token" in settings)
    assert load_classifier_weights(classifier, found, lambda text: None).fresh == ["head.weight", "head.bias"]


@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_pretraining_starts_from_a_published_file(parts, tmp_path):
    torch.manual_seed(0)
    settings = family_settings(TINY) | {"decoder_depth": 2}
    source, target = (create_pretrain_model(TINY, **settings) for _ in range(2))
    save_checkpoint(tmp_path / "published.pth", {"model": source.state_dict()})
    found = load_weights(tmp_path / "published.pth")
    report = load_pretraining_weights(target, found, parts=parts, report=lambda text: None)
    theirs, ours = source.state_dict(), target.state_dict()
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert {"pos_embed_spatial", "cls_token", "blocks.3.attn.k.bias", "norm.weight"} <= same
    assert ("decoder_pos_embed_spatial" in same) == (parts == "all")
    assert (report.fresh == []) == (parts == "all")


FLAGS = [
    *("--model", TINY, "--input_size", "32", "--batch_size", "4", "--epochs", "4", "--warmup_epochs", "0"),
    *("--lr", "0.06", "--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder_depth", "1"),
    *("--mask_type", "agnostic", "--mask_ratio", "0.75", "--num_sample", "2", "--clip_grad", "0.02"),
    *("--sampling_rate", "1", "--opt_betas", "0.9", "0.95", "--save_ckpt_freq", "2", "--vis_freq", "2"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    names = write_videos(folder, [24] * 16, size=(48, 64))
    return write_list(folder / "list.csv", *(f"{name} 0" for name in names))


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_the_program_trains_mae_st_and_resumes_it_exactly(videos, tmp_path):
    flags = [*FLAGS, "--data_path", videos, "--output_dir"]
    done = start(main, *flags, tmp_path / "straight")
    assert done.returncode == 0, done.stderr
    entries = log(tmp_path / "straight")
    assert entries[-1]["loss_reconstruction"] < 0.97 * entries[0]["loss_reconstruction"]
    assert list((tmp_path / "straight" / "pictures").glob("*.png"))

    half = tmp_path / "resumed"
    half.mkdir()
    (half / "checkpoint-1.pth").write_bytes((tmp_path / "straight" / "checkpoint-1.pth").read_bytes())
    assert start(main, *flags, half).returncode == 0
    states = [torch.load(f / "checkpoint-3.pth", weights_only=True)["model"] for f in (tmp_path / "straight", half)]
    assert "decoder_embed.weight" in states[0]  # the published names
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--pred_t_dim", "5"), "--pred_t_dim 5 must be a multiple"),
        (("--crop", "center", "--crop_scale", "0.5", "1"), "--crop_scale 0.5 1.0"),
        (("--decoder_dim", "65"), "--decoder_dim 65 must be a multiple"),
        (("--pos_embed", "sinusoid_1d", "--mask_type", "space_only", "--epochs", "0"), "--epochs 0"),
    ],
)
def test_wrong_settings_are_told_in_one_line(flags, words, videos, tmp_path):
    done = start(main, *FLAGS, "--data_path", videos, "--output_dir", tmp_path, *flags)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
