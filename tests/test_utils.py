"""Seeds, meters and what a person reads."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from runs import processes
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


@pytest.fixture
def cluster(monkeypatch):
    """Starts this process as task 3 of 4 on a machine, of which torch sees a number of GPUs; records what is called."""
    calls = []

    def start(gpus: int, error: Exception | None = None) -> World:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", str(device))))
        monkeypatch.setattr(processes, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 4)]))
        monkeypatch.setattr(processes, "unused_part", lambda store, *_: store)
        monkeypatch.setattr(processes.watchdog, "watch", lambda *_, **__: None)

        def init_process_group(backend, *, device_id, **_):
            calls.append((backend, str(device_id)))
            if error:
                raise error

        monkeypatch.setattr(dist, "init_process_group", init_process_group)
        monkeypatch.setattr(dist, "new_group", lambda backend, **_: calls.append((backend,)))
        for name, value in {"WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 3}.items():
            monkeypatch.setenv(name, str(value))
        return start_world("cuda")

    yield start, calls
    processes._meeting.clear()


@pytest.mark.parametrize(("gpus", "device"), [(4, "cuda:3"), (1, "cuda:0")], ids=["all are seen", "only its own"])
def test_a_process_takes_its_own_gpu_before_the_group_is_formed(cluster, gpus, device):
    start, calls = cluster
    assert start(gpus) == World(torch.device(device), 3, 4)
    assert calls == [("set_device", device), ("nccl", device), ("gloo",)]


def test_a_process_without_a_gpu_or_a_network_says_so(cluster):
    start, _ = cluster
    with pytest.raises(SettingError, match="process 3 of this machine has no GPU of its own: torch sees only 2"):
        start(2)
    with pytest.raises(
        SettingError, match=r"rank 3 .* nccl could not connect cuda:3 .*\(no route\).*NCCL_SOCKET_IFNAME"
    ):
        start(4, dist.DistBackendError("no route\nstack"))


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
    first, second = out.splitlines()
    assert re.fullmatch(r"step 1/10 done after \d+\.\d s", first)
    assert second.startswith("epoch 0  step 5/10  loss 0.5  left ")
    assert err == "beware\n"
