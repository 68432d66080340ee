"""The book of unreadable videos: each recorded once, by all ranks together, until there are too many."""

import csv

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from runs.bad_videos import BadVideos, TooManyBadVideos, read_bad_videos

GONE = ("videos/gone.mp4", "FileNotFoundError: no such file")
ODD = ('odd "name",\n of a vidéo.mp4', "is empty (0 bytes)")


def book(folder="", **settings):
    return BadVideos(**{"output_dir": str(folder), "num_videos": 1000, "limit": 0.01, **settings})


def rows(folder):
    with open(folder / "bad_videos.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_each_video_is_written_once_with_its_first_reason(tmp_path):
    bad = book(tmp_path / "out")
    bad.add([GONE, ODD, (GONE[0], "another reason")])
    assert bad.pending == 2 and not (tmp_path / "out").exists()
    assert bad.share() == [GONE, ODD]
    bad.add([GONE])
    assert bad.pending == 0 and len(bad) == 2 and bad.share() == []
    assert rows(tmp_path / "out") == [["path", "reason"], list(GONE), list(ODD)]


def test_a_resumed_run_goes_on_with_the_file(tmp_path):
    before = book(tmp_path)
    before.add([GONE, ODD])
    before.share()
    after = book(tmp_path)
    after.add([ODD, ("new.mp4", "why")])
    assert after.pending == 1 and after.share() == [("new.mp4", "why")]
    assert [row[0] for row in rows(tmp_path)] == ["path", GONE[0], ODD[0], "new.mp4"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = book("")
    bad.add([GONE])
    assert bad.share() == [GONE] and list(tmp_path.iterdir()) == []


def test_any_file_name_can_be_recorded(tmp_path):
    path = b"latin-\xe9.mp4".decode(errors="surrogateescape")
    bad = book(tmp_path)
    bad.add([(path, "why")])
    bad.share()
    assert read_bad_videos(tmp_path / "bad_videos.csv") == {path: "why"}


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "bad_videos.csv").write_text("a list of mine\n")
    with pytest.raises(ValueError, match=r"bad_videos\.csv has no columns path, reason: move it away"):
        book(tmp_path)


def test_more_than_the_limit_stops_the_run_and_says_what_to_do(tmp_path):
    bad = book(tmp_path, num_videos=300)  # 1 % of 300 are 3
    bad.add([(f"{k}.mp4", f"reason {k}") for k in range(3)])
    bad.share()
    bad.add([("3.mp4", "reason 3")])
    with pytest.raises(TooManyBadVideos, match=r"4 of 300 videos.*--max_bad_videos 0\.01 allows 3") as error:
        bad.share()
    assert all(word in str(error.value) for word in ("--data_root", str(tmp_path), "0.mp4: reason 0"))
    assert len(rows(tmp_path)) == 5  # the last one is recorded too


@pytest.mark.parametrize("limit", [0.01, 0.0])
def test_one_bad_video_never_stops_a_run(limit):
    bad = book(num_videos=10, limit=limit)
    bad.add([GONE])
    bad.share()
    bad.add([ODD])
    with pytest.raises(TooManyBadVideos, match="allows 1"):
        bad.share()


def test_a_full_disk_is_told_and_tried_again(tmp_path, monkeypatch):
    warnings = []
    bad = book(tmp_path, warn=warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        bad.add([GONE])
        assert bad.share() == [GONE]
    assert len(warnings) == 1 and "No space left" in warnings[0]
    bad.add([ODD])
    bad.share()
    assert len(rows(tmp_path)) == 3 and len(warnings) == 1


def one_rank(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    bad = book(folder, num_videos=300, is_main=rank == 0)
    bad.add([GONE] if rank == 0 else [])  # already in the file
    bad.add([("shared.mp4", f"seen by rank {rank}"), ODD] if rank == 1 else [("shared.mp4", "seen by rank 0")])
    assert bad.pending == (1 if rank == 0 else 2)
    assert sorted(bad.share()) == sorted([("shared.mp4", "seen by rank 0"), ODD])
    assert bad.pending == 0 and len(bad) == 3
    if rank == 1:
        bad.add([("one more.mp4", "why")])
    with pytest.raises(TooManyBadVideos, match="4 of 300"):
        bad.share()
    dist.destroy_process_group()


def test_ranks_share_what_they_met_and_stop_together(tmp_path):
    first = book(tmp_path)
    first.add([GONE])
    first.share()
    mp.start_processes(one_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    assert len(rows(tmp_path)) == 5
