import pickle
from dataclasses import replace

import golden
import numpy as np
import pytest
import torch
from golden import needs_golden
from videos import read_numbers, write_list, write_video, write_videos

import datasets
from clips.class_names import check_labels
from clips.finetune_transforms import build_finetune_transform
from clips.frame_indices import dense_views, segment_views
from clips.lists import ListError, read_list, read_splits
from clips.transforms import EvenCrops
from datasets import DATA_SETS, FRAME_RULES, ClipSettings, EvalDataset, TrainDataset, resolve_data_set
from loaders import LoadSettings, build_finetuning_loaders, evaluation_share

FRAMES, RATE = 4, 3  # a clip spans 12 of the 30 frames
TRANSFORM = build_finetune_transform(size=16, flip=True)
CUSTOM = resolve_data_set("custom", num_classes=3, test_segments=2, test_crops=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven small videos of different lengths with labels 0, 1 and 2, and a train, val and test list."""
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, range(30, 37))
    for split in ("train", "val", "test"):
        write_list(folder / f"{split}.csv", *(f"{name} {k % 3}" for k, name in enumerate(names)))
    return folder


@pytest.fixture(scope="module")
def videos(folder):
    return read_list(folder / "train.csv")


@pytest.fixture(scope="module")
def mixed(folder):
    """Two good videos, of classes 0 and 2, and two of class 1 that cannot be read."""
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    return read_list(write_list(folder / "mixed.csv", "0.mp4 0", "gone.mp4 1", "noise.mp4 1", "1.mp4 2"))


def keep(clip, rng):
    """A transform that changes nothing."""
    return clip


SETTINGS = ClipSettings(sampling="dense", num_frames=FRAMES, sampling_rate=RATE, share_frames=True)
LOADING = LoadSettings(batch_size=2, num_workers=0)


def training(videos, transform=keep, **settings):
    settings = replace(SETTINGS, **settings)
    return TrainDataset(videos=videos, transform=transform, settings=settings)


def evaluation(videos, num_crops=1, num_segments=None, random_clips=False, **settings):
    return EvalDataset(
        videos=videos,
        crops=EvenCrops(short_side=48, size=48, num_crops=num_crops),
        settings=replace(SETTINGS, **settings),
        num_segments=num_segments,
        random_clips=random_clips,
    )


def loaders(splits, short_side=16, num_sample=2, **loading):
    return build_finetuning_loaders(
        splits=splits,
        data_set=CUSTOM,
        transform=TRANSFORM,
        settings=replace(SETTINGS, num_sample=num_sample),
        loading=replace(LOADING, **loading),
        input_size=16,
        short_side=short_side,
    )


def numbers(clip):
    """Frame numbers that a clip (C,T,H,W) shows."""
    return read_numbers(clip.transpose(0, 1))


# --- the table of data sets ---------------------------------------------------------------------------------


def test_the_table_holds_the_published_data_sets():
    classes = {name: d.num_classes for name, d in DATA_SETS.items()}
    assert classes == {
        "Kinetics-400": 400,
        "Kinetics-600": 600,
        "Kinetics-700": 700,
        "Kinetics-710": 710,
        "SSV2": 174,
        "UCF101": 101,
        "HMDB51": 51,
        "Diving48": 48,
        "Jester": 27,
        "custom": None,
    }
    assert [name for name, d in DATA_SETS.items() if not d.flip] == ["SSV2", "Jester"]
    whole = ("SSV2", "Diving48", "Jester")  # the action is recognised from the whole video
    assert all(DATA_SETS[name][1:] == ("segments", name == "Diving48", 2, 3) for name in whole)
    assert all(d[1:] == ("dense", True, 5, 3) for name, d in DATA_SETS.items() if name not in whole)


def test_flags_replace_entries_of_the_table():
    assert resolve_data_set("SSV2") == DATA_SETS["SSV2"]
    assert resolve_data_set("SSV2", num_classes=174, sampling="segments_published", test_crops=1) == (
        174,
        "segments_published",
        False,
        2,
        1,
    )
    assert resolve_data_set("custom", num_classes=12, sampling="segments", flip=False)[:3] == (12, "segments", False)


@pytest.mark.parametrize(
    "name, settings, complaint",
    [
        ("ImageNet", {}, r"--data_set ImageNet.*SSV2.*custom"),
        ("custom", {}, r"custom needs --nb_classes"),
        ("custom", {"num_classes": 0}, r"custom needs --nb_classes"),
        ("SSV2", {"num_classes": 10}, r"--nb_classes 10, but SSV2 has 174 classes.*custom"),
        ("SSV2", {"sampling": "random"}, r"--sampling random.*dense"),
        ("SSV2", {"test_segments": 0}, r"--test_num_segment"),
        ("SSV2", {"test_crops": 0}, r"--test_num_crop"),
    ],
)
def test_impossible_settings_are_named(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        resolve_data_set(name, **settings)


# --- labels and folders -------------------------------------------------------------------------------------


def test_a_label_out_of_range_names_its_line_and_both_numbers(tmp_path):
    lines = ["# heading", "a.mp4 9", "", "b.mp4  12", "c.mp4\t173", "d e.mp4 10"]
    videos = read_list(write_list(tmp_path / "train.csv", *lines))
    with pytest.raises(ListError, match=r"train\.csv, line 4: the label 12 .* 10 classes .* up to 173"):
        check_labels(videos, 10)
    with pytest.raises(ListError, match=r"line 5: the label 173 .* 173 classes"):
        check_labels(videos, 173)
    check_labels(videos, 174)


def test_a_missing_label_names_its_line(tmp_path):
    videos = read_list(write_list(tmp_path / "train.csv", "a.mp4 1", "b.mp4", "c.mp4 -1"))
    with pytest.raises(ListError, match=r"train\.csv, line 2: no label.*0 to 4.*2 of 3"):
        check_labels(videos, 5)


def test_the_lists_of_a_folder_are_read_and_checked(folder, tmp_path):
    splits = read_splits(folder)
    assert list(splits) == ["train", "val", "test"]
    assert all(len(videos) == 7 for videos in splits.values())
    assert list(read_splits(folder, splits=("test",))) == ["test"]
    assert read_splits(folder, data_root=tmp_path)["val"].root == str(tmp_path)


def test_a_missing_folder_or_list_is_named(folder, tmp_path):
    with pytest.raises(ListError, match=r"nowhere does not exist.*--data_path"):
        read_splits(tmp_path / "nowhere")
    with pytest.raises(ListError, match=r"train\.csv is a file.*--data_path.*folder"):
        read_splits(folder / "train.csv")
    write_list(tmp_path / "train.csv", "a.mp4 0")
    with pytest.raises(ListError, match=r"^val\.csv and test\.csv missing in the folder .*copy of val"):
        read_splits(tmp_path)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", FRAME_RULES)
def test_the_clips_of_a_video_show_the_same_frames(videos, sampling):
    seen = set()
    for epoch in range(8):
        sample = training(videos, sampling=sampling, num_sample=3)[epoch, 4]
        assert sample["clips"].shape == (3, 3, FRAMES, 48, 64) and sample["clips"].dtype == torch.uint8
        shown = {tuple(numbers(clip)) for clip in sample["clips"]}
        assert len(shown) == 1 and None not in next(iter(shown))
        seen |= shown
        assert (sample["index"], sample["label"], sample["bad"]) == (4, 1, [])
    assert len(seen) > 4


def test_dense_and_segment_clips_follow_their_rules(videos):
    for epoch in range(10):
        dense = numbers(training(videos)[epoch, 0]["clips"][0])
        assert np.diff(dense).tolist() == [4, 4, 3]  # spread over 12 frames, as published
        for sampling in ("segments", "segments_published"):
            parts = numbers(training(videos, sampling=sampling)[epoch, 0]["clips"][0])
            assert [n // 7 for n in parts] == [0, 1, 2, 3]


def test_a_video_of_fewer_frames_than_segments_moves_or_not(tmp_path):
    write_video(tmp_path / "short.mp4", 3)
    short = read_list(write_list(tmp_path / "list.csv", "short.mp4 0"))
    assert numbers(training(short, sampling="segments")[0, 0]["clips"][0]) == [0, 0, 1, 2]
    assert numbers(training(short, sampling="segments_published")[0, 0]["clips"][0]) == [0] * 4


def test_each_clip_of_a_video_is_augmented_on_its_own_from_one_decoding(videos, monkeypatch):
    opened = []
    open_video = datasets.open_video
    monkeypatch.setattr(datasets, "open_video", lambda *args: opened.append(args) or open_video(*args))
    clips = training(videos, transform=TRANSFORM, num_sample=4)[0, 0]["clips"]
    assert len(opened) == 1
    assert len({clip.numpy().tobytes() for clip in clips}) == 4


def test_a_sample_depends_on_seed_epoch_and_index_alone(videos):
    def clips(epoch, index, seed=0):
        return training(videos, transform=TRANSFORM, num_sample=2, seed=seed)[epoch, index]["clips"]

    first = clips(2, 3)
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(clips(2, 3), first)
    others = [clips(1, 3), clips(2, 4), clips(2, 3, seed=1)]
    assert not any(torch.equal(first, other) for other in others)


def test_an_unreadable_video_of_training_is_replaced_with_its_label(mixed):
    shown = set()
    for epoch in range(12):
        sample = training(mixed)[epoch, 1]
        assert sample["bad"][0][0].endswith("gone.mp4") and sample["bad"][0][1]
        shown.add((sample["index"], sample["label"]))
    assert shown == {(0, 0), (3, 2)}


# --- validation and test ------------------------------------------------------------------------------------


def test_validation_is_the_middle_clip_or_a_drawn_one(videos):
    data = evaluation(videos)
    sample = data[0]
    assert sample["clips"].shape == (1, 3, FRAMES, 48, 48) and sample["clips"].dtype == torch.uint8
    assert numbers(sample["clips"][0])[0] == (30 - 1 - 12) // 2
    assert data.views == [(0, 0)] and (sample["index"], sample["label"], sample["bad"]) == (0, 0, [])
    drawn = evaluation(videos, random_clips=True)
    starts = [numbers(drawn[i]["clips"][0])[0] for i in range(7)]
    assert starts == [numbers(drawn[i]["clips"][0])[0] for i in range(7)]
    assert len(set(starts)) > 3
    assert starts != [numbers(evaluation(videos, random_clips=True, seed=1)[i]["clips"][0])[0] for i in range(7)]


@pytest.mark.parametrize(
    "sampling, rule",
    [("dense", lambda n, v: dense_views(n, FRAMES, RATE, v)), ("segments", lambda n, v: segment_views(n, FRAMES, v))],
)
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_a_test_shows_every_segment_by_every_crop(videos, monkeypatch, sampling, rule, segments):
    opened = []
    open_video = datasets.open_video
    monkeypatch.setattr(datasets, "open_video", lambda *args: opened.append(args) or open_video(*args))
    data = evaluation(videos, sampling=sampling, num_segments=segments, num_crops=3)
    sample = data[5]
    assert len(opened) == 1
    assert sample["clips"].shape == (3 * segments, 3, FRAMES, 48, 48)
    assert data.views == [(s, c) for s in range(segments) for c in range(3)]
    with open_video(videos[5].path) as video:
        frames = video.get_frames(range(video.num_frames))
    expected = rule(35, segments)
    for (segment, crop), clip in zip(data.views, sample["clips"]):
        window = frames[expected[segment]][..., 8 * crop : 8 * crop + 48]  # 48 x 64 is not resized
        assert torch.equal(clip.transpose(0, 1), window)


@needs_golden
@pytest.mark.parametrize("table, sampling", [("k400_test_views", "dense"), ("ssv2_test_views", "segments")])
def test_views_of_a_test_are_the_published_ones(table, sampling):
    class Stub:
        fps = 30.0

    rows = golden.table("frame_index_tables")[table]
    rows = [row for row in rows if sampling == "dense" or row["test_num_segment"] == 2]
    assert rows
    for row in rows:
        Stub.num_frames, length = row["num_frames"], row.get("clip_len", row.get("num_segments"))
        views = FRAME_RULES[sampling].views(Stub, length, row.get("sampling_rate"), row["test_num_segment"])
        assert views.tolist() == row["views"]


def test_mae_st_spans_the_same_time_at_any_frame_rate(tmp_path):
    for fps in (15, 30):
        write_video(tmp_path / f"{fps}.mp4", 60, fps=fps)
    videos = read_list(write_list(tmp_path / "list.csv", "15.mp4 0", "30.mp4 0"))
    spans = []
    for sample in (evaluation(videos, sampling="mae_st", num_segments=3)[i] for i in range(2)):
        shown = [numbers(clip) for clip in sample["clips"]]
        spans.append(shown[0][-1] - shown[0][0] + 1)
        assert shown[0][0] == 0 and shown[2][-1] == 59
    assert spans == [6, 12]


def test_an_unreadable_video_of_a_test_is_reported_and_not_replaced(mixed):
    for index in (1, 2):
        sample = evaluation(mixed, num_segments=2)[index]
        assert sample["clips"] is None and (sample["index"], sample["label"]) == (index, 1)
        ((path, reason),) = sample["bad"]
        assert path == mixed[index].path and reason


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_videos", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_see_every_video_once_whatever_the_remainder(num_videos, world_size):
    ranks = [evaluation_share(num_videos, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(i for rank in ranks for i in rank) == list(range(num_videos))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    alone = [evaluation_share(num_videos, rank=r, world_size=world_size, spread=False) for r in range(world_size)]
    assert [list(rank) for rank in alone] == [list(range(num_videos))] + [[]] * (world_size - 1)


def test_a_training_batch_has_a_label_for_each_clip(folder):
    train = loaders(read_splits(folder), num_sample=2)["train"]
    batches = list(train)
    assert len(batches) == len(train) == 3
    for batch in batches:
        assert batch["clips"].shape == (4, 3, FRAMES, 16, 16) and batch["clips"].dtype == torch.uint8
        assert batch["label"].tolist() == [i % 3 for i in batch["index"].tolist() for _ in range(2)]
        assert batch["label"].dtype == torch.int64 and batch["bad"] == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_validation_and_test_batches(folder, num_workers):
    splits = read_splits(folder, splits=("val", "test"))
    built = loaders(splits, num_workers=num_workers, batch_size=8)
    val, test = list(built["val"]), list(built["test"])
    assert [len(b["index"]) for b in val] == [7]  # up to 12 clips
    assert [len(b["index"]) for b in test] == [2, 2, 2, 1]  # up to 12 clips, 6 a video
    assert built["test"].dataset.views == [(s, c) for s in range(2) for c in range(3)]
    for batches, num_views in ((val, 1), (test, 6)):
        assert torch.cat([b["index"] for b in batches]).tolist() == list(range(7))
        assert torch.cat([b["label"] for b in batches]).tolist() == [k % 3 for k in range(7)]
        clips = torch.cat([b["clips"] for b in batches])
        assert clips.shape == (7, num_views, 3, FRAMES, 16, 16) and clips.dtype == torch.uint8


def test_batches_of_a_test_report_what_could_not_be_read(mixed):
    test = loaders({"test": mixed}, batch_size=4)["test"]  # one video a batch
    batches = list(test)
    assert [b["index"].tolist() for b in batches] == [[0], [], [], [3]]
    assert [len(b["clips"]) for b in batches] == [1, 0, 0, 1]
    bad = [entry for b in batches for entry in b["bad"]]
    assert [(index, path) for index, path, _ in bad] == [(1, mixed[1].path), (2, mixed[2].path)]
    (whole,) = loaders({"val": mixed}, batch_size=4)["val"]
    assert whole["index"].tolist() == [0, 3] and whole["label"].tolist() == [0, 2]
    assert [index for index, _, _ in whole["bad"]] == [1, 2]


def test_ranks_test_every_video_once_with_the_same_pixels(folder):
    splits = read_splits(folder, splits=("test",))

    def by_video(ranks):
        found = []
        for rank in range(ranks):
            for batch in loaders(splits, rank=rank, world_size=ranks)["test"]:
                found += zip(batch["index"].tolist(), (c.numpy().tobytes() for c in batch["clips"]))
        return found

    alone, three = by_video(1), by_video(3)
    assert len(three) == 7 and sorted(three) == sorted(alone)


def test_only_the_loaders_asked_for_are_built_and_settings_are_checked(folder):
    splits = read_splits(folder)
    assert list(loaders({"test": splits["test"]})) == ["test"]
    with pytest.raises(ValueError, match=r"--short_side_size 12 .* --input_size 16"):
        loaders({"val": splits["val"]}, short_side=12)
    with pytest.raises(ValueError, match=r"7 videos.*--batch_size 8"):
        loaders({"train": splits["train"]}, batch_size=8)


def test_data_sets_can_be_sent_to_workers_that_do_not_fork(videos):
    for data, key in ((training(videos, transform=TRANSFORM), (1, 2)), (evaluation(videos), 2)):
        assert torch.equal(pickle.loads(pickle.dumps(data))[key]["clips"], data[key]["clips"])
