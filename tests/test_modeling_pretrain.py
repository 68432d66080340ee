"""The pre-training model against the published implementations' numbers, and its own properties."""

import re

import pytest
import torch
from golden import GOLDEN, cases, needs_golden, tensors, under
from golden import manifest as golden_manifest

from masking_generator import DECODER_ORDERS, RULES
from modeling_blocks import sinusoid_1d, sinusoid_3d
from modeling_finetune import Size
from modeling_pretrain import PretrainVisionTransformer, create_pretrain_model
from sampling import SAMPLING_LOSSES, sampling_loss
from targets import Losses, create_target, patchify, unpatchify

BASE, TINY = "pretrain_videomae_base_patch16_224", "pretrain_videomae_tiny_patch8_64"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1, 1)


def model_of(config: dict, state: dict, **settings) -> PretrainVisionTransformer:
    """The model of a golden case, with its weights and without dropout."""
    slots = state["encoder.patch_embed.proj.weight"].shape[2]
    num_frames = config.get("num_frames", 16)
    grid = config["img"] // config["patch"]
    model = PretrainVisionTransformer(
        size=Size(config["dim"], config["depth"], config["heads"], config["ddim"], config["dheads"]),
        patch=config["patch"],
        window=(num_frames // slots, grid, grid),
        target_width=create_target("pixels", patch=config["patch"]).width,
        mask_ratio=config["ratio"],
        decoder_depth=config["ddepth"],
        **settings,
    )
    model.load_state_dict(state)
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    scale = theirs.abs().max().clamp_min(1e-12)
    error = ((ours - theirs).abs().max() / scale).item()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def losses(model, clip, visible, *, normalize: bool = True, loss: str = "mse"):
    out = model(clip, visible)
    pixels = create_target("pixels", patch=model.patch, normalize=normalize)
    target = pixels(clip * STD + MEAN, out.masked)
    return out, target, pixels.error(out.prediction, target, loss)


@needs_golden
@pytest.mark.parametrize("name", cases("adamae_pretrain"))
def test_adamae_equals_the_published_code(name):
    config, golden = golden_manifest()["cases"][name]["config"], tensors(name)
    model = model_of(config, under("state", golden), sampler={"heads": config.get("sampler_heads", 8)})
    clip, visible = golden["in.clip"], golden["in.vis_idx"]
    out, target, error = losses(model, clip, visible)
    loss_s = 1e-4 * sampling_loss(out.log_probs, out.masked, error)
    total = error.mean() + loss_s
    total.backward()

    mask = torch.zeros_like(golden["in.mask"]).scatter(1, out.masked, True)
    assert torch.equal(mask, golden["in.mask"])
    assert_close(out.log_probs.exp(), golden["out.probs"], 1e-4, "P")
    assert_close(out.log_probs, golden["out.log_probs_all"], 1e-4, "log P")
    assert_close(out.prediction, golden["out.recon"], 1e-4, "prediction")
    assert_close(target, golden["out.target"], 1e-4, "target")
    assert_close(error, golden["out.l_r_per_token"], 1e-4, "error per token")
    assert_close(error.mean(), golden["out.loss_reconstruction"], 1e-4, "reconstruction loss")
    assert_close(loss_s, golden["out.loss_sampling_weighted"], 1e-4, "sampling loss")
    assert_close(total, golden["out.loss_total"], 1e-4, "total loss")
    zero = {k.split(" ")[0] for k in golden_manifest()["cases"][name].get("known_zero_grad", [])}
    parameters = dict(model.named_parameters())
    for key, theirs in under("grad", golden).items():
        if key in zero:
            assert parameters[key].grad.abs().max() < 1e-6, key
        else:
            assert_close(parameters[key].grad, theirs, 5e-4, f"gradient of {key}")


@needs_golden
@pytest.mark.parametrize("name", cases("adamae_pretrain"))
@pytest.mark.parametrize(
    ("normalize", "loss", "key"),
    [
        (False, "mse", "out.raw_target.loss_reconstruction"),
        (True, "l1", "derived.l1_norm.loss_reconstruction"),
        (False, "l1", "derived.l1_raw.loss_reconstruction"),
    ],
)
def test_adamae_loss_variants(name, normalize, loss, key):
    config, golden = golden_manifest()["cases"][name]["config"], tensors(name)
    if key not in golden:
        pytest.skip(f"{name} has no {key}")
    model = model_of(config, under("state", golden), sampler={"heads": config.get("sampler_heads", 8)})
    out, _, error = losses(model, golden["in.clip"], golden["in.vis_idx"], normalize=normalize, loss=loss)
    assert_close(error.mean(), golden[key], 1e-4, key)
    if not normalize and loss == "mse":
        loss_s = 1e-4 * sampling_loss(out.log_probs, out.masked, error)
        assert_close(loss_s, golden["out.raw_target.loss_sampling_weighted"], 1e-4, "sampling loss")


@needs_golden
@pytest.mark.parametrize("name", cases("videomae_pretrain"))
def test_videomae_equals_the_published_code(name):
    config, golden = golden_manifest()["cases"][name]["config"], tensors(name)
    model = model_of(config, under("state", golden), mask_type="tube")
    mask = golden["in.mask"]
    visible = (~mask).nonzero()[:, 1].view(len(mask), -1)
    assert visible.shape[1] == model.masking.num_visible
    out, target, error = losses(model, golden["in.clip"], visible)
    error.mean().backward()
    assert out.log_probs is None
    assert_close(out.prediction, golden["out.recon"], 1e-4, "prediction")
    assert_close(target, golden["out.target"], 1e-4, "target")
    assert_close(error.mean(), golden["out.loss"], 1e-4, "loss")
    parameters = dict(model.named_parameters())
    for key, theirs in under("grad", golden).items():
        assert_close(parameters[key].grad, theirs, 5e-4, f"gradient of {key}")


@needs_golden
@pytest.mark.parametrize("key", [k for k in (tensors("misc") if GOLDEN.is_dir() else {}) if "sincos" in k])
def test_sinusoid_equals_the_published_table(key):
    """Keys read `sincos.n<positions>_d<channels>[_rows_<i>_<j>..._first<k> | _last<k>_cols_rows_...]`."""
    theirs = tensors("misc")[key].squeeze(0)
    positions, channels = map(int, re.match(r"sincos\.n(\d+)_d(\d+)", key).groups())
    ours = sinusoid_1d(positions, channels)
    if rows := re.search(r"rows((?:_\d+)+)", key):
        ours = ours[[int(r) for r in rows[1].split("_")[1:]]]
    if first := re.search(r"first(\d+)", key):
        ours = ours[:, : int(first[1])]
    if last := re.search(r"last(\d+)_cols", key):
        ours = ours[:, -int(last[1]) :]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_sinusoid_3d_separates_the_axes():
    table = sinusoid_3d((4, 3, 5), 32).view(4, 3, 5, 32)
    assert torch.equal(table[:, :, :, :12], table[:, :1, :1, :12].expand(4, 3, 5, -1))
    assert torch.equal(table[..., 12:22], table[:1, :, :1, 12:22].expand(4, 3, 5, -1))
    assert torch.equal(table[..., 22:], table[:1, :1, :, 22:].expand(4, 3, 5, -1))
    assert len(table.view(60, 32).unique(dim=0)) == 60


PARAMETERS = {  # (decoder depth 4, 8, 12), from the published models
    ("small", "adaptive"): (26_405_185, 28_183_873, 29_962_561),
    ("base", "adaptive"): (102_501_505, 109_597_825, 116_694_145),
    ("large", "adaptive"): (331_981_825, 344_589_313, 357_196_801),
    ("small", "tube"): (24_029_376, 25_808_064, 27_586_752),
    ("base", "tube"): (94_210_944, 101_307_264, 108_403_584),
    ("large", "tube"): (317_782_016, 330_389_504, 342_996_992),
    ("huge", "tube"): (653_104_256, 672_795_776, 692_487_296),
}


@pytest.mark.parametrize(("size", "mask_type"), PARAMETERS)
def test_parameter_counts(size, mask_type):
    for depth, expected in zip((4, 8, 12), PARAMETERS[size, mask_type], strict=True):
        with torch.device("meta"):
            model = create_pretrain_model(
                f"pretrain_videomae_{size}_patch16_224", mask_type=mask_type, decoder_depth=depth
            )
        assert sum(p.numel() for p in model.parameters()) == expected


def test_published_layout_of_the_base_model():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in create_pretrain_model(BASE).state_dict().items()}
        videomae = create_pretrain_model(BASE, mask_type="tube").state_dict()
    assert len(shapes) == 232 and len(videomae) == 218
    assert set(videomae) < set(shapes)
    assert all("pos_embed_probs" in k or "get_token_probs" in k for k in set(shapes) - set(videomae))
    assert shapes["encoder.pos_embed_probs"] == (1, 1568, 768)
    assert shapes["encoder.blocks.11.attn.qkv.weight"] == (2304, 768)
    assert shapes["encoder.get_token_probs.0.mlp.fc1.weight"] == (3072, 768)
    assert shapes["encoder.get_token_probs.1.weight"] == (1, 768)
    assert shapes["decoder.head.weight"] == (1536, 384)
    assert shapes["encoder_to_decoder.weight"] == (384, 768)


def test_initialisation():
    torch.manual_seed(0)
    model = create_pretrain_model(TINY, input_size=32)
    for name, p in model.named_parameters():
        if name.endswith(("q_bias", "v_bias", "pos_embed_probs")) or (
            name.endswith(".bias") and "patch_embed" not in name
        ):
            assert (p == 0).all(), name
    weight = model.encoder.blocks[0].mlp.fc1.weight.detach()
    bound = (6 / sum(weight.shape)) ** 0.5  # Xavier uniform
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert 0 < model.mask_token.abs().max() <= 0.02
    linear = model.encoder_to_decoder.weight.detach()  # PyTorch's default
    assert linear.abs().max() <= linear.shape[1] ** -0.5
    assert linear.std() == pytest.approx(linear.shape[1] ** -0.5 / 3**0.5, rel=0.05)


def test_identity_start_of_attention():
    model = create_pretrain_model(TINY, input_size=32, attn_init="identity", sampler={"kind": "attention"})
    for attention in (model.decoder.blocks[0].attn, model.encoder.get_token_probs[0]):
        query, key, value = attention.qkv.weight.chunk(3)
        assert torch.equal(query, key) and not torch.equal(query, value)


def tiny(**settings) -> PretrainVisionTransformer:
    torch.manual_seed(0)
    return create_pretrain_model(TINY, input_size=32, mask_ratio=0.9, **settings)


def backward(model, *, reconstruction: float, sampling: float) -> dict[str, torch.Tensor]:
    """Gradients by name of a weighted sum of the two losses on one random clip."""
    pixels = torch.rand(2, 3, 16, 32, 32)
    out = model(pixels)
    target = create_target("pixels", patch=model.patch)
    error = target.error(out.prediction, target(pixels, out.masked))
    loss_s = sampling_loss(out.log_probs, out.masked, error)
    (reconstruction * error.mean() + sampling * loss_s).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def is_sampler(name: str) -> bool:
    return "pos_embed_probs" in name or "get_token_probs" in name


def test_sampling_loss_reaches_only_the_sampler_and_the_embedding():
    grads = backward(tiny(), reconstruction=0.0, sampling=1.0)
    touched = {n for n, g in grads.items() if g.abs().max() > 0}
    assert {n for n in touched if not is_sampler(n)} == {
        "encoder.patch_embed.proj.weight",
        "encoder.patch_embed.proj.bias",
    }
    assert "encoder.get_token_probs.0.attn.qkv.weight" in touched


def test_a_detached_sampling_loss_leaves_the_embedding_alone():
    grads = backward(tiny(sampler_options={"detach": True}), reconstruction=0.0, sampling=1.0)
    assert all(is_sampler(n) for n, g in grads.items() if g.abs().max() > 0)


def test_reconstruction_loss_does_not_reach_the_sampler():
    grads = backward(tiny(), reconstruction=1.0, sampling=0.0)
    assert all(g.abs().max() == 0 for n, g in grads.items() if is_sampler(n))
    assert grads["encoder.blocks.3.mlp.fc2.weight"].abs().max() > 0


@pytest.mark.parametrize("mask_type", RULES)
@pytest.mark.parametrize(("input_size", "num_frames"), [(32, 16), (48, 8), (64, 4)])
def test_any_size_number_of_frames_and_rule(mask_type, input_size, num_frames):
    model = create_pretrain_model(
        TINY, input_size=input_size, num_frames=num_frames, mask_type=mask_type, mask_ratio=0.75
    )
    out = model(torch.randn(2, 3, num_frames, input_size, input_size))
    tokens = num_frames // 2 * (input_size // 8) ** 2
    assert out.prediction.shape == (2, tokens - model.masking.num_visible, 2 * 8 * 8 * 3)
    assert out.visible.shape == (2, model.masking.num_visible)
    assert (out.log_probs is not None) == (mask_type == "adaptive")


@pytest.mark.parametrize("decoder_mask_type", DECODER_ORDERS)
@pytest.mark.parametrize("mask_type", RULES)
def test_the_decoder_sees_and_predicts_a_share_of_the_masked_tokens_while_training(mask_type, decoder_mask_type):
    settings = {"mask_type": mask_type, "mask_ratio": 0.75, "decoder_mask_type": decoder_mask_type}
    settings["sampler"] = {"kind": "mlp"}  # the others have dropout
    model = create_pretrain_model(TINY, input_size=32, decoder_mask_ratio=0.5, **settings)
    clip, uniform = torch.randn(2, 3, 16, 32, 32), torch.rand(2, model.masking.num_draws)
    seen = []
    model.decoder.blocks.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    some, again, every = model(clip, uniform=uniform), model(clip, uniform=uniform), model.eval()(clip, uniform=uniform)
    visible, masked = every.visible.shape[1], every.masked.shape[1]
    assert visible + masked == 128 and seen == [visible + masked - masked // 2] * 2 + [128]
    assert some.prediction.shape[:2] == some.masked.shape == (2, masked - masked // 2)
    assert torch.equal(some.masked, again.masked) and torch.equal(some.prediction, again.prediction)
    assert torch.equal(some.visible, every.visible)
    seen_and_predicted = torch.cat([some.visible, some.masked], dim=1)
    assert all(len(set(row.tolist())) == seen[0] for row in seen_and_predicted), "no token twice"


@pytest.mark.parametrize("form", SAMPLING_LOSSES)
def test_losses_see_the_decoded_tokens_only(form):
    """What stands in the pixels of tokens that are neither visible nor decoded changes nothing."""
    torch.manual_seed(0)
    model = create_pretrain_model(TINY, input_size=32, mask_ratio=0.9, decoder_mask_ratio=0.5)
    losses, pixels = Losses(target=create_target("pixels", patch=8), sampling_form=form), torch.rand(2, 3, 16, 32, 32)
    out = model(pixels)
    left_out = torch.ones(2, 128, dtype=torch.bool).scatter(1, torch.cat([out.visible, out.masked], dim=1), False)
    others = torch.where(left_out[:, :, None], 1.0, patchify(pixels, 8))
    values, again = (losses(out, x) for x in (pixels, unpatchify(others, (8, 4, 4), 8)))
    assert left_out.any() and all(torch.equal(values[name], again[name]) for name in values)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": {"depth": 2, "width": 64}},
        {"sampler": {"kind": "mlp"}},
        {"sampler": {"kind": "attention"}, "attn_init": "identity"},
        {"pos_embed": "sinusoid_3d"},
        {"drop_path": 0.3, "checkpoint_activations": True},
        {"sampler_options": {"temperature": 0.5, "positions": True}},
    ],
)
def test_settings_train(settings):
    grads = backward(tiny(**settings), reconstruction=1.0, sampling=1.0)
    assert all(g.isfinite().all() for g in grads.values())
    assert any(is_sampler(n) and g.abs().max() > 0 for n, g in grads.items())


def test_checkpointed_activations_change_nothing():
    plain, recomputed = tiny().train(), tiny(checkpoint_activations=True).train()
    recomputed.load_state_dict(plain.state_dict())
    torch.manual_seed(5)
    ours = backward(plain, reconstruction=1.0, sampling=1.0)
    torch.manual_seed(5)
    theirs = backward(recomputed, reconstruction=1.0, sampling=1.0)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_the_sampler_runs_in_mixed_precision_but_for_its_softmax():
    model = tiny().eval()
    tokens = model.encoder.patch_embed(torch.randn(2, 3, 16, 32, 32)).detach()
    exact = model.encoder.log_probs(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encoder.log_probs(tokens, amp=False), exact)
        mixed = model.encoder.log_probs(tokens)
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0.05)
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(2), rtol=0, atol=1e-6)


def test_logits_that_are_not_finite_give_finite_log_probabilities():
    model = tiny().eval()
    with torch.no_grad():
        model.encoder.get_token_probs[-1].bias.fill_(float("nan"))
    assert model.encoder.log_probs(torch.randn(2, 128, 128)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("pretrain_videomae_giant_patch16_224", {}, "no such model"),
        (TINY, {"input_size": 36}, "input_size 36"),
        (TINY, {"num_frames": 15}, "num_frames 15"),
        (TINY, {"mask_ratio": 1.5}, "mask_ratio 1.5"),
        (TINY, {"attn_init": "zero"}, "attn_init zero"),
        (TINY, {"target": "voxels"}, "target voxels"),
    ],
)
def test_impossible_models_are_refused(name, settings, words):
    with pytest.raises(ValueError, match=words):
        create_pretrain_model(name, **settings)
