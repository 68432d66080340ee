"""Schedules and parameter groups against the published tables; the engine's steps against plain PyTorch."""

import copy

import numpy as np
import pytest
import torch
from golden import arrays, needs_golden, table
from timm.utils import ModelEmaV3
from torch import nn

from modeling_finetune import MAE_ST, Size, VisionTransformer
from modeling_pretrain import PretrainVisionTransformer
from optim import cosine_schedule, create_optimizer, parameter_groups
from probes import make_probe
from runs.engine import Engine
from runs.host_average import HostAverage

TABLES = table("optim_tables")
SCHEDULES = TABLES.get("schedules", {})
GROUPS = TABLES.get("param_groups", {})
LAYER_DECAYS = {
    f"{key.removeprefix('layer_decay_values_')} {name}": values
    for key, tables in TABLES.items()
    if key.startswith("layer_decay_values_")
    for name, values in tables.items()
}


@needs_golden
@pytest.mark.parametrize("name", [n for n, s in SCHEDULES.items() if "base" in s])
def test_schedules_equal_the_published_tables(name):
    s = SCHEDULES[name]
    scale = (s["total_batch"] or 256) / 256
    steps = s["epochs"] * s["steps_per_epoch"]
    warmup = s["warmup_steps"] if s["warmup_steps"] > 0 else s["warmup_epochs"] * s["steps_per_epoch"]
    ours = [
        cosine_schedule(i, peak=s["base"] * scale, final=s["final"] * scale, total_steps=steps, warmup_steps=warmup)
        for i in range(steps)
    ]
    theirs = arrays("schedules")[name]
    assert len(theirs) == s["length"] == len(ours)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@needs_golden
@pytest.mark.parametrize("name", [n for n, s in SCHEDULES.items() if "min_lr" in s])
def test_schedules_by_fractional_epochs_equal_those_of_mae_st(name):
    s = SCHEDULES[name]
    steps, warmup = s["epochs"] * s["steps_per_epoch"], s["warmup_epochs"] * s["steps_per_epoch"]
    settings = {"peak": s["lr"], "final": s["min_lr"], "total_steps": steps, "warmup_steps": warmup}
    ours = [cosine_schedule(i, **settings, kind="epochs") for i in range(steps)]
    np.testing.assert_allclose(ours, arrays("schedules")[name], rtol=1e-12, atol=1e-15)


def test_the_schedules_never_run_out():
    value = cosine_schedule(10_000, peak=1.0, final=0.1, total_steps=100, warmup_steps=10)
    assert value == pytest.approx(0.1)


@needs_golden
def test_every_published_schedule_is_compared():
    assert set(arrays("schedules")) == set(SCHEDULES)


def tiny_adamae(depth: int = 2, **settings) -> PretrainVisionTransformer:
    torch.manual_seed(0)
    size = Size(dim=32, depth=depth, heads=4, decoder_dim=16, decoder_heads=2)
    target_width = 2 * 4 * 4 * 3
    return PretrainVisionTransformer(
        size=size, patch=4, window=(4, 4, 4), mask_ratio=0.8, target_width=target_width, **settings
    )


def tiny_classifier(depth: int = 2, **settings) -> VisionTransformer:
    torch.manual_seed(0)
    size = Size(dim=32, depth=depth, heads=4, decoder_dim=0, decoder_heads=0)
    return VisionTransformer(size=size, patch=4, window=(2, 2, 2), num_classes=3, **settings)


def stub(golden: list[dict]) -> nn.Module:
    """A module with the parameters that a published table names, of the right number of dimensions."""
    model = nn.Module()
    for name in (n for group in golden for n in group["params"]):
        *path, leaf = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        one_dimensional = leaf == "bias" or (path and "norm" in path[-1])
        parent.register_parameter(leaf, nn.Parameter(torch.zeros([2] if one_dimensional else [1, 2, 2])))
    return model


def depth_of(golden: list[dict], blocks: str) -> int:
    names = [n.removeprefix(blocks) for g in golden for n in g["params"] if n.startswith(blocks)]
    return 1 + max(int(n.split(".")[0]) for n in names)


def published_case(name: str) -> tuple[list[dict], nn.Module]:
    """A published table of groups, and our model of that size."""
    golden = GROUPS[name]
    if name.startswith("mae_st_pretrain"):
        golden = golden["bias_wd=False"]
        return golden, stub(golden)
    if "pretrain" in name:
        depths = (depth_of(golden, part) for part in ("encoder.blocks.", "decoder.blocks."))
        return golden, tiny_adamae(next(depths), decoder_depth=next(depths))
    settings = MAE_ST.settings if name.startswith("mae_st") else {}
    return golden, tiny_classifier(depth_of(golden, "blocks."), **settings)


@needs_golden
@pytest.mark.parametrize("name", GROUPS)
def test_parameter_groups_equal_the_published_ones(name):
    golden, model = published_case(name)
    scales = sorted({g.get("lr_scale", 1.0) for g in golden})
    optimizer = create_optimizer(
        model,
        lr=1.0,
        weight_decay=max(g["weight_decay"] for g in golden),
        layer_decay=scales[-2] if len(scales) > 1 else None,
    )
    names = {id(p): n for n, p in model.named_parameters()}
    ours = {(g["weight_decay"], g["lr_scale"]): {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert len(ours) == len(optimizer.param_groups)
    assert ours == {(g["weight_decay"], g.get("lr_scale", 1.0)): set(g["params"]) for g in golden}


@needs_golden
@pytest.mark.parametrize("name", LAYER_DECAYS)
def test_layer_decay_equals_the_published_tables(name):
    values = LAYER_DECAYS[name]
    depth, decay = len(values) - 2, values[-2]
    assert f"L{depth}_decay{decay}" in name
    model = tiny_classifier(depth, **(MAE_ST.settings if name.startswith("mae_st") else {}))
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=decay)
    scales = sorted({g["lr_scale"] for g in groups})
    assert scales == pytest.approx(values, rel=1e-15, abs=0)


def test_layer_decay_of_one_is_none():
    model = tiny_classifier()
    scales = {g["lr_scale"] for g in parameter_groups(model, weight_decay=0.1, layer_decay=1.0)}
    assert scales == {1.0}
    with pytest.raises(ValueError, match="--layer_decay -1"):
        parameter_groups(model, weight_decay=0.1, layer_decay=-1)


def test_frozen_parameters_are_left_out():
    probe = make_probe(tiny_classifier(), kind="linear", batch_norm=True)
    for layer_decay in (None, 0.75):
        groups = parameter_groups(probe, weight_decay=0.1, layer_decay=layer_decay)
        trained = [p for g in groups for p in g["params"]]
        assert {id(p) for p in trained} == {id(p) for p in probe.head.parameters()}
        assert {g["lr_scale"] for g in groups} == {1.0}
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        create_optimizer(probe.requires_grad_(False), lr=1.0, weight_decay=0.0)


def test_lars_adapts_matrices_and_not_biases_without_weight_decay():
    layer = nn.Linear(4, 3)
    nn.init.ones_(layer.bias)
    before = copy.deepcopy(layer)
    engine = Engine(layer, create_optimizer(layer, opt="lars", lr=0.5, weight_decay=0.0), device=torch.device("cpu"))
    x = torch.randn(8, 4)
    before(x).square().sum().backward()
    engine.backward(engine(x).square().sum())
    engine.step()
    w, g = before.weight, before.weight.grad
    torch.testing.assert_close(w - layer.weight, 0.5 * 0.001 * w.norm() / g.norm() * g)
    torch.testing.assert_close(before.bias - layer.bias, 0.5 * before.bias.grad)


@pytest.mark.parametrize("opt", ["sgd", "momentum", "lars", "lamb", "adamw", "lion", "nadamw"])
def test_optimisers_of_timm_learn(opt):
    model, x, y = problem()
    optimizer = create_optimizer(model, opt=opt, lr=0.3 if opt == "lars" else 0.01, weight_decay=1e-4)
    engine = Engine(model, optimizer, device=torch.device("cpu"))
    losses = []
    for _ in range(20):
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt": "sgd", "betas": (0.9, 0.95)}, "sgd takes no betas"),
        ({"opt": "adamw", "betas": (0.9,)}, "adamw takes 2 betas"),
        ({"opt": "adamm"}, "--opt adamm: timm has no such optimiser"),
    ],
)
def test_a_wrong_optimiser_setting_says_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(nn.Linear(2, 2), lr=0.1, weight_decay=0.0, **settings)


def test_settings_reach_the_optimiser():
    layer = nn.Linear(2, 2)
    adamw = create_optimizer(layer, lr=0.1, weight_decay=0.2, betas=(0.8, 0.7), eps=1e-3)
    assert {(g["betas"], g["eps"], g["lr"]) for g in adamw.param_groups} == {((0.8, 0.7), 1e-3, 0.1)}
    sgd = create_optimizer(layer, opt="sgd", lr=0.1, weight_decay=0.2, momentum=0.6)
    assert {g["momentum"] for g in sgd.param_groups} == {0.6}


def problem():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 1)), torch.randn(12, 6), torch.randn(12, 1)


def engine_of(model, **settings) -> Engine:
    optimizer = create_optimizer(model, lr=0.05, weight_decay=0.1, betas=(0.9, 0.95))
    return Engine(model, optimizer, device=torch.device("cpu"), **settings)


def test_accumulated_batches_equal_one_large_batch():
    (whole, x, y), (parts, _, _) = problem(), problem()
    one, many = engine_of(whole), engine_of(parts, update_freq=3)
    for _ in range(4):
        one.backward((one(x) - y).square().mean())
        assert one.step()
        stepped = []
        for xi, yi in zip(x.split(4), y.split(4), strict=True):
            many.backward((many(xi) - yi).square().mean())
            stepped.append(many.step())
        assert stepped == [False, False, True]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_whole_gradient():
    model, x, y = problem()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    watch = {"head": list(model[2].parameters())}
    engine = Engine(model, sgd, device=torch.device("cpu"), clip_grad=0.01, watch=watch)
    engine.backward((engine(x) - y).square().mean())
    engine.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert set(engine.grad_norms) == {"head", "rest"}
    assert all(v > 0 for v in engine.grad_norms.values())


def test_schedule_values_reach_the_groups():
    model, _, _ = problem()
    engine = engine_of(model)
    engine.optimizer.param_groups[0]["lr_scale"] = 0.5
    engine.set_schedule(0.2, 0.3)
    by_decay = {g["weight_decay"]: g["lr"] for g in engine.optimizer.param_groups}
    assert sorted(by_decay) == [0.0, 0.3] and sorted(by_decay.values()) == [0.1, 0.2]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights():
    model, x, _ = problem()
    engine = engine_of(model, amp=torch.bfloat16)
    assert engine(x).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def train(engine: Engine, x, y, steps: int) -> None:
    for _ in range(steps):
        engine.backward((engine(x) - y).square().mean())
        engine.step()


@pytest.mark.parametrize("force_cpu", [False, True])
def test_moving_average_follows_every_optimiser_step(force_cpu):
    model, x, y = problem()
    engine = engine_of(model, ema_decay=0.8, ema_force_cpu=force_cpu, update_freq=2)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(6):
        train(engine, x, y, 1)
        if step % 2:
            expected = [0.8 * e + 0.2 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for ours, e in zip(engine.ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, e)
    torch.testing.assert_close(engine.evaluate(x, ema=True), engine.ema.module(x))
    torch.testing.assert_close(engine.evaluate(x), model(x))
    assert not torch.allclose(engine.evaluate(x, ema=True), engine.evaluate(x))
    engine.end_validation()
    assert not force_cpu or engine.ema.copied is None


def test_an_average_in_the_hosts_memory_has_the_same_numbers():
    """Weights, running statistics and counters; whenever it is read, and with a copy of its own for evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    plain, host = ModelEmaV3(model, decay=0.9), HostAverage(model, decay=0.9)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.5), torch.randn(8, 6)
    for step in range(6):
        model(x).square().mean().backward()
        optimizer.step()
        plain.update(model)
        host.update(model)
        if step % 2:
            copied = host.on_device()
            assert copied is host.on_device() and copied is not host.module
            assert torch.equal(copied.eval()(x), plain.module(x))
    ours, theirs = host.module.state_dict(), plain.module.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    host.module.load_state_dict(model.state_dict())
    assert torch.equal(host.on_device()[0].weight, model[0].weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the memory of a GPU with the host's")
def test_an_average_in_the_hosts_memory_is_evaluated_on_the_device():
    (model, x, y), device = problem(), torch.device("cuda")
    model, x, y = model.to(device), x.to(device), y.to(device)
    plain, host = ModelEmaV3(model, decay=0.8), HostAverage(model, decay=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        plain.update(model)
        host.update(model)
    assert {p.device.type for p in host.module.parameters()} == {"cpu"}
    assert {p.is_pinned() for p in host.sent.parameters()} == {True}
    torch.testing.assert_close(host.on_device()(x), plain.module(x))


def test_evaluation_has_neither_dropout_nor_gradients():
    model = nn.Sequential(nn.Linear(6, 1), nn.Dropout(0.5))
    engine = engine_of(model, amp=torch.bfloat16)
    x = torch.randn(4, 6)
    out = engine.evaluate(x)
    assert out.dtype == torch.bfloat16 and not out.requires_grad
    assert torch.equal(out, engine.evaluate(x)) and not model.training


def test_a_resumed_engine_goes_on_as_if_nothing_had_happened():
    (straight, x, y), (first, _, _), (second, _, _) = problem(), problem(), problem()
    settings = {"ema_decay": 0.9, "amp": torch.float16}
    engines = [engine_of(model, **settings) for model in (straight, first, second)]
    train(engines[0], x, y, 4)
    train(engines[1], x, y, 2)
    engines[2].load_state_dict(copy.deepcopy(engines[1].state_dict()))
    train(engines[2], x, y, 2)
    states = [engines[i].state_dict() for i in (0, 2)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_state_without_average_or_scale_can_be_taken_over():
    (old, x, y), (new, _, _) = problem(), problem()
    plain, engine = engine_of(old), engine_of(new, ema_decay=0.9, amp=torch.float16)
    train(plain, x, y, 2)
    engine.load_state_dict(plain.state_dict())
    torch.testing.assert_close(dict(engine.ema.module.state_dict()), dict(old.state_dict()))
    assert engine.scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()
    train(engine, x, y, 1)
