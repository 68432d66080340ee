"""A loss that is not finite costs its step, on every rank alike, and nothing else."""

import copy
import csv
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from clips.lists import read_list
from optim import create_optimizer
from runs.bad_batches import BadBatches
from runs.engine import Engine
from utils import World

CPU = torch.device("cpu")


def make_engine(opt: str = "adamw", **settings) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    optimizer = create_optimizer(model, opt=opt, lr=0.1, weight_decay=0.05)
    return Engine(model, optimizer, device=CPU, **settings)


def batch(number: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number))


def train(engine: Engine, *losses: float) -> None:
    """One batch for each factor of the loss; NaN and infinity make it not finite."""
    for number, factor in enumerate(losses):
        engine.backward(engine(batch(number)).square().mean() * factor)
        engine.step()


def states(engine: Engine) -> list[torch.Tensor]:
    moments = [v for entry in engine.optimizer.state_dict()["state"].values() for v in entry.values()]
    return [*engine.module.state_dict().values(), *(torch.as_tensor(m) for m in moments if m is not None)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("opt", ["adamw", "sgd", "lars", "lion"])
def test_weights_and_optimiser_stay_as_they_were(opt, bad):
    engine = make_engine(opt)
    train(engine, 1, 1)
    before = copy.deepcopy(states(engine))
    train(engine, bad, bad)
    assert all(torch.equal(a, b) for a, b in zip(states(engine), before, strict=True))
    assert engine.bad_steps.read() == (2, 2, 2)
    train(engine, 1)
    assert not any(torch.equal(a, b) for a, b in zip(states(engine), before, strict=True))
    assert engine.bad_steps.read() == (2, 0, 2) and engine.bad_steps.read() == (2, 0, 0)


def test_one_bad_batch_of_an_accumulated_step_costs_the_step():
    engine = make_engine(update_freq=3)
    before = copy.deepcopy(engine.module.state_dict())
    train(engine, 1, math.nan, 1)
    assert all(torch.equal(v, before[k]) for k, v in engine.module.state_dict().items())
    assert engine.bad_steps.read() == (1, 1, 1)


def test_a_gradient_that_is_not_finite_counts_too():
    engine = make_engine()
    before = copy.deepcopy(engine.module.state_dict())
    loss = engine(batch(0)).square().mean()
    engine.backward(loss)
    engine.module[0].weight.grad[0, 0] = math.inf
    engine.step()
    assert all(torch.equal(v, before[k]) for k, v in engine.module.state_dict().items())
    assert engine.bad_steps.read()[0] == 1


def test_float16_overflows_are_the_scalers_business():
    """A finite loss with an overflowing gradient lowers the scale and isn't counted; a NaN loss is."""
    engine = make_engine(amp=torch.float16)
    before = copy.deepcopy(engine.module.state_dict())
    train(engine, 1e3)
    scale = engine.scaler.get_scale()
    assert scale < 65536 and engine.bad_steps.read()[0] == 0
    train(engine, math.nan)
    assert engine.bad_steps.read()[0] == 1
    assert all(torch.equal(v, before[k]) for k, v in engine.module.state_dict().items())


def test_gradients_that_stay_infinite_under_float16_count_once_the_scale_is_not_to_blame():
    """The loss is finite, but the slope of a square root at 0 is not, whatever the scale."""
    engine = make_engine(amp=torch.float16)
    before = copy.deepcopy(engine.module.state_dict())
    counted = []
    for number in range(20):
        loss = engine(batch(number)).mul(0).square().sum().sqrt()
        assert loss == 0
        engine.backward(loss)
        engine.step()
        counted.append(engine.bad_steps.read()[1])
    assert counted == [0] * 17 + [1, 2, 3]  # the first 17 halve the scale from 65536 to 0.5
    train(engine, 1)
    assert engine.bad_steps.read() == (3, 0, 3)
    assert not torch.equal(engine.module[0].weight, before["0.weight"])


def one_rank(rank: int, port: int, folder) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    engine = make_engine(distributed=True)
    train(engine, 1, math.nan if rank == 1 else 1, 1)
    torch.save((engine.module.state_dict(), engine.bad_steps.read()), folder / f"{rank}.pth")
    engine.close()
    dist.destroy_process_group()


def test_all_ranks_skip_what_one_of_them_cannot_do(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(one_rank, (port, tmp_path), nprocs=2, start_method="spawn")
    (first, seen), (second, seen_too) = (torch.load(tmp_path / f"{r}.pth", weights_only=True) for r in range(2))
    assert seen == seen_too == (1, 0, 1)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert all(value.isfinite().all() for value in first.values())


def test_the_videos_of_skipped_steps_are_written_down_once(tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(6)))
    videos = read_list(tmp_path / "list.csv")
    book = BadBatches(output_dir=str(tmp_path), videos=videos, world=World(CPU, 0, 1), warn=pytest.fail)
    book.add(torch.tensor(1.0), torch.tensor([0, 1]))
    book.add(torch.tensor(math.nan), torch.tensor([2, 3]))
    book.close_step(7, torch.tensor(1.0))  # one of two accumulated batches
    book.add(torch.tensor(2.0), torch.tensor([4, 5]))
    book.close_step(8, torch.tensor(0.0))
    book.write()
    book.forget()
    book.add(torch.tensor(3.0), torch.tensor([1, 4]))
    book.close_step(9, torch.tensor(1.0))  # only its gradient was not finite: all its videos
    book.write()
    rows = list(csv.reader((tmp_path / "bad_batches.csv").open()))
    assert rows[0] == ["step", "rank", "loss", "path"]
    expected = [("7", "nan", "2"), ("7", "nan", "3"), ("9", "3.0", "1"), ("9", "3.0", "4")]
    assert [(r[0], r[2], r[3]) for r in rows[1:]] == [(s, v, f"{tmp_path}/{n}.mp4") for s, v, n in expected]
