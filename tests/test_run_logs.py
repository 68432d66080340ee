"""What a run leaves for a person to look at: settings, curves, TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import struct
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from programs import Done, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run_evaluation import RUN
from videos import write_list, write_videos

import run_class_finetuning
import run_mae_pretraining
from pictures.plots import confused_pairs, confusions, curves, read_epochs, to_picture
from runs import logs
from runs.logs import RunLog
from runs.reporters import WANDB_ID, WeightsAndBiases, import_wandb
from utils import SettingError

PRETRAINING = [
    *("--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--num_frames", "4", "--batch_size", "2"),
    *("--epochs", "2", "--warmup_epochs", "0", "--num_workers", "0", "--amp", "off", "--device", "cpu"),
    *("--sampling_rate", "1", "--vis_freq", "0", "--mask_ratio", "0.8", "--decoder", "pyav"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, 5 * [8], size=(40, 48))
    for split in ("train", "val", "test"):
        write_list(folder / f"{split}.csv", *(f"{name},{'abc'[i % 3]}" for i, name in enumerate(names)))
    return folder


def finetune(data, output, *flags) -> Done:
    flags = [*RUN, "--data_path", data, "--output_dir", output, *flags]
    done = start(run_class_finetuning.main, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned")
    finetune(data, output, "--epochs", "2", "--lr", "0.02")
    return output


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrained")
    flags = [*PRETRAINING, "--data_path", data / "train.csv", "--output_dir", output]
    done = start(run_mae_pretraining.main, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


# --- settings and curves ---


@pytest.mark.parametrize("kind", ["tuned", "pretrained"])
def test_a_run_leaves_its_settings_and_curves(kind, request):
    output = request.getfixturevalue(kind)
    program = {"tuned": run_class_finetuning, "pretrained": run_mae_pretraining}[kind]
    settings = json.loads((output / "args.json").read_text())
    assert settings.keys() == vars(program.get_args_parser().parse_args([])).keys()
    assert settings["epochs"] == 2 and settings["output_dir"] == str(output)
    assert Image.open(output / "curves.png").size[0] > 600
    assert not list(output.glob(".*.tmp"))


def test_curves_show_loss_validation_and_rate(tuned, pretrained):
    figure = curves(read_epochs(tuned / "log.txt"))
    loss, accuracy, rate = figure.axes
    entries = [json.loads(line) for line in (tuned / "log.txt").read_text().splitlines()]
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines) == ["training", "validation"]
    assert lines["validation"].get_ydata().tolist() == [e["validation"]["model"]["loss"] for e in entries]
    assert [line.get_label() for line in accuracy.lines] == ["top-1", "top-5"]
    assert rate.lines[0].get_ydata().tolist() == [e["lr"] for e in entries]
    assert rate.lines[0].get_xdata().tolist() == [1, 2]
    titles = [axes.get_title() for axes in curves(read_epochs(pretrained / "log.txt")).axes]
    assert titles == ["loss", "entropy of P / log N", "learning rate"]


def test_an_epoch_trained_again_replaces_the_old_one_and_all_after_it(tmp_path):
    epochs = [(0, 5.0), (1, 4.0), (2, math.nan), (1, 3.0)]
    lines = [json.dumps({"epoch": e, "loss": loss, "lr": 1e-3}) + "\n" for e, loss in epochs]
    (tmp_path / "log.txt").write_text("".join([*lines[:3], '{"epoch": 9, "lo\n', lines[3]]))
    assert [(e["epoch"], e["loss"]) for e in read_epochs(tmp_path / "log.txt")] == [(0, 5.0), (1, 3.0)]
    (tmp_path / "log.txt").write_text("".join(lines[:3]))
    assert to_picture(curves(read_epochs(tmp_path / "log.txt"))).ndim == 3  # a loss that is no number is a gap


def test_a_plot_that_fails_is_reported_once_and_ends_nothing(tmp_path, monkeypatch):
    def fail(epochs):
        raise ZeroDivisionError("in a plot")

    monkeypatch.setattr(logs, "curves", fail)
    monkeypatch.setattr(logs, "DRAW_EVERY", -1)
    warned = []
    log = RunLog(output_dir=str(tmp_path), warn=warned.append)
    for epoch in range(3):
        log.epoch({"epoch": epoch, "loss": 1.0, "lr": 1.0})
    log.close()
    assert len(warned) == 1 and "curves.png" in warned[0] and "in a plot" in warned[0]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_curves_are_drawn_at_most_every_few_seconds_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(logs, "curves", lambda epochs: drawn.append(len(epochs)) or curves(epochs))
    log = RunLog(output_dir=str(tmp_path))
    log.epoch({"epoch": 0, "loss": 1.0, "lr": 1.0})
    assert not drawn
    log.drawn_at -= logs.DRAW_EVERY
    log.epoch({"epoch": 1, "loss": 1.0, "lr": 1.0})
    log.epoch({"epoch": 2, "loss": 1.0, "lr": 1.0})
    log.close()
    assert drawn == [2, 3]


# --- the test's numbers and pictures ---


def test_tensorboard_has_settings_test_score_and_confusions(tuned):
    events = EventAccumulator(str(tuned), size_guidance={"images": 0}).Reload()
    found = json.loads((tuned / "test.json").read_text())
    (point,) = events.Scalars("test_top1")
    assert point.value == pytest.approx(found["top1"]) and point.step == events.Scalars("model_top1")[-1].step
    (image,) = events.Images("test_confusion")
    assert image.width > 100
    (text,) = events.Tensors("settings/text_summary")
    assert b"| nb_classes | 3 |" in text.tensor_proto.string_val[0]


def test_classes_and_confused_pairs_are_counted(tuned):
    rows = [line.split(",") for line in (tuned / "classes.csv").read_text().splitlines()]
    assert rows[0] == ["class", "videos", "correct", "accuracy", "most_common_wrong"]
    assert [row[:2] for row in rows[1:]] == [["a", "2"], ["b", "2"], ["c", "1"]]
    found = json.loads((tuned / "test.json").read_text())
    assert sum(int(row[2]) for row in rows[1:]) == pytest.approx(found["top1"] / 100 * 5)
    assert np.mean([float(row[3]) for row in rows[1:]]) == pytest.approx(found["mean_class_accuracy"], abs=0.01)
    pairs = [line.split(",") for line in (tuned / "confused_pairs.csv").read_text().splitlines()][1:]
    assert sum(int(pair[2]) for pair in pairs) == 5 - sum(int(row[2]) for row in rows[1:])
    worst = {true: predicted for true, predicted, *_ in reversed(pairs)}
    assert [row[4] for row in rows[1:]] == [worst.get(name, "") for name in "abc"]
    header, *predictions = (tuned / "predictions.csv").read_text().splitlines()
    assert header.endswith("true,predicted")
    for row in (line.split(",") for line in predictions):
        assert row[-2:] == ["abc"[int(row[1])], "abc"[int(row[2])]]


def test_the_most_confused_pairs_come_first():
    confusion = np.array([[5, 3, 0], [0, 10, 3], [4, 0, 0]])
    assert [pair[:3] for pair in confused_pairs(confusion)] == [(2, 0, 4), (0, 1, 3), (1, 2, 3)]
    assert [round(pair.share, 3) for pair in confused_pairs(confusion)] == [1.0, 0.375, 0.231]
    assert confused_pairs(np.diag([1, 2])) == []


@pytest.mark.parametrize(("num_classes", "panels"), [(25, 1), (26, 2)])
def test_of_many_classes_the_confused_pairs_are_drawn_by_name(num_classes, panels):
    confusion = np.diag(np.full(num_classes, 3))
    confusion[7, 4] = 2
    names = [f"class {k}" if k else "from $5 to $x^" for k in range(num_classes)]
    figure = confusions(confusion, names)
    assert to_picture(figure).ndim == 3
    matrix, *others, _ = figure.axes  # the last one is the colour bar
    assert 1 + len(others) == panels
    labels = [text.get_text() for axes in (matrix, *others) for text in axes.get_yticklabels()]
    assert ("class 7" in labels) == (panels == 1) and ("class 7 → class 4" in labels) == (panels == 2)


# --- Weights & Biases ---


def test_reports_can_be_switched_off(data, tmp_path):
    finetune(data, tmp_path, "--report_to")
    assert (tmp_path / "args.json").is_file() and not list(tmp_path.glob("events*"))


@pytest.mark.parametrize("there", [None, type(sys)("wandb")], ids=["absent", "only its folder of runs"])
def test_a_missing_package_is_one_line_with_the_command(data, tmp_path, monkeypatch, there):
    monkeypatch.setitem(sys.modules, "wandb", there)
    done = start(run_class_finetuning.main, *RUN, "--data_path", data, "--output_dir", tmp_path, "--report_to", "wandb")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "--report_to wandb" in done.stderr and "pip install wandb" in done.stderr


needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="the package wandb is not installed")


@needs_wandb
def test_a_requeued_run_goes_on_with_its_curves(data, tmp_path, monkeypatch):
    """Offline, where every start writes a file of its own, which `wandb sync` puts together by the run's id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    finetune(data, tmp_path, "--report_to", "tensorboard", "wandb")
    finetune(data, tmp_path, "--report_to", "tensorboard", "wandb", "--epochs", "2")
    kept = (tmp_path / WANDB_ID).read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == 2 * [f"run-{kept}.wandb"]
    histories = [read_history(file) for file in files]
    for history in histories:
        assert {"step", "loss", "lr", "model_top1", "test_top1"} <= set().union(*history)
    steps = [row["step"] for history in histories for row in history if "loss" in row]
    assert steps == sorted(set(steps)) and len(steps) == 2
    assert any("test_confusion.path" in row for row in histories[1]) and list(tmp_path.glob("events*"))
    finetune(data, tmp_path, "--report_to", "wandb", "--no_auto_resume")
    assert (tmp_path / WANDB_ID).read_text().strip() != kept


def read_history(file) -> list[dict]:
    """The logged rows of a run's file, of which wandb has no reader of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in read_records(file.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def read_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind a header of its own of 7 bytes."""
    place, record, block = 7, b"", 2**15
    while place < len(data):
        if block - place % block < 7:
            place += block - place % block  # no record starts in a block's last bytes
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@needs_wandb
def test_a_run_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    wandb = import_wandb()

    def fail(**settings):
        raise wandb.Error("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(SettingError, match=r"^--report_to wandb: api_key not configured \(no-tty\): .*offline"):
        WeightsAndBiases(str(tmp_path), resumes=True)


def test_a_service_that_fails_costs_entries_and_not_the_run():
    class Broken:
        failures = (Exception,)

        def scalars(self, step, values):
            raise RuntimeError("the service has died")

    warned = []
    log = RunLog(output_dir="", reporters=[Broken()], warn=warned.append)
    log.scalars(1, {"loss": 1.0})
    log.scalars(2, {"loss": 1.0})
    assert len(warned) == 1 and "the service has died" in warned[0]
