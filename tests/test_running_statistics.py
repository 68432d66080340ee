"""Batch norms have the same running statistics in all processes, whichever engine trains them."""

import importlib.util
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from optim import create_optimizer
from runs.deepspeed_engine import DeepSpeedEngine
from runs.engine import Engine

CPU = torch.device("cpu")
ENGINES = {"native": Engine}
if importlib.util.find_spec("deepspeed"):
    ENGINES["deepspeed"] = DeepSpeedEngine
STEPS, FREQ = 3, 2


def make_engine(kind: str = "native", **settings) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))
    model.register_buffer("table", torch.ones(3))
    return ENGINES[kind](model, create_optimizer(model, lr=0.1, weight_decay=0), device=CPU, ema_decay=0.5, **settings)


def batch(rank: int, number: int) -> torch.Tensor:
    """Features (6,4) whose mean and variance differ from rank to rank."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number)) * (1 + rank) + rank


def train(engine: Engine, rank: int, numbers: range, factor: float = 1.0) -> None:
    for number in numbers:
        engine.backward(engine(batch(rank, number)).square().mean() * factor)
        engine.step()


def statistics(engine: Engine) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in engine.running_statistics.buffers]


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    found = {}
    for kind in ENGINES:
        engine = make_engine(kind, update_freq=FREQ, **({"distributed": True} if kind == "native" else {}))
        train(engine, rank, range(STEPS * FREQ))
        outputs = [engine.evaluate(batch(5, 5), ema=ema) for ema in (False, True)]
        sends_buffers = getattr(engine.forward_model, "broadcast_buffers", False)
        found[kind] = statistics(engine), outputs, sends_buffers
        engine.close()
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


def expected_statistics() -> list[torch.Tensor]:
    """Those of one batch norm per process, averaged after every step."""
    norms = [nn.BatchNorm1d(4, affine=False) for _ in range(2)]
    for step in range(STEPS):
        for rank, norm in enumerate(norms):
            for number in range(step * FREQ, (step + 1) * FREQ):
                norm(batch(rank, number))
        for name in ("running_mean", "running_var"):
            mean = sum(getattr(norm, name) for norm in norms) / 2
            for norm in norms:
                getattr(norm, name).copy_(mean)
    return [norms[0].running_mean, norms[0].running_var]


def test_two_processes_evaluate_the_mean_of_their_statistics(tmp_path):
    mp.spawn(one_of_two, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    for kind, (ours, outputs, sends_buffers) in first.items():
        assert all(torch.equal(a, b) for a, b in zip(ours, second[kind][0], strict=True)), kind
        torch.testing.assert_close(ours, expected_statistics())
        assert all(torch.equal(a, b) for a, b in zip(outputs, second[kind][1], strict=True)), kind
        assert not sends_buffers  # DDP sends no constant tables in every step


def test_a_skipped_step_leaves_the_statistics_as_they_were():
    engine = make_engine()
    train(engine, 0, range(2))
    before = statistics(engine)
    train(engine, 0, range(2, 3), math.nan)
    assert all(torch.equal(a, b) for a, b in zip(statistics(engine), before, strict=True))
    resumed = make_engine()
    resumed.load_state_dict(engine.state_dict())
    train(resumed, 0, range(2, 3), math.nan)
    assert all(torch.equal(a, b) for a, b in zip(statistics(resumed), before, strict=True))
    train(engine, 0, range(3, 4))
    assert not any(torch.equal(a, b) for a, b in zip(statistics(engine), before, strict=True))
