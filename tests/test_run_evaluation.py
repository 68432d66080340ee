"""What is tested and what counts: files that fit or are refused, best checkpoints, numbers that are none."""

import json
import shutil
from collections import UserList
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from programs import Done, start
from videos import write_list, write_videos

import evaluation
from clips.lists import read_list
from engine_for_finetuning import validate
from evaluation import Scores, accuracies, confusion_matrix, fuse_views
from modeling_finetune import create_classifier
from modeling_pretrain import create_pretrain_model
from probes import make_probe
from run_class_finetuning import main
from runs.best import BestCheckpoint
from runs.checkpoints import CheckpointError
from runs.logs import RunLog
from utils import World
from weights import tested

RUN = [
    *("--model", "vit_tiny_patch8_64", "--input_size", "32", "--num_frames", "4", "--data_set", "custom"),
    *("--nb_classes", "3", "--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0", "--lr", "0.05"),
    *("--sampling_rate", "1", "--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav"),
    *("--num_sample", "1", "--save_ckpt_freq", "1", "--test_num_segment", "1", "--test_num_crop", "1"),
]
SETTINGS = {
    **{"name": "vit_tiny_patch8_64", "num_classes": 3, "num_frames": 4, "input_size": 32, "tubelet": 2},
    **{"pos_embed": "sinusoid_3d", "mean_pooling": True, "slot_pooling": False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, 5 * [8], size=(40, 48))
    for split in ("train", "val", "test"):
        write_list(folder / f"{split}.csv", *(f"{name} {i % 3}" for i, name in enumerate(names)))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint-799.pth"
    settings = {
        **{"name": "pretrain_videomae_tiny_patch8_64", "input_size": 32, "num_frames": 4, "mask_ratio": 0.5},
        "pos_embed": "sinusoid_3d",
    }
    torch.manual_seed(0)
    model = create_pretrain_model(**settings)
    torch.save({"model": model.state_dict(), "epoch": 799, "model_settings": settings}, path)
    return path


def run(data, output, *flags) -> Done:
    return start(main, *RUN, "--data_path", data, "--output_dir", output, *flags)


def write(path, *, probe=None, told=True, **changes):
    """A classifier or probe with a head that tells classes apart, in our form or that of others."""
    settings = {**SETTINGS, **changes}
    torch.manual_seed(0)
    model = create_classifier(**settings, init_scale=1)
    if probe:
        model = make_probe(model, **probe)
    settings |= {"probe": {"batch_norm": False, **probe}} if probe else {}
    torch.save({"model": model.state_dict(), **({"model_settings": settings} if told else {})}, path)
    return path


def assert_refused(done: Done, *words: str):
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


# --- which file, and whether it fits ---


@pytest.mark.parametrize("how", ["finetune", "resume", "best", "pretrained beside best"])
def test_positions_are_those_of_the_file_however_it_is_named(data, pretrained, tmp_path, how):
    best = write(tmp_path / "checkpoint-best.pth")
    named = {"finetune": ["--finetune", best], "resume": ["--resume", best], "best": []}
    flags = named.get(how, ["--finetune", pretrained])
    done = run(data, tmp_path if "best" in how else tmp_path / "out", "--eval", *flags)
    assert done.returncode == 0 and f"testing {best}" in done.stdout, done.stderr
    folder = tmp_path if "best" in how else tmp_path / "out"
    expected = run(data, tmp_path / "told", "--eval", "--finetune", best, "--pos_embed", "sinusoid_3d")
    assert expected.returncode == 0
    ours, theirs = (np.load(p / "scores.npz")["scores"] for p in (folder, tmp_path / "told"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pos_embed", "sinusoid_1d"], ("pos_embed = sinusoid_3d", "pos_embed = sinusoid_1d", "--pos_embed")),
        (["--num_frames", "8"], ("num_frames = 4", "num_frames = 8")),
        (["--input_size", "64"], ("input_size = 32", "input_size = 64")),
        (["--tubelet_size", "1"], ("tubelet = 2", "tubelet = 1", "--tubelet_size")),
        (["--use_cls"], ("mean_pooling = True", "mean_pooling = False", "--use_cls")),
        (["--slot_pooling"], ("slot_pooling = False", "slot_pooling = True")),
        (["--linear_probe"], ("probe = None", "probe = linear", "--linear_probe")),
        (["--data_set", "UCF101", "--nb_classes", "101"], ("(3, 128)", "(101, 128)", "head.weight")),
    ],
)
def test_a_setting_unlike_that_of_the_file_is_named_with_both_values(data, tmp_path, flags, words):
    path = write(tmp_path / "file.pth")
    assert_refused(run(data, "", "--eval", "--finetune", path, *flags), str(path), *words)


@pytest.mark.parametrize("probe", [{"kind": "linear", "batch_norm": True}, {"kind": "attentive", "batch_norm": False}])
def test_a_probe_is_tested_with_its_own_flags_or_none(data, tmp_path, probe):
    path = write(tmp_path / "probe.pth", probe=probe)
    own = ["--linear_probe", "--probe_batch_norm"] if probe["kind"] == "linear" else ["--attentive_probe"]
    others = [["--linear_probe"], ["--attentive_probe", "--probe_batch_norm"]]
    for flags in (own, []):
        assert run(data, tmp_path / "out", "--eval", "--finetune", path, *flags).returncode == 0
    for flags in others:
        done = run(data, "", "--eval", "--finetune", path, *flags)
        assert_refused(done, "was trained with probe = " + probe["kind"], "--probe_batch_norm")


@pytest.mark.parametrize(
    ("made", "flags", "word"),
    [
        ({"mean_pooling": False}, ["--use_mean_pooling"], "fc_norm.weight"),
        ({}, ["--use_cls"], "norm.weight"),
        ({"pos_embed": None}, ["--pos_embed", "learnable"], "pos_embed"),
        ({"probe": {"kind": "linear", "batch_norm": True}}, ["--linear_probe"], "norm.running_mean"),
        ({"probe": {"kind": "attentive"}}, ["--linear_probe"], "pool."),
        ({}, ["--attentive_probe"], "encoder."),
    ],
)
def test_files_that_tell_nothing_must_have_all_that_the_model_has(data, tmp_path, made, flags, word):
    path = write(tmp_path / "file.pth", told=False, **made)
    assert_refused(run(data, "", "--eval", "--finetune", path, *flags), str(path), word)


# --- what a checkpoint says need not be said again ---


SHORT = ("--batch_size", "4", "--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav")


def test_an_evaluation_takes_all_it_can_from_the_checkpoint_and_flags_win(data, tmp_path):
    """Model, frames, pixels, pooling, classes, data set, clips and views, against the flags of the training."""
    flags = ["--use_cls", "--test_num_segment", "2", "--view_fusion", "logits", "--short_side_size", "40"]
    trained = run(data, tmp_path / "run", *flags)
    assert trained.returncode == 0, trained.stderr
    best = tmp_path / "run" / "checkpoint-best.pth"
    short = [*SHORT, "--data_path", data, "--eval", "--finetune", best, "--output_dir"]
    done = start(main, *short, tmp_path / "short")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "short" / "test.json").read_text() == (tmp_path / "run" / "test.json").read_text()
    done = start(main, *short, tmp_path / "less", "--test_num_segment", "1", "--view_fusion", "softmax")
    assert "x 1 view\n" in done.stdout
    assert json.loads((tmp_path / "less" / "test.json").read_text())["view_fusion"] == "softmax"


def test_an_evaluation_reads_shapes_where_a_checkpoint_of_others_says_nothing(data, tmp_path):
    path = write(tmp_path / "file.pth", told=False, mean_pooling=False, pos_embed=None)
    told = ["--num_frames", "4", "--input_size", "32", "--data_set", "custom", "--sampling_rate", "1"]
    done = start(main, *SHORT, "--data_path", data, "--eval", "--finetune", path, *told)
    assert done.returncode == 0 and "vit_tiny_patch8_64" in done.stdout, done.stderr


def test_the_result_has_whole_numbers_of_videos_and_one_process(data, tmp_path):
    done = run(data, "", "--eval", "--finetune", write(tmp_path / "file.pth"))
    assert "1 process x 4 videos" in done.stdout and "5 videos x 1 view\n" in done.stdout
    assert "videos 5  unreadable 0  not_finite 0" in done.stdout


def test_the_best_of_a_probe_is_tested_behind_its_training_command(data, pretrained, tmp_path):
    flags = ["--finetune", pretrained, "--linear_probe", "--probe_batch_norm", "--slot_pooling"]
    trained = run(data, tmp_path, *flags)
    assert trained.returncode == 0, trained.stderr
    before = (tmp_path / "test.json").read_text()
    again = run(data, tmp_path, *flags, "--eval")
    assert again.returncode == 0 and f"testing {tmp_path / 'checkpoint-best.pth'}" in again.stdout
    assert (tmp_path / "test.json").read_text() == before


def test_ranks_with_different_weights_are_refused(monkeypatch):
    monkeypatch.setattr(tested, "gather_from_ranks", lambda mine: [mine, ("the last weights", "another digest")])
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2)})
    model.head = model["head"]
    with pytest.raises(CheckpointError, match=r"rank 0: best\.pth, rank 1: the last weights.*all machines see"):
        tested.check_same_on_all_ranks("best.pth", model, SimpleNamespace(size=2))
    tested.check_same_on_all_ranks("best.pth", model, SimpleNamespace(size=1))


# --- the best checkpoint ---


def test_the_best_moves_with_a_resumed_checkpoint_or_starts_anew(data, tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    assert run(data, first).returncode == 0
    state = torch.load(first / "checkpoint-best.pth", weights_only=True)
    done = run(data, second, "--resume", first / "checkpoint-0.pth")
    assert done.returncode == 0 and "is copied to" in done.stdout, done.stderr
    assert torch.load(second / "checkpoint-best.pth", weights_only=True)["best"] == state["best"]
    assert json.loads((second / "test.json").read_text())["tested"] == str(second / "checkpoint-best.pth")
    (tmp_path / "alone").mkdir()
    shutil.copy(first / "checkpoint-0.pth", tmp_path / "alone")
    done = run(data, third, "--resume", tmp_path / "alone" / "checkpoint-0.pth", "--epochs", "2")
    assert done.returncode == 0 and "the best starts anew" in done.stderr
    assert torch.load(third / "checkpoint-best.pth", weights_only=True)["best"]["epoch"] == 1


def test_a_validation_that_is_not_finite_is_never_the_best(capsys):
    written = []
    checkpoints = SimpleNamespace(folder="out", write=lambda *args, **how: written.append(args) or True)
    console = SimpleNamespace(warn_once=print)
    found = {"model": {"loss": float("nan"), "top1": 90.0}, "ema": {"loss": 1.0, "top1": 50.0}}

    def best_after(found: dict, before: dict) -> dict:
        best = BestCheckpoint(before, checkpoints=checkpoints, console=console)
        best.update(1, found)
        return best.value

    assert best_after(found, {"top1": 40.0, "epoch": 0})["source"] == "ema"
    assert len(written) == 1 and "model" in capsys.readouterr().out
    assert best_after({"model": found["model"]}, {"top1": -1.0}) == {"top1": -1.0}
    assert len(written) == 1


def test_a_best_checkpoint_that_could_not_be_written_is_not_remembered():
    found, before = {"model": {"loss": 1.0, "top1": 50.0}}, {"top1": 40.0, "epoch": 0, "source": "model"}
    full_disk = SimpleNamespace(folder="out", write=lambda *args, **how: False)
    nothing_kept = SimpleNamespace(folder=None, write=lambda *args, **how: False)
    best, unsaved = (BestCheckpoint(before, checkpoints=c, console=None) for c in (full_disk, nothing_kept))
    best.update(1, found)
    unsaved.update(1, found)
    assert best.value == before and unsaved.value["top1"] == 50.0


# --- the fusion of views ---


@pytest.mark.parametrize("fusion", ["softmax", "logits"])
def test_both_fusions_are_reported_and_one_decides(tmp_path, fusion):
    """One view is sure of class 0, two less sure ones see class 1: logits side with the first, probabilities don't."""
    logits = torch.tensor([[100.0, 0, 0], [0, 5, 0], [0, 5, 0]])
    write_list(tmp_path / "list.csv", "a.mp4 0")
    clips, zero = torch.zeros(1, 3, 3, 2, 4, 4, dtype=torch.uint8), torch.tensor([0])
    loader, dataset = UserList([{"clips": clips, "label": zero, "index": zero, "bad": []}]), UserList(["a.mp4"])
    loader.dataset = dataset
    dataset.videos, dataset.views = read_list(tmp_path / "list.csv"), [(0, 0), (0, 1), (0, 2)]
    status = evaluation.test(
        SimpleNamespace(device=torch.device("cpu"), evaluate=lambda clips: logits),
        loader,
        tested="a.pth",
        class_names=(),
        log=RunLog(output_dir=""),
        fusion=fusion,
        skip_unreadable=False,
        output_dir=str(tmp_path),
        signals=SimpleNamespace(status=0),
        world=World(torch.device("cpu"), 0, 1),
        num_classes=3,
        colours=((0.5,) * 3, (0.5,) * 3),
    )
    found = json.loads((tmp_path / "test.json").read_text())
    assert status == 0 and (found["top1_softmax"], found["top1_logits"]) == (0, 100)
    assert found["view_fusion"] == fusion and found["top1"] == found[f"top1_{fusion}"]
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1].split(",")[2] == str(int(fusion == "softmax"))


# --- numbers that are none, and videos that can't be read ---


@pytest.mark.parametrize("fusion", ["softmax", "logits"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_never_right(fusion, wrong):
    logits = torch.tensor([[[2.0, 1, 0], [2, 1, 0]], [[wrong, 1, 0], [2, 1, 0]]])  # two videos of class 0
    fused, hits = fuse_views(logits, torch.zeros(2, dtype=torch.int64), fusion)
    assert hits.tolist() == [[2, 2], [1, 1]]
    scores = Scores(np.arange(2), np.zeros(2, np.int64), fused.numpy(), hits.numpy(), 2, [])
    found = accuracies(scores, np.zeros(2, np.int64))
    assert (found["top1"], found["top5"], found["mean_class_accuracy"], found["not_finite"]) == (50, 50, 50, 1)
    assert confusion_matrix(scores).sum() == 1


def test_a_validation_counts_what_is_not_finite_as_wrong():
    logits = torch.tensor([[3.0, 0], [float("nan"), 0]])
    engine = SimpleNamespace(device=torch.device("cpu"), evaluate=lambda clips, ema: logits)
    batch = {"clips": torch.zeros(2, 1, 3, 2, 4, 4, dtype=torch.uint8), "label": torch.tensor([0, 0]), "bad": []}
    (found,) = validate(engine, [batch], colours=((0.5,) * 3, (0.5,) * 3))
    assert found["top1"] == found["top5"] == 50 and not np.isfinite(found["loss"])


def test_a_test_without_one_finite_score_is_an_error_that_names_the_file(data, tmp_path):
    path = write(tmp_path / "file.pth")
    state = torch.load(path, weights_only=True)
    state["model"]["head.bias"][:] = float("nan")
    torch.save(state, path)
    assert_refused(run(data, tmp_path / "out", "--eval", "--finetune", path), str(path), "finite")
    assert not (tmp_path / "out" / "test.json").exists()


def test_unreadable_videos_are_wrong_in_their_class_unless_skipped():
    labels = np.array([0, 0, 1, 1])  # the videos 1 and 3 can't be read
    scores = Scores(
        index=np.array([0, 2]),
        label=np.array([0, 1]),
        fused=np.array([[0.9, 0.1], [0.2, 0.8]], np.float32),
        view_hits=np.ones((2, 2), np.int64),
        num_views=1,
        bad=[(1, "b.mp4", "broken"), (3, "d.mp4", "broken")],
    )
    found = accuracies(scores, labels)
    assert (found["top1"], found["mean_class_accuracy"], found["view_top1"]) == (50, 50, 100)
    skipped = accuracies(scores, labels, skip_unreadable=True)
    assert (skipped["top1"], skipped["mean_class_accuracy"]) == (100, 100)
    assert confusion_matrix(scores).tolist() == [[1, 0], [0, 1]]
    none = scores._replace(
        index=np.zeros(0, np.int64),
        label=np.zeros(0, np.int64),
        fused=np.zeros((0, 2), np.float32),
        view_hits=np.zeros((0, 2), np.int64),
    )
    assert accuracies(none, labels)["mean_class_accuracy"] == 0
    assert accuracies(none, labels, skip_unreadable=True)["top1"] == 0


# --- wrong settings ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels", "nowhere.txt"], "--labels nowhere.txt can't be read"),
        (["--drop_path", "1"], "--drop_path 1 "),
        (["--drop", "-0.1"], "--drop -0.1"),
        (["--attn_drop_rate", "1.5"], "--attn_drop_rate 1.5"),
        (["--fc_drop_rate", "nan"], "--fc_drop_rate nan"),
        (["--reprob", "2"], "--reprob 2 "),
        (["--smoothing", "-1"], "--smoothing -1 "),
        (["--mixup_prob", "1.1"], "--mixup_prob 1.1"),
        (["--mixup_switch_prob", "-1"], "--mixup_switch_prob -1 "),
        (["--mixup", "-1"], "--mixup -1 "),
        (["--cutmix", "-1"], "--cutmix -1 "),
        (["--crop_scale", "1", "0.5"], "--crop_scale 1.0 0.5"),
        (["--cutmix_minmax", "0", "0.5"], "--cutmix_minmax 0.0 0.5"),
        (["--probe_batch_norm"], "--probe_batch_norm"),
        (["--linear_probe", "--probe_batch_norm", "--finetune", "x", "--batch_size", "1"], "--batch_size"),
        (["--attentive_probe", "--finetune", "x", "--slot_pooling"], "--slot_pooling and --attentive_probe"),
        (["--slot_pooling", "--use_cls"], "--slot_pooling and --use_cls"),
    ],
)
def test_wrong_settings_are_one_line_before_anything_is_built(data, flags, words):
    assert_refused(run(data, "", *flags), words)


def test_labels_are_counted_before_training(data, tmp_path):
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    assert_refused(run(data, "", "--labels", tmp_path / "labels.txt"), "2 class names", "3 classes")
    (tmp_path / "labels.txt").write_text("one\ntwo\nthree\n")
    path = write(tmp_path / "file.pth")
    done = run(data, tmp_path / "out", "--eval", "--finetune", path, "--labels", tmp_path / "labels.txt")
    assert done.returncode == 0
    assert (tmp_path / "out" / "confusion.csv").read_text().splitlines()[0].endswith("one,two,three")


def test_more_classes_than_labels_are_a_warning(data):
    done = run(data, "", "--nb_classes", "7", "--disable_eval_during_finetuning")
    assert done.returncode == 0 and "7 classes" in done.stderr and "3 classes" in done.stderr


def test_learned_positions_start_from_a_checkpoint_with_fixed_ones(data, pretrained, tmp_path):
    done = run(data, tmp_path, "--finetune", pretrained, "--pos_embed", "learnable", "--no_save_ckpt")
    assert done.returncode == 0, done.stderr
    assert "freshly initialised: pos_embed," in done.stdout
