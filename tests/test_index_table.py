"""The table of indexes: it returns what a scan returns, for the file as it is now, and scans once."""

import os
import pickle
import time

import numpy as np
import pytest
import torch
import videos
from videos import KINDS

from clips import index_table
from clips.index_table import RECORD, IndexTable
from clips.lists import read_list
from clips.transforms import build_pretrain_transform
from clips.video_index import VideoError, VideoIndex, index_video
from datasets import ClipSettings, TrainDataset
from loaders import LoadSettings, build_training_loader


@pytest.fixture
def scans(monkeypatch, tmp_path):
    """scans(): how many files were scanned since the last call, by all processes; files count as settled at once."""
    log = tmp_path / "scans.log"
    log.touch()

    def scan(path):
        with log.open("a") as file:
            file.write("a line\n")
        return index_video(path)

    def count():
        lines = len(log.read_text().splitlines())
        log.write_text("")
        return lines

    monkeypatch.setattr(index_table, "index_video", scan)
    monkeypatch.setattr(index_table, "SETTLED", -10.0)
    return count


@pytest.fixture
def path(tmp_path):
    return videos.write_video(tmp_path / "a.mp4", 20)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_the_same_from_the_table_as_from_the_file(tmp_path, scans, kind):
    path, table = videos.write_kind(tmp_path, kind), IndexTable(3)
    found = [table.find(number, path) for number in (1, 1, 2, 1)]
    assert found == [index_video(path)] * 4
    assert scans() == 2  # as video 1, and as video 2


def test_a_changed_file_is_scanned_again(path, scans, tmp_path):
    """Even one of the same size and time of modification, written in place or moved there."""
    other = videos.write_video(tmp_path / "b.mp4", 30).read_bytes()
    size = max(len(other), path.stat().st_size)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    times, table = (path.stat().st_atime_ns, path.stat().st_mtime_ns), IndexTable(1)
    assert [table.find(0, path).num_frames for _ in range(2)] == [20, 20] and scans() == 1
    time.sleep(0.05)
    path.write_bytes(other.ljust(size, b"\0"))
    os.utime(path, ns=times)
    assert [table.find(0, path).num_frames for _ in range(2)] == [30, 30] and scans() == 1
    moved = videos.write_video(tmp_path / "c.mp4", 25)
    moved.replace(path)
    assert [table.find(0, path).num_frames for _ in range(2)] == [25, 25] and scans() == 1


def test_a_file_that_breaks_or_goes_is_an_error_although_its_index_is_known(path, scans):
    table = IndexTable(1)
    table.find(0, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(VideoError):
        table.find(0, path)
    path.unlink()
    with pytest.raises(VideoError, match="FileNotFoundError"):
        table.find(0, path)


def test_the_index_of_a_file_that_is_just_being_written_is_not_kept(path, scans, monkeypatch):
    monkeypatch.setattr(index_table, "SETTLED", 60.0)
    table = IndexTable(1)
    assert table.find(0, path) == table.find(0, path) and scans() == 2


def test_what_a_forked_process_scans_all_know(path, scans):
    table = IndexTable(1)
    child = os.fork()
    if child == 0:
        table.find(0, path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and scans() == 1
    assert table.find(0, path) == index_video(path) and scans() == 0


def test_a_half_written_record_does_not_count(path, scans):
    table = IndexTable(1)
    table.find(0, path)
    table.memory[RECORD // 4] ^= 1
    assert table.find(0, path) == index_video(path) and scans() == 2


def test_an_index_too_long_for_the_table_is_found_all_the_same(tmp_path, scans):
    times = np.random.default_rng(0).permutation(2000)[:300]
    path, table = videos.write_video(tmp_path / "a.mp4", 300, times=sorted(times.tolist())), IndexTable(1)
    assert len(index_video(path).pack()) > RECORD
    assert table.find(0, path) == table.find(0, path) == index_video(path) and scans() == 2


def test_a_packed_index_is_whole():
    index = VideoIndex(3, 29.97, (48, 64), 1, [-512, 0, 2**40], [-512], frozenset({"rotated", "chroma"}))
    assert VideoIndex.unpack(index.pack() + b"\0\0") == index


def test_a_pickled_table_starts_empty(path, scans):
    table = IndexTable(1)
    table.find(0, path)
    assert pickle.loads(pickle.dumps(table)).find(0, path) == index_video(path) and scans() == 2


@pytest.mark.parametrize("timeout", [0, 60])
def test_training_scans_each_video_once_in_all_workers_together(tmp_path, scans, timeout):
    names = videos.write_videos(tmp_path, [20, 25, 30, 35])
    listed = read_list(videos.write_list(tmp_path / "list.csv", *names))
    crop = build_pretrain_transform("random_resized", size=16)

    def clips(num_workers):
        settings = ClipSettings(sampling="pretrain", num_frames=4, sampling_rate=2, decode_timeout=timeout)
        dataset = TrainDataset(videos=listed, transform=crop, settings=settings)
        loading = LoadSettings(batch_size=1, num_workers=num_workers, pin_memory=False)
        loader, batches = build_training_loader(dataset, loading), []
        for epoch in range(4):
            loader.sampler.set_epoch(epoch)
            batches += [batch["clips"] for batch in loader]
        return torch.cat(batches)

    shared = clips(num_workers=2)
    assert scans() == 4
    assert torch.equal(shared, clips(num_workers=0))
