"""The benchmarks run from end to end, and print and write the same numbers. No time is asserted."""

import json
import os
import re

import encoder_step
import harness
import loader
import masking
import numpy as np
import pytest
import throughput
import torch
from programs import start
from sources import write_sources

from augment import normalize, to_pixels
from clips.decoders import DECODERS, resolve_decoder
from clips.lists import read_list
from clips.transforms import build_pretrain_transform
from clips.video_index import index_video
from datasets import ClipSettings, TrainDataset
from masking_generator import RULES
from sampling import SAMPLING_LOSSES
from utils import SettingError

SMALL = {"seconds": 3, "height": 96, "width": 128}
TINY = "pretrain_videomae_tiny_patch8_64"


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    """What the benchmarks change in a process of their own doesn't reach other tests."""
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The list of two videos."""
    return write_sources(tmp_path_factory.mktemp("benchmarks") / "made", 2, **SMALL)


def usable(decoder: str) -> bool:
    try:
        return bool(resolve_decoder(decoder))
    except SettingError:
        return False


def results(module, tmp_path, *flags) -> dict:
    """What a benchmark writes, having printed as many lines of tables."""
    file = tmp_path / "results.json"
    done = start(module.main, "--output", file, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert done.stdout.startswith(found["machine"]) and torch.__version__ in found["machine"]
    tables = [rows for rows in found.values() if isinstance(rows, list)]
    assert tables and done.stdout.count("\n|") == sum(2 + len(rows) for rows in tables)
    return found


def table(found: dict, name: str) -> list[dict]:
    return next(rows for title, rows in found.items() if title.startswith(name))


def test_sources_are_as_hard_to_seek_in_as_real_videos(made):
    index = index_video(read_list(made)[0].path)
    assert (index.num_frames, len(index.keys)) == (90, 1)


@pytest.mark.skipif(not usable("decord"), reason="no decord")
def test_the_plain_loader_makes_the_clips_of_ours(made):
    videos = read_list(made)
    settings = ClipSettings(sampling="pretrain", decoder="decord")
    crop = build_pretrain_transform("multi_scale", size=loader.SIZE)
    ours = TrainDataset(videos=videos, transform=crop, settings=settings)[2, 1]["clips"]
    ours = normalize(to_pixels(ours))[0]
    plain = loader.plain_clip(videos[1].path, np.random.default_rng([0, 2, 1]))
    assert plain.shape == ours.shape and plain.dtype == ours.dtype
    assert (plain - ours).abs().max() < 1.01 / 255 / 0.224  # one grey level


def test_loader(tmp_path):
    found = results(loader, tmp_path, "--num_videos", 2, "--epochs", 1, *(f"--{k}={v}" for k, v in SMALL.items()))
    rows = table(found, "Milliseconds of CPU time per pre-training clip")
    loaders = ["plain"] + [f"ours, {decoder}" for decoder in DECODERS if usable(decoder) for _ in range(2)]
    assert [row["loader"] for row in rows] == 2 * loaders
    plain = {row["files"]: row["again, in process"] for row in rows if row["loader"] == "plain"}
    for row in rows:
        if row["loader"] != "plain":
            assert all(row[name]["median"] > 0 for name in ("first, in process", "again, in process"))
            if plain[row["files"]] is not None:
                ratio = row["again, isolated"]["median"] / plain[row["files"]]["median"]
                assert row["isolated / plain"] == pytest.approx(ratio, rel=2e-3)
    assert [row["aa"] for row in table(found, "Milliseconds per fine-tuning clip")] == [
        "none",
        "rand-m7-n4-mstd0.5-inc1",
    ]


def test_throughput(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "SETTINGS", (throughput.ONE,))
    monkeypatch.setattr(throughput, "TWO", throughput.ONE)
    small = ("--num_videos", 1, "--seconds", 3, "--model", TINY, "--batch_size", 1, "--warmup", 1, "--steps", 3)
    found = results(throughput, tmp_path, *small, "--", "--input_size", 32, "--decoder_depth", 1)
    (row,) = table(found, "Clips per second")
    assert row["clips/s"]["median"] > 0 and row["waiting for data"].endswith("%")
    assert found["Two processes on two cores"].startswith("1.00 x")


def test_masking(tmp_path, monkeypatch):
    monkeypatch.setattr(masking, "WINDOWS", ((4, 3, 3), (4, 6, 6)))
    found = results(masking, tmp_path, "--batch_size", 1, 2, "--repeats", 1, "--step", 2)
    for batch in (1, 2):
        rows = table(found, f"Milliseconds, batch {batch}")
        assert [row[""] for row in rows] == [f"masks, {rule}" for rule in RULES] + [
            f"loss, {form}" for form in SAMPLING_LOSSES
        ]
        for row in rows:
            few, many = (row[f"N {n}"]["median"] for n in (36, 144))
            assert row["exponent"] == pytest.approx(np.log(many / few) / np.log(4), abs=0.01)
    assert re.match(r"0\.\d\d% of 2 s with 4 clips", found["Share of a step"])


def test_a_dense_encoder_costs_more():
    model, cpu, clips = "pretrain_mae_st_tiny_patch8_64", torch.device("cpu"), torch.zeros(1, 3, 16, 64, 64).byte()
    steps = [encoder_step.build(cpu, None, dense=dense, model=model) for dense in (False, True)]
    sparse, dense = (harness.flops_of(lambda step=step: step(clips)) for step in steps)
    assert dense > 1.5 * sparse > 0
