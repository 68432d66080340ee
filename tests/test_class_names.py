"""Class names instead of numbers: in lists, in checkpoints, in what is tested and predicted."""

import json
import shutil

import pytest
import torch
from programs import Done, start
from test_run_evaluation import RUN
from videos import write_list, write_videos

from clips.class_names import ClassNames, check_labels, number_lists
from clips.lists import ListError, read_list, read_splits
from run_class_finetuning import get_args_parser, main, read_lists
from runs.checkpoints import CheckpointError
from runs.resuming import check_same_classes
from tools import extract_features, predict

NAMES = ["jump", "run", "sit down"]
UNNUMBERED = [flag for flag in RUN if flag not in ("--nb_classes", "3")]


def lists(folder, **lines):
    for split, rows in lines.items():
        write_list(folder / f"{split}.csv", *rows)
    return read_splits(folder, splits=list(lines))


# --- lists ---


def test_names_are_numbered_in_the_order_of_the_sorted_training_list(tmp_path):
    splits = lists(
        tmp_path,
        train=["a.mp4,sit down", "b.mp4 jump", 'c.mp4,"run"', "d.mp4,jump"],
        val=["e.mp4,run", "f.mp4,-1", "g.mp4,jump"],
    )
    names = number_lists(splits)
    assert names.names == tuple(NAMES)
    assert splits["train"].labels.tolist() == [2, 0, 1, 0] and splits["val"].labels.tolist() == [1, -1, 0]
    assert [video.label for video in splits["val"]] == [1, None, 0]
    with pytest.raises(ListError, match=r"val\.csv, line 2: no label"):
        check_labels(splits["val"], 3)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_numbers_do_not_depend_on_the_order_of_the_lines(tmp_path, order):
    splits = lists(tmp_path, train=[f"{name}.mp4,{name}" for name in order])
    number_lists(splits)
    assert {video.path[-5]: video.label for video in splits["train"]} == {"a": 0, "b": 1}


def test_a_file_of_labels_decides_the_numbers(tmp_path):
    splits = lists(tmp_path, train=["a.mp4,run", "b.mp4,jump"])
    (tmp_path / "labels.txt").write_text("run\njump\nfly\n")
    names = number_lists(splits, labels=str(tmp_path / "labels.txt"))
    assert names.names == ("run", "jump", "fly") and splits["train"].labels.tolist() == [0, 1]


def test_an_unknown_name_is_one_error_with_file_line_and_the_nearest_name(tmp_path):
    splits = lists(tmp_path, train=["a.mp4,jump", "b.mp4,run"], val=["# heading", "c.mp4,run", "d.mp4,jmup"])
    with pytest.raises(ListError) as error:
        number_lists(splits)
    text = str(error.value)
    assert text.startswith(f"{tmp_path}/val.csv, line 3: ") and 'no class "jmup"' in text
    assert f"{tmp_path}/train.csv" in text and text.endswith('the nearest is "jump"')


def test_names_and_numbers_do_not_mix(tmp_path):
    path = write_list(tmp_path / "mixed.csv", "a.mp4,3", "b.mp4", "c.mp4,run")
    with pytest.raises(ListError, match=r"mixed\.csv, line 3: the label 'run', where line 1 has 3: "):
        read_list(path)
    splits = lists(tmp_path, train=["a.mp4,jump"], val=["a.mp4,0"])
    with pytest.raises(ListError, match=r"val\.csv has no class names, and .*train\.csv has"):
        number_lists(splits)


def test_labels_may_rename_the_classes_of_a_checkpoint_but_not_renumber_those_of_a_list(tmp_path):
    trained = ClassNames(tuple(NAMES), "best.pth")
    labels = tmp_path / "labels.txt"
    labels.write_text("run\njump\nsit\n")
    with pytest.raises(ListError, match=r'labels\.txt has "run" as class 0, best\.pth as class 1'):
        number_lists(lists(tmp_path, test=["a.mp4,run"]), labels=str(labels), trained=trained)
    numbers = lists(tmp_path, test=["a.mp4,0"])
    assert number_lists(numbers, labels=str(labels), trained=trained).names == ("run", "jump", "sit")
    labels.write_text("jump\nrun\nsit\n")
    renamed = lists(tmp_path, test=["a.mp4,sit"])
    number_lists(renamed, labels=str(labels), trained=trained)
    assert renamed["test"].labels.tolist() == [2]


def test_a_name_that_stands_twice_numbers_no_list(tmp_path):
    (tmp_path / "labels.txt").write_text("run\njump\nrun\n")
    with pytest.raises(ListError, match=r'labels\.txt has the class name "run" twice'):
        number_lists(lists(tmp_path, train=["a.mp4,run"]), labels=str(tmp_path / "labels.txt"))


@pytest.mark.parametrize(
    ("new", "words"),
    [(["jump", "sit", "run"], 'class 1 is "run".*it is "sit"'), (["jump"], 'class 1 is "run".*missing'), ([], "")],
)
def test_a_checkpoint_of_other_classes_is_not_resumed(new, words):
    if not words:
        check_same_classes("a.pth", NAMES, new)
        return
    with pytest.raises(CheckpointError, match=words):
        check_same_classes("a.pth", NAMES, new)


# --- programs ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    videos = write_videos(folder, 5 * [8], size=(40, 48))
    lines = [f"{video},{NAMES[i % 3]}" for i, video in enumerate(videos)]
    lists(folder, train=lines, val=lines[:3], test=lines)
    return folder


def run(data, output, *flags) -> Done:
    return start(main, *UNNUMBERED, "--data_path", data, "--output_dir", output, *flags)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    done = run(data, output)
    assert done.returncode == 0, done.stderr
    assert "3 classes of custom" in done.stdout
    return output


def test_checkpoints_keep_the_names(trained):
    for name in ("checkpoint-0.pth", "checkpoint-best.pth"):
        assert torch.load(trained / name, weights_only=True)["class_names"] == NAMES
    assert (trained / "confusion.csv").read_text().splitlines()[0].endswith("jump,run,sit down")


def test_a_test_takes_the_numbers_of_the_checkpoint(trained, data, tmp_path):
    """Even where its list has fewer classes, whose own numbers would be others."""
    write_list(tmp_path / "test.csv", f"{data}/0.mp4,jump", f"{data}/2.mp4,sit down")
    flags = ("--eval", "--finetune", trained / "checkpoint-best.pth")
    done = run(tmp_path, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["0", "2"]
    write_list(tmp_path / "test.csv", f"{data}/0.mp4,jumping")
    done = run(tmp_path, "", *flags)
    assert done.returncode == 1 and "test.csv, line 1: " in done.stderr and 'nearest is "jump"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["custom"], ("run", "jump")),
        (["custom", "--nb_classes", "2"], ("run", "jump")),
        (["custom", "--nb_classes", "3"], ()),
        (["SSV2"], ()),
    ],
)
def test_numbers_get_the_names_that_prepare_videos_wrote_beside_them(tmp_path, flags, expected):
    write_list(tmp_path / "labels.txt", "run", "jump")
    for split in ("train", "val", "test"):
        write_list(tmp_path / f"{split}.csv", "a.mp4 0", "b.mp4 1")
    args = get_args_parser().parse_args(["--data_path", str(tmp_path), "--data_set", *flags])
    lists, names = read_lists(args, None)
    assert names.names == expected and lists["val"].labels.tolist() == [0, 1]


def test_a_run_with_other_classes_does_not_resume(trained, data, tmp_path):
    shutil.copy(trained / "checkpoint-0.pth", tmp_path)
    write_list(tmp_path / "labels.txt", "run", "jump", "sit down")
    done = run(data, tmp_path, "--epochs", "2", "--labels", tmp_path / "labels.txt")
    assert done.returncode == 1 and 'class 0 is "jump"' in done.stderr and "--labels" in done.stderr


def test_predictions_and_features_use_the_names_of_the_checkpoint(trained, data, tmp_path):
    flags = ("--model", trained / "checkpoint-best.pth", "--device", "cpu", "--num_workers", "0", data / "0.mp4")
    for labels, names in ((), NAMES), (("one", "two", "three"), ["one", "two", "three"]):
        write_list(tmp_path / "labels.txt", *labels)
        more = ("--labels", tmp_path / "labels.txt") if labels else ()
        done = start(predict.main, *flags, "--json", tmp_path / "found.json", *more)
        assert done.returncode == 0, done.stderr
        (found,) = json.loads((tmp_path / "found.json").read_text())["predictions"]
        assert {best["class"]: best["label"] for best in found["top"]} == dict(enumerate(names))
    done = start(extract_features.main, *flags, "--output", tmp_path / "features")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "features" / "class_names.txt").read_text().splitlines() == NAMES


def test_a_number_of_classes_unlike_that_of_the_names_is_an_error(data):
    done = run(data, "", "--nb_classes", "4")
    assert done.returncode == 1 and "has 3 class names for 4 classes" in done.stderr


def test_names_without_names_in_the_checkpoint_need_labels(trained, data, tmp_path):
    state = torch.load(trained / "checkpoint-best.pth", weights_only=True)
    state.pop("class_names")
    torch.save(state, tmp_path / "old.pth")
    flags = ("--nb_classes", "3", "--eval", "--finetune", tmp_path / "old.pth")
    done = run(data, "", *flags)
    assert done.returncode == 1 and "set --labels" in done.stderr
    write_list(tmp_path / "labels.txt", *NAMES)
    assert run(data, "", *flags, "--labels", tmp_path / "labels.txt").returncode == 0
