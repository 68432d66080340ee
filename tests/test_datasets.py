import os
import pickle
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from videos import BROKEN, KINDS, read_numbers, write_broken, write_kind, write_list, write_video, write_videos

import datasets
from clips.decoders import DECODERS, resolve_decoder
from clips.lists import ListError, check_readable, parse_line, read_list
from clips.transforms import build_pretrain_transform
from clips.video_index import VideoError
from datasets import ClipSettings, NoReadableVideoError, TrainDataset
from loaders import EpochSampler, LoadSettings, build_training_loader, usable_workers
from utils import SettingError

FRAMES, RATE = 4, 3  # a clip spans 12 of the 30 frames
TRANSFORM = build_pretrain_transform("random_resized", size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine small videos of different lengths."""
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, range(30, 39))
    return folder


@pytest.fixture(scope="module")
def videos(folder):
    return read_list(write_list(folder / "good.csv", *(f"{k}.mp4 {k % 2}" for k in range(9))))


@pytest.fixture(scope="module")
def mixed(folder):
    """Three good videos; one that is not there and one that is no video."""
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    return read_list(write_list(folder / "mixed.csv", "0.mp4", "gone.mp4", "1.mp4", "noise.mp4", "2.mp4"))


SETTINGS = ClipSettings(sampling="pretrain", num_frames=FRAMES, sampling_rate=RATE)
LOADING = LoadSettings(batch_size=1, num_workers=0, pin_memory=False)


def dataset(videos, transform=TRANSFORM, max_tries=10, **settings):
    settings = replace(SETTINGS, **settings)
    return TrainDataset(videos=videos, transform=transform, settings=settings, max_tries=max_tries)


def loader(videos, num_sample=1, decoder="auto", **loading):
    return build_training_loader(dataset(videos, num_sample=num_sample, decoder=decoder), replace(LOADING, **loading))


def keep(clip, rng):
    """A transform that changes nothing."""
    return clip


# --- lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, expected",
    [
        ("a.mp4 3", ("a.mp4", 3)),
        ("a.mp4  3", ("a.mp4", 3)),
        ("a.mp4\t3", ("a.mp4", 3)),
        ("a.mp4 \t 3", ("a.mp4", 3)),
        ("a.mp4,3", ("a.mp4", 3)),
        ("a.mp4, 3", ("a.mp4", 3)),
        ("a.mp4", ("a.mp4", -1)),
        ("a.mp4 -1", ("a.mp4", -1)),
        ("78687", ("78687.mp4", -1)),
        ("78687 42", ("78687.mp4", 42)),
        ("v1.0/78687 42", ("v1.0/78687.mp4", 42)),
        ("my clips/take 2.webm 007", ("my clips/take 2.webm", 7)),
        ("take 2.mp4", ("take 2.mp4", -1)),
        ("take 2", ("take.mp4", 2)),
        ('"take 2"', ("take 2.mp4", -1)),
        ('"take 2" 5', ("take 2.mp4", 5)),
        ('"a.mp4 and b",5', ("a.mp4 and b", 5)),
        ("one, two.mp4 3", ("one, two.mp4", 3)),
        ("one,2.mp4", ("one,2.mp4", -1)),
        ("a.mp4 copy.mp4", ("a.mp4 copy.mp4", -1)),
        ("a.mp4.d/clip 1", ("a.mp4.d/clip.mp4", 1)),
        ("clip ３", ("clip ３.mp4", -1)),  # a full-width digit is no label
        ("/data/a.MP4 3", ("/data/a.MP4", 3)),
        ("a.mp4,dancing", ("a.mp4", "dancing")),
        ("a.mp4 dancing", ("a.mp4", "dancing")),
        ("my clips/take 2.webm,  salsa, slow", ("my clips/take 2.webm", "salsa, slow")),
        ("a.mp4,level 2", ("a.mp4", "level 2")),
        ("a.mp4 copy.mp4 tango", ("a.mp4 copy.mp4", "tango")),
        ('a.mp4,"say ""hi"", 3.0"', ("a.mp4", 'say "hi", 3.0')),
        ('a.mp4,"3.0"', ("a.mp4", "3.0")),
        ('"a.mp4","3"', ("a.mp4", 3)),
        ('"take, 2",walzer', ("take, 2.mp4", "walzer")),
        ('"a.mp4 and b"', ("a.mp4 and b", -1)),
        ("a.mp4,跳舞", ("a.mp4", "跳舞")),
    ],
)
def test_a_line_is_a_path_and_perhaps_a_label(line, expected):
    assert parse_line(line) == expected


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("a.mp4,dan\0cing", "not UTF-8"),
        ("take,dancing", "no suffix and a class name"),
        ("a.mp4 3.0", "3.0"),
        ("a.mp4 300 4", '"300"'),  # path, number of frames, label
        ("a.mp4 -2", "negative"),
        ("a.mp4,", 'followed by ","'),
        ("label,youtube_id,time_start", "heading"),
        (",3", "comma"),
        ('"" 3', "empty"),
        ("ftyp\0isom", "not text"),
    ],
)
def test_a_malformed_line_is_an_error_with_its_file_and_number(tmp_path, line, complaint):
    path = write_list(tmp_path / "bad.csv", "# heading", "good.mp4 1", "", line, "more.mp4 2")
    with pytest.raises(ListError, match=complaint) as error:
        read_list(path)
    assert str(error.value).startswith(f"{path}, line 4: ")


def test_a_video_given_as_the_list_is_an_error(folder):
    with pytest.raises(ListError, match=r"0\.mp4, line 1: .*not a video"):
        read_list(folder / "0.mp4")


def test_comments_empty_lines_and_windows_files(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes("\ufeff# comment\r\n\r\n  a.mp4\t1  \r\n   # another\r\nb 2\r\n".encode())
    assert [tuple(v) for v in read_list(path)] == [(f"{tmp_path}/a.mp4", 1), (f"{tmp_path}/b.mp4", 2)]


def test_relative_paths_start_at_the_data_root_or_else_at_the_list(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = write_list(tmp_path / "list.txt", "sub/a.mp4 0", "/absolute/b.mp4 1")
    assert [v.path for v in read_list(path)] == [f"{tmp_path}/sub/a.mp4", "/absolute/b.mp4"]
    moved = read_list(path, data_root=tmp_path / "elsewhere")
    assert [v.path for v in moved] == [f"{tmp_path}/elsewhere/sub/a.mp4", "/absolute/b.mp4"]


@pytest.mark.parametrize("name, what", [("absent.csv", "does not exist"), (".", "is a folder")])
def test_a_missing_list_is_named(tmp_path, name, what):
    with pytest.raises(ListError, match=what) as error:
        read_list(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "--data_path" in str(error.value)


def test_a_missing_data_root_is_named(tmp_path):
    path = write_list(tmp_path / "list.csv", "a.mp4 0")
    with pytest.raises(ListError, match=r"nowhere.*--data_root"):
        read_list(path, data_root=tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_an_empty_list_is_an_error(tmp_path, text):
    path = tmp_path / "empty.csv"
    path.write_text(text)
    with pytest.raises(ListError, match=r"empty\.csv is empty"):
        read_list(path)


def test_a_list_survives_pickling_and_any_file_name(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes("häuser 🎬.mp4 3\n".encode() + b"latin-\xe9.mp4\n")
    videos = pickle.loads(pickle.dumps(read_list(path)))
    assert len(videos) == 2
    assert videos[0] == (f"{tmp_path}/häuser 🎬.mp4", 3)
    assert videos[1].path.encode(errors="surrogateescape").endswith(b"latin-\xe9.mp4")
    assert videos[1].label is None
    with pytest.raises(IndexError):
        videos[2]


# --- samples ------------------------------------------------------------------------------------------------


def test_a_sample_holds_uint8_clips(videos):
    sample = dataset(videos, num_sample=3)[0, 5]
    assert sample["clips"].shape == (3, 3, FRAMES, 16, 16)
    assert sample["clips"].dtype == torch.uint8
    assert sample["index"] == 5 and sample["bad"] == []


def test_clips_show_the_frames_of_the_clip_rule_each_from_its_own_start(videos):
    starts = set()
    for epoch in range(6):
        for clip in dataset(videos, transform=keep, num_sample=4)[epoch, 0]["clips"]:
            numbers = read_numbers(clip.transpose(0, 1))
            assert numbers == [numbers[0] + k * RATE for k in range(FRAMES)]
            starts.add(numbers[0])
    assert min(starts) >= 0 and max(starts) <= 30 - FRAMES * RATE
    assert len(starts) > 10


def test_a_short_video_repeats_its_last_reachable_frame(tmp_path):
    write_video(tmp_path / "short.mp4", 7)
    videos = read_list(write_list(tmp_path / "list.csv", "short.mp4"))
    clip = dataset(videos, transform=keep)[0, 0]["clips"][0]
    assert read_numbers(clip.transpose(0, 1)) == [0, 3, 3, 3]


def test_the_clips_of_a_video_come_from_one_decoding_and_have_their_own_crops(videos, monkeypatch):
    opened, decoded, crops = [], [], []
    open_video = datasets.open_video

    def open_and_record(path, *args):
        opened.append(path)
        video = open_video(path, *args)
        get_frames = video.get_frames
        video.get_frames = lambda indices: decoded.append(indices) or get_frames(indices)
        return video

    def draw_and_record(clip, rng):
        crops.append(TRANSFORM.draw(64, 48, rng))
        return clip

    monkeypatch.setattr(datasets, "open_video", open_and_record)
    dataset(videos, transform=draw_and_record, num_sample=4)[0, 0]
    assert len(opened) == len(decoded) == 1
    assert len(set(crops)) == 4


def test_a_sample_depends_on_seed_epoch_and_index_alone(videos):
    def clips(epoch, index, seed=0):
        return dataset(videos, seed=seed)[epoch, index]["clips"]

    assert torch.equal(clips(2, 3), clips(2, 3))
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(clips(2, 3), clips(2, 3))
    others = [clips(1, 3), clips(2, 4), clips(2, 3, seed=1)]
    assert not any(torch.equal(clips(2, 3), other) for other in others)


def test_the_data_set_can_be_sent_to_workers_that_do_not_fork(videos):
    data = dataset(videos)
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent[1, 2]["clips"], data[1, 2]["clips"])


# --- unreadable videos --------------------------------------------------------------------------------------


def test_an_unreadable_video_is_reported_and_replaced_the_same_way_each_time(mixed):
    for index, name in ((1, "gone.mp4"), (3, "noise.mp4")):
        first, second = (dataset(mixed)[7, index] for _ in range(2))
        assert first["bad"][0][0].endswith(name) and first["bad"][0][1]
        assert first["index"] in (0, 2, 4)
        assert torch.equal(first["clips"], second["clips"]) and first["bad"] == second["bad"]
    shown = {dataset(mixed)[epoch, 1]["index"] for epoch in range(20)}
    assert shown == {0, 2, 4}


def test_too_many_unreadable_videos_in_a_row_are_an_error_that_lists_them(tmp_path):
    videos = read_list(write_list(tmp_path / "list.csv", "x.mp4", "y.mp4"))
    with pytest.raises(NoReadableVideoError) as error:
        dataset(videos, max_tries=3)[0, 0]
    lines = str(error.value).splitlines()
    assert lines[0].startswith("3 videos") and "list.csv" in lines[0]
    assert len(lines) == 4 and "x.mp4" in lines[1]


def test_that_error_reaches_the_training_process_from_a_worker(tmp_path):
    videos = read_list(write_list(tmp_path / "list.csv", "x.mp4", "y.mp4"))
    with pytest.raises(NoReadableVideoError, match=r"x\.mp4"):
        list(loader(videos, batch_size=2, num_workers=1))


def test_bad_videos_are_counted_by_the_batch(mixed):
    batches = list(loader(mixed, batch_size=5))
    assert len(batches) == 1
    names = [path.rsplit("/", 1)[1] for path, _ in batches[0]["bad"]]
    assert names.count("gone.mp4") >= 1 and names.count("noise.mp4") >= 1
    assert set(batches[0]["index"].tolist()) <= {0, 2, 4}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_video_gives_a_sample(tmp_path, kind):
    path = write_kind(tmp_path, kind)
    sample = dataset(read_list(write_list(tmp_path / "list.csv", path.name)), transform=keep)[0, 0]
    assert sample["bad"] == [] and None not in read_numbers(sample["clips"][0].transpose(0, 1))


@pytest.mark.parametrize("defect", BROKEN)
def test_every_defect_is_reported_and_replaced(tmp_path, defect):
    path = write_broken(tmp_path, defect)
    write_video(tmp_path / "good.mp4", 60)
    videos = read_list(write_list(tmp_path / "list.csv", f'"{path.name}"', "good.mp4"))
    samples = [dataset(videos, num_frames=16)[epoch, 0] for epoch in range(8)]  # a clip may miss the damage
    reported = [sample for sample in samples if sample["bad"]]
    assert len(reported) == 8 or ("damaged" in defect and len(reported) > 2)
    for sample in reported:
        (name, reason), *_ = sample["bad"]
        assert name == str(path) and reason and "\n" not in reason and sample["index"] == 1


class Troubled(TrainDataset):
    """Decoding that hangs for one video and crashes the process for another; or raises for both."""

    raises = False

    def load_clips(self, video, rng):
        name = os.path.basename(video.path)
        if name in ("7.mp4", "8.mp4") and self.raises:
            raise VideoError(video.path, "is no good")
        if name == "7.mp4":
            time.sleep(1000)
        if name == "8.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().load_clips(video, rng)


def troubled(videos, **settings):
    return Troubled(videos=videos, transform=TRANSFORM, settings=replace(SETTINGS, **settings))


@pytest.mark.parametrize(
    ("slurm", "cores", "processes", "workers"),
    [
        (None, 96, None, 10),  # at most what is asked for
        (None, 96, 16, 6),  # torchrun
        (None, 2, None, 2),
        (None, 2, 8, 1),  # never none
        ("12", 96, None, 12),  # srun: all that SLURM gives
        ("3", 96, None, 3),
        ("96", 96, 8, 12),  # torchrun in a task of SLURM
    ],
)
def test_workers_follow_the_cores_of_the_process(monkeypatch, slurm, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name, value in (("SLURM_CPUS_PER_TASK", slurm), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert usable_workers(10) == workers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_decoder_that_hangs_or_crashes_stops_nothing(videos, num_workers):
    data = troubled(videos, decode_timeout=6)
    batches = list(build_training_loader(data, replace(LOADING, num_workers=num_workers)))
    assert len(batches) == 9
    bad = {path.rsplit("/", 1)[1]: reason for batch in batches for path, reason in batch["bad"]}
    assert bad == {
        "7.mp4": "decoding took longer than 6 s (--decode_timeout)",
        "8.mp4": "the decoder crashed (signal SIGSEGV)",
    }
    assert {i for batch in batches for i in batch["index"].tolist()} == set(range(7))


def test_the_replacement_does_not_depend_on_what_was_wrong(videos):
    hanging, raising = troubled(videos, decode_timeout=3), troubled(videos)
    raising.raises = True
    for epoch in range(2):
        one, other = hanging[epoch, 8], raising[epoch, 8]  # a crash, an exception
        assert one["index"] == other["index"] and torch.equal(one["clips"], other["clips"])
    assert [path for path, _ in one["bad"]] == [path for path, _ in other["bad"]]


def test_an_attempt_has_a_generator_of_its_own(videos):
    data = dataset(videos)
    draws = {tuple(data._draw(*key)[0].random(2)) for key in [(0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 1), (0, 2, 1)]}
    assert len(draws) == 5
    assert data._draw(3, 4, 0)[1] == 4 and 4 not in {data._draw(e, 4, a)[1] for e in range(9) for a in range(1, 9)}


def test_decoding_in_a_child_process_changes_no_byte(videos):
    here, there = dataset(videos, num_sample=2), dataset(videos, num_sample=2, decode_timeout=60)
    for index in range(3):
        assert torch.equal(here[1, index]["clips"], there[1, index]["clips"])


def test_check_readable_finds_the_first_video_that_decodes(folder, mixed):
    assert check_readable(mixed) == f"{folder}/0.mp4"
    later = read_list(write_list(folder / "later.csv", "gone.mp4", "noise.mp4", "4.mp4"))
    assert check_readable(later) == f"{folder}/4.mp4"


def test_check_readable_names_the_list_and_the_reasons(folder):
    videos = read_list(write_list(folder / "none.csv", *(f"gone{k}.mp4" for k in range(6))))
    with pytest.raises(ListError, match=r"none of 6 videos.*none\.csv.*--data_root") as error:
        check_readable(videos)
    assert [f"gone{k}.mp4" in str(error.value) for k in range(6)] == [True] * 3 + [False] * 3
    with pytest.raises(ListError, match="none of 2 videos"):
        check_readable(videos, limit=2)


# --- epochs and batches -------------------------------------------------------------------------------------


def samplers(world_size, **settings):
    num_videos, seed = settings.pop("num_videos", 103), settings.pop("seed", 0)
    loading = LoadSettings(**{"batch_size": 4, "world_size": world_size, **settings})
    return [EpochSampler(num_videos=num_videos, seed=seed, loading=replace(loading, rank=r)) for r in range(world_size)]


def indices(sampler):
    return [index for _, index in sampler]


def test_ranks_share_an_epoch_without_overlap_and_take_equally_many_steps():
    ranks = samplers(3)
    assert {s.steps_per_epoch for s in ranks} == {103 // 12}
    shares = [indices(s) for s in ranks]
    assert {len(s) for s in shares} == {103 // 12 * 4} == {len(s) for s in ranks}
    together = [index for share in shares for index in share]
    assert len(set(together)) == len(together) == 96
    assert set(together) <= set(range(103))


def test_every_step_is_the_same_set_of_videos_for_any_number_of_ranks():
    (alone,) = samplers(1, batch_size=12)
    alone = np.array(indices(alone)).reshape(-1, 12)
    for world_size in (2, 3):
        shares = [indices(s) for s in samplers(world_size, batch_size=12 // world_size)]
        steps = np.concatenate([np.reshape(s, (8, -1)) for s in shares], axis=1)
        assert np.array_equal(np.sort(steps), np.sort(alone))


def test_epochs_and_seeds_differ_and_repeat():
    (sampler,) = samplers(1)
    first = list(sampler)
    assert list(sampler) == first and {epoch for epoch, _ in first} == {0}
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in second] != [i for _, i in first]
    assert indices(samplers(1, seed=1)[0]) != [i for _, i in first]
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_what_an_epoch_leaves_out_changes():
    (sampler,) = samplers(1, num_videos=5)
    left_out = set()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        left_out |= set(range(5)) - set(indices(sampler))
    assert left_out == set(range(5))


def test_an_epoch_can_be_entered_in_the_middle():
    for sampler in samplers(2):
        sampler.set_epoch(3)
        whole = list(sampler)
        sampler.set_epoch(3, start_step=5)
        assert list(sampler) == whole[20:] and len(sampler) == len(whole) - 20
        sampler.set_epoch(3, start_step=sampler.steps_per_epoch)
        assert list(sampler) == []
        with pytest.raises(ValueError, match="start_step 13"):
            sampler.set_epoch(3, start_step=13)


def test_fewer_videos_than_one_step_is_an_error():
    with pytest.raises(ValueError, match=r"7 videos.*--batch_size 4 x --update_freq 1 x 2 processes"):
        samplers(2, num_videos=7)
    with pytest.raises(ValueError, match=r"20 videos.*--update_freq 3"):
        samplers(2, num_videos=20, update_freq=3)


def test_an_epoch_is_a_whole_number_of_optimiser_steps():
    assert [samplers(2, update_freq=u)[1].steps_per_epoch for u in (1, 2, 5)] == [12, 12, 10]


def test_a_batch_holds_all_clips_of_its_videos_in_order(videos):
    whole = loader(videos, batch_size=4, num_sample=2)
    assert len(whole) == 2
    batch = next(iter(whole))
    assert batch["clips"].shape == (8, 3, FRAMES, 16, 16) and batch["clips"].dtype == torch.uint8
    assert batch["index"].shape == (4,) and batch["index"].dtype == torch.int64
    assert batch["bad"] == []
    data = dataset(videos, num_sample=2)
    expected = torch.cat([data[0, i]["clips"] for i in batch["index"].tolist()])
    assert torch.equal(batch["clips"], expected)


def by_video(loaders, epoch):
    """All clips of an epoch as bytes, by the index of their video."""
    clips = {}
    for one in loaders:
        one.sampler.set_epoch(epoch)
        for batch in one:
            clips.update(zip(batch["index"].tolist(), (c.numpy().tobytes() for c in batch["clips"])))
    return clips


def test_workers_and_ranks_change_no_byte(videos):
    alone = [loader(videos, batch_size=4)]
    workers = [loader(videos, batch_size=4, num_workers=2)]
    ranks = [loader(videos, batch_size=2, rank=r, world_size=2) for r in range(2)]
    epochs = [by_video(alone, epoch) for epoch in range(2)]
    assert [len(e) for e in epochs] == [8, 8]
    for epoch, expected in enumerate(epochs):
        assert by_video(workers, epoch) == expected  # the workers live through both epochs
        assert by_video(ranks, epoch) == expected
    assert all(epochs[0][i] != epochs[1][i] for i in epochs[0].keys() & epochs[1].keys())


@pytest.mark.parametrize("decoder", DECODERS)
def test_workers_decode_after_the_training_process_has(videos, decoder):
    try:
        resolve_decoder(decoder)
    except SettingError as error:
        pytest.skip(str(error))
    check_readable(videos, decoder)
    batches = list(loader(videos, batch_size=4, num_workers=2, decoder=decoder))
    assert len(batches) == 2 and all(batch["bad"] == [] for batch in batches)


def test_the_loader_leaves_the_global_random_states_alone(videos):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(videos, batch_size=4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
