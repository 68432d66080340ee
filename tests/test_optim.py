"""Schedules and parameter groups against the published tables; the engine's steps against plain PyTorch."""

import numpy as np
import pytest
import torch
from golden import arrays, needs_golden, table
from torch import nn

from modeling_finetune import Size
from modeling_pretrain import PretrainVisionTransformer
from optim import Engine, cosine_schedule, create_optimizer

SCHEDULES = table("optim_tables").get("schedules", {})


@needs_golden
@pytest.mark.parametrize("name", [n for n, s in SCHEDULES.items() if "base" in s])
def test_schedules_equal_the_published_tables(name):
    s = SCHEDULES[name]
    scale = (s["total_batch"] or 256) / 256
    steps = s["epochs"] * s["steps_per_epoch"]
    warmup = s["warmup_steps"] if s["warmup_steps"] > 0 else s["warmup_epochs"] * s["steps_per_epoch"]
    ours = [
        cosine_schedule(
            i, peak=s["base"] * scale, final=s["final"] * scale, total_steps=steps, warmup_steps=warmup
        )
        for i in range(steps)
    ]
    theirs = arrays("schedules")[name]
    assert len(theirs) == s["length"] == len(ours)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_schedule_never_runs_out():
    value = cosine_schedule(10_000, peak=1.0, final=0.1, total_steps=100, warmup_steps=10)
    assert value == pytest.approx(0.1)


def tiny_adamae(depth: int = 2, **settings) -> PretrainVisionTransformer:
    torch.manual_seed(0)
    size = Size(dim=32, depth=depth, heads=4, decoder_dim=16, decoder_heads=2)
    return PretrainVisionTransformer(size=size, patch=4, window=(4, 4, 4), mask_ratio=0.8, **settings)


@needs_golden
def test_parameter_groups_equal_the_published_ones():
    golden = table("optim_tables")["param_groups"]["adamae_pretrain"]
    depth = 1 + max(int(n.split(".")[2]) for g in golden for n in g["params"] if "encoder.blocks." in n)
    decoder = 1 + max(int(n.split(".")[2]) for g in golden for n in g["params"] if "decoder.blocks." in n)
    model = tiny_adamae(depth, decoder_depth=decoder)
    optimizer = create_optimizer(model, lr=1.0, weight_decay=0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    ours = {
        g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups
    }  # one group per weight decay
    assert ours == {g["weight_decay"]: set(g["params"]) for g in golden}


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
