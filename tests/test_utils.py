"""Seeds, meters and what a person reads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from runs.console import Console, readable_time
from runs.meters import Meters
from runs.processes import start_world, unused_part
from utils import SettingError, World, choose_device, seed_all

CPU = torch.device("cpu")


def test_a_seed_is_a_function_of_all_its_words():
    def draw(*words):
        seed_all(*words)
        return torch.rand(4).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({tuple(draw(*w)) for w in [(0, 5, 1), (0, 5, 0), (0, 6, 1), (1, 5, 1), (5, 0, 1)]}) == 5


def test_meters_give_means_and_start_again():
    meters = Meters(CPU)
    for value in (1.0, 2.0, 6.0):
        meters.add(loss=torch.tensor(value), other=torch.tensor(-value))
    meters.add(loss=torch.tensor(float("nan")), other=torch.tensor(0.0))  # left out
    assert meters.read(5.0) == ({"loss": 3.0, "other": -3.0}, 3, [5.0])
    meters.reset()
    meters.add(loss=torch.tensor(4.0), other=torch.tensor(0.0))
    assert meters.read() == ({"loss": 4.0, "other": 0.0}, 1, [])


def test_processes_started_again_share_nothing_with_those_before():
    """Three attempts of three ranks in one store, as torchrun keeps it; a rank of the second dies on its way."""
    store = dist.HashStore()

    def meet(*ranks: int, timeout: float = 20):
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(lambda rank: unused_part(store, rank, 3, timeout), ranks))

    def mark(parts) -> list[bool]:
        parts[0].set("seen", "by all of this attempt")
        return [part.check(["seen"]) for part in parts]

    first = meet(0, 1, 2)
    assert mark(first) == [True] * 3
    with pytest.raises(dist.DistStoreError, match="not all processes came"):
        meet(0, 1, timeout=1)
    third = meet(2, 1, 0)
    assert not any(part.check(["seen"]) for part in third)
    assert mark(third) == [True] * 3


def test_one_process_alone(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert start_world("cpu") == World(CPU, 0, 1)
    with pytest.raises(ValueError, match="--world_size 8, but 1"):
        start_world("cpu", world_size=8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="--device cuda"):
        start_world("cuda")


def test_gpus_that_torch_cannot_use_are_an_error_and_not_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(SettingError, match=r"8 GPUs that the installed torch can't use.*--device cpu"):
        choose_device("auto")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:00:05"), (3725, "1:02:05"), (90061, "1 d 1:01:01")])
def test_readable_time(seconds, text):
    assert readable_time(seconds) == text


def test_plain_lines_where_there_is_no_terminal(capsys):
    console = Console(total_steps=10)
    console.start(0)
    console.advance()
    console.report(5, "epoch 0", loss="0.5")
    Console(total_steps=10, show=False).report(5, "epoch 0", loss="0.5")
    console.warn("beware")
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith("epoch 0  step 5/10  loss 0.5  left ")
    assert err == "beware\n"
