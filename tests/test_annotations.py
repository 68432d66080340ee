"""Annotation readers on small files in the official formats, matching with videos on disk, and writing lists."""

import json
from pathlib import PurePath

import pytest

from clips.lists import NO_LABEL, find_videos, parse_line, read_list, read_splits
from datasets import DATA_SETS
from tools.preparing.annotations import READERS, AnnotationError, Annotations, Entry
from tools.preparing.listing import Found, format_line, match, read_class_folders, write_lists


def read(data_set, folder, *, split=1, official_test=False):
    return READERS[data_set](folder, split=split, official_test=official_test)


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def write_ssv2(folder, prefix):
    def dump(name, data):
        (folder / f"{prefix}{name}").write_text(json.dumps(data))

    dump("labels.json", {"Holding something": "1", "Dropping something onto something": "0"})
    dump("train.json", [
        {"id": "78687", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
        {"id": "42326", "label": "...", "template": "Dropping [something] onto [something]", "placeholders": []},
    ])  # fmt: skip
    dump("validation.json", [{"id": "74225", "label": "...", "template": "Holding [something]"}])
    dump("test.json", [{"id": "1420"}])
    (folder / f"{prefix}test-answers.csv").write_text("1420;Dropping something onto something\n")


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2_labels_come_from_its_table_and_the_test_is_validation_unless_asked(tmp_path, prefix):
    write_ssv2(tmp_path, prefix)
    annotations = read("SSV2", tmp_path)
    assert annotations.classes == ["Dropping something onto something", "Holding something"]
    assert annotations.splits["train"] == [("78687", 1), ("42326", 0)]
    assert annotations.splits["val"] == annotations.splits["test"] == [("74225", 1)]
    assert read("SSV2", tmp_path, official_test=True).splits["test"] == [("1420", 0)]


def test_ssv2_without_a_file_or_with_an_unknown_template_says_which(tmp_path):
    with pytest.raises(AnnotationError, match=r"labels\.json is missing"):
        read("SSV2", tmp_path)
    write_ssv2(tmp_path, "")
    (tmp_path / "train.json").write_text(json.dumps([{"id": "5", "template": "Eating [something]"}]))
    with pytest.raises(AnnotationError, match=r"train\.json: video 5: the class 'Eating"):
        read("SSV2", tmp_path)


def test_a_file_that_is_not_in_its_format_is_named(tmp_path):
    write_ssv2(tmp_path, "")
    (tmp_path / "train.json").write_text('[{"id": "5", "templ')
    with pytest.raises(AnnotationError, match=r"train\.json is not in the official format"):
        read("SSV2", tmp_path)


HEADER = "label,youtube_id,time_start,time_end,split\n"


def test_kinetics_names_and_numbers(tmp_path):
    (tmp_path / "train.csv").write_text(
        HEADER + '"waxing back",-bc_1,5,15,train\nabseiling,x y,1000000,1000010,train\n"air drumming",b,0,10,train\n'
    )
    (tmp_path / "validate.csv").write_text(HEADER + '"waxing back",v1,7,17,validate\n')
    (tmp_path / "test.csv").write_text(HEADER + "abseiling,t1,8,18,test\n")
    (tmp_path / "kinetics_400_labels.csv").write_text("id,name\n0,abseiling\n")
    annotations = read("Kinetics-400", tmp_path)
    assert annotations.classes == ["abseiling", "air drumming", "waxing back"]
    assert annotations.splits["train"] == [
        ("-bc_1_000005_000015", 2),
        ("x y_1000000_1000010", 0),
        ("b_000000_000010", 1),
    ]
    assert annotations.splits["val"] == annotations.splits["test"] == [("v1_000007_000017", 2)]
    assert read("Kinetics-700", tmp_path, official_test=True).splits["test"] == [("t1_000008_000018", 0)]


def test_kinetics_in_one_file_is_told_apart_by_the_column(tmp_path):
    (tmp_path / "all.csv").write_text(HEADER + "a,1,0,10,train\nb,2,0,10,train\nb,3,0,10,val\n")
    assert {name: len(videos) for name, videos in read("Kinetics-600", tmp_path).splits.items()} == {
        "train": 2, "val": 1, "test": 1,
    }  # fmt: skip


def test_kinetics_without_its_files_or_with_an_unknown_class_is_refused(tmp_path):
    with pytest.raises(AnnotationError, match=r"no \.csv file with training videos"):
        read("Kinetics-400", tmp_path)
    (tmp_path / "train.csv").write_text(HEADER + "a,1,0,10,train\nz,2,0,10,val\n")
    with pytest.raises(AnnotationError, match="class 'z'"):
        read("Kinetics-400", tmp_path)


def test_ucf101_split_and_numbers_from_one(tmp_path):
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 Archery\r\n")
    (tmp_path / "trainlist02.txt").write_text("Archery/v_Archery_g08_c01.avi 2\r\n\r\n")
    (tmp_path / "testlist02.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n")
    annotations = read("UCF101", tmp_path, split=2)
    assert annotations.classes == ["ApplyEyeMakeup", "Archery"]
    assert annotations.splits["train"] == [("Archery/v_Archery_g08_c01", 1)]
    assert annotations.splits["val"] == annotations.splits["test"] == [("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01", 0)]
    with pytest.raises(AnnotationError, match=r"trainlist01\.txt is missing"):
        read("UCF101", tmp_path)
    with pytest.raises(AnnotationError, match="official_test"):
        read("UCF101", tmp_path, split=2, official_test=True)


def test_hmdb51_ones_train_twos_test_and_zeros_nothing(tmp_path):
    (tmp_path / "wave_test_split1.txt").write_text("a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    (tmp_path / "brush_hair_test_split1.txt").write_text("a.avi 2 \n")
    (tmp_path / "brush_hair_test_split2.txt").write_text("a.avi 1 \n")
    annotations = read("HMDB51", tmp_path)
    assert annotations.classes == ["brush_hair", "wave"]
    assert annotations.splits["train"] == [("wave/a", 1)]
    assert annotations.splits["val"] == annotations.splits["test"] == [("brush_hair/a", 0), ("wave/b", 1)]


def test_videos_are_found_by_name_in_the_right_class_and_split_and_never_dropped_silently():
    videos = ["val/x/1.mp4", "train/x/1.mp4", "deep/wave/a.webm", "deep/run/a.mp4", "other.mp4"]
    entries = [Entry("1", 0), Entry("wave/a", 1), Entry("gone", 2)]
    found = match(Annotations(["x"], {"train": entries, "val": entries[:1]}), map(PurePath, videos))
    assert found.listed["train"] == [(PurePath("train/x/1.mp4"), 0), (PurePath("deep/wave/a.webm"), 1)]
    assert found.listed["val"] == [(PurePath("val/x/1.mp4"), 0)]
    assert found.missing == [("train", "gone")]
    assert found.doubtful == [("train", "1"), ("val", "1")]


def test_search_goes_through_links_but_not_in_circles_nor_into_hidden_or_skipped_folders(tmp_path):
    touch(
        tmp_path,
        "in/b.mp4",
        "in/a/1.WEBM",
        "in/.hidden/x.mp4",
        "in/.y.mp4",
        "in/notes.txt",
        "in/out/z.mp4",
        "far/q.avi",
    )
    (tmp_path / "in/link").symlink_to(tmp_path / "far")
    (tmp_path / "in/a/circle").symlink_to(tmp_path / "in")
    found = find_videos(tmp_path / "in", skip=tmp_path / "in/out")
    assert [path.as_posix() for path in found] == ["a/1.WEBM", "b.mp4", "link/q.avi"]


def test_class_folders_are_split_alike_in_any_order_with_a_share_of_each_class():
    videos = [PurePath(f"{name}/{k}.mp4") for name in ("b c", "a") for k in range(20)] + [PurePath("stray.mp4")]
    found, classes, left_out = read_class_folders(videos, val_fraction=0.1)
    assert classes == ["a", "b c"] and left_out == [PurePath("stray.mp4")]
    assert sorted(label for _, label in found.listed["val"]) == [0, 0, 1, 1]
    assert found.listed["test"] == found.listed["val"]
    assert sorted(found.listed["train"] + found.listed["val"]) == sorted(
        (path, classes.index(path.parts[0])) for path in videos[:-1]
    )
    assert read_class_folders(videos[::-1], val_fraction=0.1) == (found, classes, left_out)


def test_class_folders_set_aside_a_test_of_its_own_and_the_same_validation_as_without():
    videos = [PurePath(f"{name}/{k}.mp4") for name in "ab" for k in range(20)]
    without = read_class_folders(videos, val_fraction=0.1)[0].listed
    listed = read_class_folders(videos, val_fraction=0.1, test_fraction=0.2)[0].listed
    assert listed["val"] == without["val"]
    assert sorted(label for _, label in listed["test"]) == 4 * [0] + 4 * [1]
    parts = [{path for path, _ in listed[split]} for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 40 and set.union(*parts) == set(videos)


def test_class_folders_in_folders_of_splits_keep_those():
    videos = [PurePath(p) for p in ("train/a/1.mp4", "train/b/2.mp4", "validation/b/3.mp4", "extra/b/4.mp4")]
    found, classes, left_out = read_class_folders(videos, val_fraction=0.5)
    assert classes == ["a", "b"] and left_out == [videos[3]]
    assert found.listed["train"] == [(videos[0], 0), (videos[1], 1)]
    assert found.listed["val"] == found.listed["test"] == [(videos[2], 1)]
    found, _, _ = read_class_folders([PurePath(f"train/a/{k}.mp4") for k in range(4)], val_fraction=0.5)
    assert len(found.listed["train"]) == len(found.listed["val"]) == 2


@pytest.mark.parametrize(
    "path",
    ["a.mp4", "air drumming/b c.mp4", "#1/x.mp4", " lead.mp4", 'q"/r".mp4', '"q".mp4', "a.avi 3/b", "c, d/e.mp4"],
)
@pytest.mark.parametrize("label", [0, 173, NO_LABEL])
def test_any_path_survives_a_list(path, label):
    path = path if path.endswith(".mp4") else path + ".mp4"
    line = format_line(PurePath(path), label)
    assert parse_line(line.strip()) == (path, label) and not line.startswith("#")


@pytest.mark.parametrize("path", ["a.mp4", "air drumming/b c.mp4", "#1/x.mp4", "a.avi 3/b.mp4", "c, d/e.mp4"])
@pytest.mark.parametrize("name", ["tango", "level 2", 'say "hi", now'])
def test_class_names_survive_a_list(path, name):
    line = format_line(PurePath(path), name)
    assert parse_line(line) == (path, name) and not line.startswith("#")


def test_a_path_that_no_list_can_hold_is_refused():
    with pytest.raises(AnnotationError, match="rename"):
        format_line(PurePath("a\nb.mp4"), 0)


def test_written_lists_are_read_as_they_were_meant(tmp_path):
    touch(tmp_path, "a b/1.mp4", "#c/2 3.mp4")
    listed = [(PurePath("a b/1.mp4"), 0), (PurePath("#c/2 3.mp4"), 1)]
    write_lists(tmp_path, Found({"train": listed, "val": listed[:1], "test": listed[1:]}, [], []), ["x y", "z"])
    splits = read_splits(tmp_path)
    assert [tuple(splits["train"][k]) for k in range(2)] == [(str(tmp_path / path), label) for path, label in listed]
    assert splits["test"].labels.tolist() == [1]
    assert (tmp_path / "labels.txt").read_text() == "x y\nz\n"
    assert not list(tmp_path.glob(".*"))


def test_a_split_without_videos_gets_no_list(tmp_path):
    write_lists(tmp_path, Found({"train": [(PurePath("a.mp4"), 0)], "val": []}, [], []), ["a"])
    assert len(read_list(tmp_path / "train.csv")) == 1
    assert not (tmp_path / "val.csv").exists()


# --- Kinetics-710, Diving48, Jester ---


def test_kinetics_710_lists_have_numbers_of_merged_classes_and_names_of_videos(tmp_path):
    (tmp_path / "label_map_k710.txt").write_text("abseiling\nair drumming\nwaxing back\n")
    lines = "k400/train/a_000001_000011.mp4 2\nk600/train/a_000001_000011.mp4 2\nk700/b c/d_000000_000010,1\n"
    (tmp_path / "train.csv").write_text(lines)
    (tmp_path / "val.csv").write_text("k700/val/v_000007_000017.mp4,0\n")
    annotations = read("Kinetics-710", tmp_path)
    assert annotations.classes == ["abseiling", "air drumming", "waxing back"]
    assert annotations.splits["train"] == [("a_000001_000011", 2), ("d_000000_000010", 1)]
    assert annotations.splits["val"] == annotations.splits["test"] == [("v_000007_000017", 0)]
    for line in ("x.mp4 3\n", "x.mp4\n"):
        (tmp_path / "val.csv").write_text(line)
        with pytest.raises(
            AnnotationError, match=r"val\.csv, line 1: the label (3|-1) is none of the 3 in .*label_map"
        ):
            read("Kinetics-710", tmp_path)


def test_diving48_classes_are_its_vocabulary(tmp_path):
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Forward", "25som", "NoTwis", "PIKE"]]
    (tmp_path / "Diving48_vocab.json").write_text(json.dumps(vocabulary))
    dive = {"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 117}
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps([dive]))
    (tmp_path / "Diving48_V2_test.json").write_text(json.dumps([{**dive, "vid_name": "x_1", "label": 0}]))
    annotations = read("Diving48", tmp_path)
    assert annotations.classes == ["Back/15som/05Twis/FREE", "Forward/25som/NoTwis/PIKE"]
    assert annotations.splits["train"] == [("_8Vy3dlHg2w_00000", 1)]
    assert annotations.splits["val"] == annotations.splits["test"] == [("x_1", 0)]
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps([{**dive, "label": 2}]))
    with pytest.raises(AnnotationError, match=r"video _8Vy3dlHg2w_00000: the label 2 is not in .*vocab"):
        read("Diving48", tmp_path)
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(AnnotationError, match=r"Diving48_V2_train\.json is not in the official format"):
        read("Diving48", tmp_path)


@pytest.mark.parametrize("prefix", ["", "jester-v1-"])
def test_jester_labels_are_the_lines_of_its_table(tmp_path, prefix):
    (tmp_path / f"{prefix}labels.csv").write_text("Swiping Left\nSwiping Right\nNo gesture\n")
    (tmp_path / f"{prefix}train.csv").write_text("34870;Swiping Right\n56557;No gesture\n")
    (tmp_path / f"{prefix}validation.csv").write_text("9223;Swiping Left\n")
    annotations = read("Jester", tmp_path)
    assert annotations.classes == ["Swiping Left", "Swiping Right", "No gesture"]
    assert annotations.splits["train"] == [("34870", 1), ("56557", 2)]
    assert annotations.splits["val"] == annotations.splits["test"] == [("9223", 0)]
    with pytest.raises(AnnotationError, match="official_test: Jester"):
        read("Jester", tmp_path, official_test=True)
    (tmp_path / f"{prefix}train.csv").write_text("34870;Waving\n")
    with pytest.raises(AnnotationError, match=r"train\.csv: video 34870: the class 'Waving' is not in"):
        read("Jester", tmp_path)


def test_every_data_set_with_annotations_has_a_row_in_the_table():
    assert set(READERS) == set(DATA_SETS) - {"custom"}
