"""The classifiers and probes against the published implementations' numbers, and their own properties."""

import pytest
import torch
import torch.nn.functional as F
from golden import cases, needs_golden, table, tensors, under
from golden import manifest as golden_manifest

from modeling_blocks import POSITION_KINDS, Blocks
from modeling_finetune import CLASSIFIERS, MAE_ST, SIZES, Size, VisionTransformer, create_classifier
from probes import Probe, make_probe

TINY, TINY_MAE_ST = "vit_tiny_patch8_64", "vit_tiny_mae_st_patch8_64"


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    scale = theirs.abs().max().clamp_min(1e-12)
    error = ((ours - theirs).abs().max() / scale).item()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def with_clip(kind: str) -> list[str]:
    """The manifest's cases of a kind that run a model; a state or an output alone is another test's."""
    listed = golden_manifest()["cases"]
    return [n for n in cases(kind) if "out.logits" in listed[n]["tensors"]]


def model_of(config: dict, **settings) -> VisionTransformer:
    """The classifier of a golden case, in evaluation mode."""
    tubelet, grid = config.get("tubelet") or config["t_patch"], config["img"] // config["patch"]
    return VisionTransformer(
        size=Size(config["dim"], config["depth"], config["heads"], 0, 0),
        patch=config["patch"],
        tubelet=tubelet,
        window=(config["num_frames"] // tubelet, grid, grid),
        num_classes=config["classes"],
        **settings,
    ).eval()


def assert_gradients(model: torch.nn.Module, golden: dict) -> None:
    parameters = dict(model.named_parameters())
    theirs = under("grad", golden)
    assert theirs
    for key, gradient in theirs.items():
        assert_close(parameters[key].grad, gradient, 5e-4, f"gradient of {key}")


@needs_golden
@pytest.mark.parametrize("name", with_clip("finetune"))
def test_classifier_equals_the_published_code(name):
    golden = tensors(name)
    model = model_of(golden_manifest()["cases"][name]["config"])
    model.load_state_dict(under("state", golden))
    clip, label = golden["in.clip"], golden["in.label"]
    logits = model(clip)
    loss = F.cross_entropy(logits, label)
    loss.backward()
    assert_close(model.forward_pooled(clip), golden["out.features"], 1e-4, "features")
    assert_close(logits, golden["out.logits"], 1e-4, "logits")
    assert_close(loss, golden["out.ce_loss"], 1e-4, "cross entropy")
    assert_gradients(model, golden)


@needs_golden
@pytest.mark.parametrize("name", with_clip("finetune"))
def test_first_token_variant_equals_the_published_code(name):
    golden = tensors(name)
    model = model_of(golden_manifest()["cases"][name]["config"], mean_pooling=False)
    state = {k.replace("fc_norm", "norm"): v for k, v in under("state", golden).items()}
    model.load_state_dict(state)
    assert_close(model(golden["in.clip"]), golden["out.logits_first_token_variant"], 1e-4, "logits")


@needs_golden
@pytest.mark.parametrize("name", with_clip("mae_st_finetune"))
def test_mae_st_equals_the_published_code(name):
    """A case stores the head; encoder and clip are those of the pre-training case of the same name."""
    own = tensors(name)
    golden = {**tensors(name.replace("finetune", "pretrain")), **own}
    case = golden_manifest()["cases"][name]
    model = model_of(case["config"], **MAE_ST.settings)
    state = {k: v for k, v in under("state", golden).items() if k not in case["unexpected_keys"]}
    model.load_state_dict(state)
    logits = model(golden["in.clip"])
    loss = F.cross_entropy(logits, golden["in.label"])
    loss.backward()
    assert_close(logits, golden["out.logits"], 1e-4, "logits")
    assert_close(loss, golden["out.ce_loss"], 1e-4, "cross entropy")
    assert_gradients(model, own)


@needs_golden
@pytest.mark.parametrize(("family", "key"), [({}, "finetune"), (MAE_ST.settings, "mae_st_finetune")])
def test_layers_and_undecayed_names_equal_the_published_groups(family, key):
    """The tables hold names, decay and learning-rate scale of each group of a model of depth 2."""
    groups = table("optim_tables")["param_groups"][f"{key}_depth2_ld0p75"]
    model = VisionTransformer(size=Size(32, 2, 4, 0, 0), patch=4, window=(2, 2, 2), num_classes=3, **family)
    layers, undecayed = model.layer_ids(), model.no_weight_decay()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert {n for g in groups for n in g["params"]} == set(shapes) == set(layers)
    for group in groups:
        for n in group["params"]:
            assert 0.75 ** (3 - layers[n]) == pytest.approx(group["lr_scale"]), n
            kept = n in undecayed or len(shapes[n]) == 1 or n.endswith(".bias")
            assert kept == (group["weight_decay"] == 0), n


PARAMETERS = {  # (model, classes) -> parameters of the published models
    ("vit_small_patch16_224", 400): 22_033_936,
    ("vit_small_patch16_224", 174): 21_946_926,
    ("vit_small_patch16_224", 101): 21_918_821,
    ("vit_base_patch16_224", 400): 86_534_800,
    ("vit_base_patch16_224", 174): 86_361_006,
    ("vit_base_patch16_224", 101): 86_304_869,
    ("vit_base_patch16_384", 400): 86_534_800,
    ("vit_large_patch16_224", 400): 304_270_736,
    ("vit_large_patch16_224", 174): 304_039_086,
    ("vit_large_patch16_224", 101): 303_964_261,
    ("vit_large_patch16_384", 400): 304_270_736,
    ("vit_large_patch16_512", 400): 304_270_736,
    ("vit_huge_patch16_224", 400): 632_119_440,
    ("vit_base_mae_st_patch16_224", 400): 86_702_224,
    ("vit_large_mae_st_patch16_224", 400): 304_506_256,
}


def on_meta(name: str, **settings) -> VisionTransformer:
    with torch.device("meta"):
        return create_classifier(name, **{"num_classes": 400, **settings})


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_counts(name, classes):
    assert num_parameters(on_meta(name, num_classes=classes)) == PARAMETERS[name, classes]


def test_parameter_count_of_the_huge_mae_st_model():
    """Published for patches of 16; its pre-training model, and so ours, has patches of 14."""
    settings = {"size": SIZES["huge"], "num_classes": 400, **MAE_ST.settings}
    with torch.device("meta"):
        published = VisionTransformer(patch=16, window=(8, 14, 14), **settings)
    assert num_parameters(published) == 632_424_080
    ours = on_meta("vit_huge_mae_st_patch14_224")
    kernel = 1280 * 3 * 2 * (16**2 - 14**2)
    positions = 1280 * (16**2 - 14**2)  # more of them, as the grid is finer
    assert num_parameters(ours) == 632_424_080 - kernel + positions


def shapes_of(model: torch.nn.Module) -> dict[str, tuple]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_published_layouts():
    base = shapes_of(on_meta("vit_base_patch16_224"))
    assert len(base) == 162
    assert base["blocks.11.attn.qkv.weight"] == (2304, 768) and base["blocks.0.attn.v_bias"] == (768,)
    assert base["fc_norm.weight"] == (768,) and base["head.weight"] == (400, 768)
    first = shapes_of(on_meta("vit_base_patch16_224", mean_pooling=False))
    assert {k.replace("fc_norm", "norm") for k in base} == set(first)

    large = shapes_of(on_meta("vit_large_mae_st_patch16_224"))
    assert len(large) == 394
    assert large["cls_token"] == large["pos_embed_class"] == (1, 1, 1024)
    assert large["pos_embed_spatial"] == (1, 196, 1024) and large["pos_embed_temporal"] == (1, 8, 1024)
    assert large["blocks.23.attn.k.weight"] == (1024, 1024) and large["blocks.23.attn.k.bias"] == (1024,)
    assert large["norm.weight"] == (1024,)
    joint = shapes_of(on_meta("vit_large_mae_st_patch16_224", pos_embed="learnable"))
    assert joint["pos_embed"] == (1, 1569, 1024) and len(joint) == 392
    assert shapes_of(on_meta("vit_base_patch16_224", pos_embed="learnable"))["pos_embed"] == (1, 1568, 768)


def tiny(name: str = TINY, **settings) -> VisionTransformer:
    """A small model with every parameter away from 0 and 1, so that each of them counts."""
    torch.manual_seed(0)
    model = create_classifier(name, **{"num_classes": 5, "input_size": 16, "num_frames": 8, **settings})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def clips(batch: int = 2, num_frames: int = 8, input_size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, num_frames, input_size, input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
@pytest.mark.parametrize("pos_embed", [None, *POSITION_KINDS])
@pytest.mark.parametrize(("input_size", "num_frames", "tubelet"), [(32, 2, 2), (24, 12, 4), (8, 16, 1)])
def test_any_size_number_of_frames_and_positions(name, pos_embed, input_size, num_frames, tubelet):
    model = tiny(name, input_size=input_size, num_frames=num_frames, tubelet=tubelet, pos_embed=pos_embed)
    clip = clips(2, num_frames, input_size)
    window = (num_frames // tubelet, input_size // 8, input_size // 8)
    assert model.window == window and model.patch == 8 and model.depth == 4
    assert model(clip).shape == (2, 5)
    assert model.forward_tokens(clip).shape == (2, window[0] * window[1] * window[2], 128)


@pytest.mark.parametrize("settings", [{}, {"name": TINY_MAE_ST}, {"name": TINY_MAE_ST, "class_token": False}])
def test_features_are_the_normalised_mean_of_the_tokens(settings):
    model = tiny(**settings)
    tokens = model.forward_tokens(clips())  # (2,16,128)
    assert tokens.shape[1] == 16
    features = model.final_norm(tokens.mean(1))
    torch.testing.assert_close(model.forward_pooled(clips()), features)
    torch.testing.assert_close(model(clips()), model.head(features))


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
def test_without_mean_pooling_the_first_token_is_classified(name):
    model = tiny(name, mean_pooling=False)
    first = model.blocks(model._embed(clips()))[:, 0]
    torch.testing.assert_close(model.forward_pooled(clips()), model.norm(first))
    is_first_of_the_clip = torch.equal(first, model.forward_tokens(clips())[:, 0])
    assert is_first_of_the_clip == (name == TINY)


def test_separable_positions_are_sums():
    model = tiny(TINY_MAE_ST)
    grid = model.position_table()[0, 1:].view(*model.window, -1)
    for t, h, w in [(0, 0, 0), (3, 1, 0), (2, 0, 1)]:
        place = model.pos_embed_temporal[0, t] + model.pos_embed_spatial[0, h * model.window[2] + w]
        assert torch.equal(grid[t, h, w], place)
    assert torch.equal(model.position_table()[:, :1], model.pos_embed_class)


def test_learnable_positions_start_as_the_sinusoid_and_are_trained():
    fixed = tiny()
    learnable = create_classifier(TINY, num_classes=5, input_size=16, num_frames=8, pos_embed="learnable")
    report = learnable.eval().load_state_dict(fixed.state_dict(), strict=False)
    assert report.missing_keys == ["pos_embed"] and not report.unexpected_keys
    assert torch.equal(fixed(clips()), learnable(clips()))
    before = learnable.pos_embed.detach().clone()
    optimizer = torch.optim.SGD(learnable.parameters(), lr=0.1)
    F.cross_entropy(learnable(clips()), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert (learnable.pos_embed != before).any(-1).all()


@pytest.mark.parametrize("pos_embed", ["separable", "learnable"])
def test_positions_and_class_token_of_mae_st_are_trained(pos_embed):
    model = tiny(TINY_MAE_ST, pos_embed=pos_embed)
    F.cross_entropy(model(clips()), torch.tensor([0, 1])).backward()
    trained = [n for n, p in model.named_parameters() if n.startswith(("pos_embed", "cls_token"))]
    assert len(trained) == (4 if pos_embed == "separable" else 2)
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in trained)


def test_separate_projections_equal_the_fused_one():
    """The same function once the weights are cut in three; the fused one has no key bias."""
    torch.manual_seed(0)
    fused = Blocks(dim=32, depth=2, heads=4)
    for p in fused.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state = fused.state_dict()
    for i in range(2):
        weights = state.pop(f"{i}.attn.qkv.weight").chunk(3)
        q_bias, v_bias = state.pop(f"{i}.attn.q_bias"), state.pop(f"{i}.attn.v_bias")
        biases = (q_bias, torch.zeros_like(q_bias), v_bias)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"{i}.attn.{name}.weight"], state[f"{i}.attn.{name}.bias"] = weight, bias
    separate = Blocks(dim=32, depth=2, heads=4, separate_qkv=True)
    separate.load_state_dict(state)
    x = torch.randn(2, 10, 32)
    torch.testing.assert_close(separate(x), fused(x), rtol=1e-5, atol=1e-5)


def test_initialisation():
    torch.manual_seed(0)
    model = create_classifier(TINY_MAE_ST, num_classes=100, input_size=64)
    assert model.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.05)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed_spatial.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("attn.k.bias"))
    whole = create_classifier(TINY, num_classes=100, init_scale=1.0)
    assert whole.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
@pytest.mark.parametrize("setting", ["drop", "attn_drop", "drop_path", "fc_drop"])
def test_each_dropout_acts_in_training_only(name, setting):
    plain, dropped = tiny(name), tiny(name, **{setting: 0.5})
    assert torch.equal(plain(clips()), dropped(clips()))
    dropped.train()
    torch.manual_seed(2)
    assert not torch.allclose(plain(clips()), dropped(clips()))


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
def test_checkpointed_activations_change_nothing(name):
    gradients = []
    for flag in (False, True):
        model = tiny(name, drop_path=0.3, checkpoint_activations=flag).train()
        torch.manual_seed(3)
        F.cross_entropy(model(clips()), torch.tensor([0, 1])).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("vit_giant_patch16_224", {}, "no such model"),
        (TINY, {"input_size": 36}, "input_size 36"),
        (TINY, {"num_frames": 15}, "num_frames 15"),
        (TINY, {"pos_embed": "rotary"}, "pos_embed rotary: no such positions.*separable"),
    ],
)
def test_impossible_models_are_refused(name, settings, words):
    with pytest.raises(ValueError, match=words):
        create_classifier(name, num_classes=5, **settings)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_name_says_its_size(name):
    size = SIZES[name.split("_")[1]]
    model = on_meta(name)
    assert (model.dim, model.depth, model.heads) == size[:3]
    assert name.endswith(f"patch{model.patch}_{model.patch * model.window[1]}")


PROBE_SETTINGS = [
    {"kind": "linear"},
    {"kind": "linear", "batch_norm": True},
    {"kind": "attentive"},
    {"kind": "attentive", "batch_norm": True},
]


def train_probe(probe: Probe, steps: int) -> list[float]:
    """Losses of `steps` steps on four clips, all parameters that can be trained given to the optimiser."""
    optimizer = torch.optim.Adam([p for p in probe.parameters() if p.requires_grad], lr=1e-2)
    clip, labels, losses = clips(4), torch.tensor([0, 1, 2, 3]), []
    for _ in range(steps):
        loss = F.cross_entropy(probe(clip), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", PROBE_SETTINGS)
@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
def test_a_probe_learns_and_leaves_its_encoder_alone(name, settings):
    model = tiny(name, drop=0.5, drop_path=0.5, fc_drop=0.5)
    tokens = model.forward_tokens(clips())
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.")}
    probe = make_probe(model, **settings).train()
    losses = train_probe(probe, steps=60)
    assert losses[-1] < 0.5 * losses[0]
    assert not probe.encoder.training and probe.head.training
    after = probe.encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None and not p.requires_grad for p in probe.encoder.parameters())
    trained = [n for n, p in probe.named_parameters() if p.requires_grad]
    assert {n.split(".")[0] for n in trained} <= {"pool", "head"}
    assert torch.equal(probe.encoder.forward_tokens(clips()), tokens)  # without dropout, in training too


@pytest.mark.parametrize("settings", PROBE_SETTINGS)
def test_the_weights_of_a_probe_load_back(settings):
    probe = make_probe(tiny(), **settings)
    train_probe(probe.train(), steps=2)
    again = make_probe(create_classifier(TINY, num_classes=5, input_size=16, num_frames=8), **settings)
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again.eval()(clips()), probe.eval()(clips()))


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_no_graph_is_built_through_the_encoder(kind):
    probe = make_probe(tiny(), kind=kind).train()
    clip = clips().requires_grad_()
    probe(clip).sum().backward()
    assert clip.grad is None and probe.head.weight.grad is not None


def test_a_linear_probe_loads_as_a_classifier():
    probe = make_probe(tiny(), kind="linear").eval()
    model = create_classifier(TINY, num_classes=5, input_size=16, num_frames=8).eval()
    model.load_state_dict({k.removeprefix("encoder."): v for k, v in probe.state_dict().items()})
    assert torch.equal(model(clips()), probe(clips()))


def test_a_linear_probe_reads_the_pooled_features():
    model = tiny()
    features = model.forward_pooled(clips(4)).detach()
    probe = make_probe(model, kind="linear", batch_norm=True).train()
    standardised = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(probe.forward_pooled(clips(4)), standardised, rtol=1e-4, atol=1e-4)
    assert not list(probe.norm.parameters())
    assert probe.head.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_attentive_pooling_sees_every_token_in_any_order():
    pool = make_probe(tiny(), kind="attentive").pool
    tokens = torch.randn(2, 16, 128, requires_grad=True)
    pooled = pool(tokens)
    assert pooled.shape == (2, 128)
    torch.testing.assert_close(pool(tokens[:, torch.randperm(16)]), pooled, rtol=1e-4, atol=1e-5)
    pooled.square().sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_layers_of_a_probe(kind):
    probe = make_probe(tiny(TINY_MAE_ST), kind=kind)
    layers = probe.layer_ids()
    assert layers.keys() == dict(probe.named_parameters()).keys()
    assert all(layers[n] == probe.depth + 1 for n, p in probe.named_parameters() if p.requires_grad)
    assert layers["encoder.cls_token"] == 0 and layers["encoder.blocks.3.attn.q.weight"] == 4
    assert probe.no_weight_decay() < layers.keys()
    assert (probe.window, probe.patch, probe.depth) == ((4, 2, 2), 8, 4)


def test_an_unknown_probe_is_refused():
    with pytest.raises(ValueError, match="probe cubic: no such kind"):
        make_probe(tiny(), kind="cubic")


def test_slot_pooling_keeps_the_order_of_the_slots():
    """Each slot's mean is normalised by itself and stands in its own place before the head."""
    torch.manual_seed(0)
    model = create_classifier("vit_tiny_patch8_64", num_classes=3, input_size=32, slot_pooling=True).eval()
    clip = torch.randn(2, 3, 16, 32, 32)
    tokens = model.forward_tokens(clip)  # (B,N,D)
    expected = torch.cat([model.final_norm(slot.mean(1)) for slot in tokens.split(16, dim=1)], dim=1)
    torch.testing.assert_close(model.forward_pooled(clip), expected)
    assert model.head.in_features == 8 * 128


# --- as timm's users expect ---


@pytest.mark.parametrize("settings", [{}, {"mean_pooling": False}, {"slot_pooling": True}, {"name": TINY_MAE_ST}])
def test_intermediates_are_the_tokens_after_each_block_and_the_last_those_of_the_features(settings):
    model = tiny(**settings)
    features = model.forward_features(clips())  # (2,[1+]16,128)
    final, grids = model.forward_intermediates(clips(), norm=True)
    assert torch.equal(final, features) and len(grids) == 4
    assert all(grid.shape == (2, 128, *model.window) for grid in grids)
    tokens = model.without_class_token(features)  # (2,16,128)
    assert torch.equal(grids[-1].flatten(2).transpose(1, 2), tokens)
    _, lists = model.forward_intermediates(clips(), indices=[0, 3], output_fmt="NLC")
    assert torch.equal(lists[1], model.forward_tokens(clips()))
    first = model.without_class_token(model.blocks[0](model._embed(clips())))
    assert torch.equal(lists[0], first) and lists[0].shape == (2, 16, 128)
    (alone,) = model.forward_intermediates(clips(), 1, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(alone, lists[1])
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, model.forward_pooled(clips()))
    assert torch.equal(model.forward_head(features), model(clips()))
    with pytest.raises(ValueError, match="output_fmt NCHW: it is NCTHW or NLC"):
        model.forward_intermediates(clips(), output_fmt="NCHW")


@pytest.mark.parametrize("settings", [{}, {"mean_pooling": False}, {"slot_pooling": True}, {"name": TINY_MAE_ST}])
def test_a_classifier_is_reset_to_other_classes_and_another_pooling(settings):
    model = tiny(**settings)
    features = model.forward_pooled(clips())
    model.reset_classifier(7)
    assert model(clips()).shape == (2, 7) and model.get_classifier() is model.head
    assert torch.equal(model.forward_pooled(clips()), features)
    model.reset_classifier(0)
    assert torch.equal(model(clips()), features)
    tokens = model._embed(clips())
    tokens = model.blocks(tokens)
    model.reset_classifier(3, "token")
    assert torch.equal(model.head(model.final_norm(tokens[:, :1])[:, 0]), model(clips()))
    model.reset_classifier(0, "avg")
    mean = model.final_norm(model.without_class_token(tokens).mean(1))
    torch.testing.assert_close(model(clips()), mean)
    with pytest.raises(ValueError, match="global_pool map"):
        model.reset_classifier(3, "map")


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
def test_an_exported_program_gives_the_same_logits_for_any_batch(name):
    """The recipe of MODELS.md."""
    model = tiny(name, init_scale=1.0)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (clips(2),), dynamic_shapes=(batch,), strict=True).module()
    for number in (1, 2, 5):
        torch.testing.assert_close(program(clips(number)), model(clips(number)), rtol=1e-5, atol=1e-6)
