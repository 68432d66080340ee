"""Stopping anywhere and going on: nothing is lost and nothing is changed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import start, start_process
from videos import write_list, write_videos

import engine_for_finetuning
import run_class_finetuning
import run_mae_pretraining
from runs.checkpoints import LAST, newest_checkpoint
from runs.console import Console
from runs.logs import RunLog
from runs.reporters import TensorBoard
from runs.signals import SAVED, StopSignals
from runs.version import code_version

STEPS = 4  # an epoch
COMMON = [
    *("--batch_size", "2", "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.05", "--sampling_rate", "1"),
    *("--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav", "--input_size", "32"),
    *("--save_ckpt_freq", "1", "--log_freq", "3", "--num_sample", "2"),
]
PRETRAIN = [*COMMON, "--model", "pretrain_videomae_tiny_patch8_64", "--vis_freq", "0", "--decoder_depth", "1"]
FINETUNE = [
    *COMMON,
    *("--model", "vit_tiny_patch8_64", "--data_set", "custom", "--nb_classes", "3", "--model_ema"),
    *("--model_ema_decay", "0.9", "--test_num_segment", "1", "--test_num_crop", "1", "--drop_path", "0.2"),
]
PROGRAMS = {
    "pretraining": (run_mae_pretraining, PRETRAIN, "train.csv"),
    "finetuning": (run_class_finetuning, FINETUNE, ""),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine small videos: four steps of two and one left over."""
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, range(18, 27), size=(40, 48))
    for split, count in (("train", 9), ("val", 3), ("test", 3)):
        write_list(folder / f"{split}.csv", *(f"{name} {i % 3}" for i, name in enumerate(names[:count])))
    return folder


def run(kind: str, data, output, *flags):
    module, settings, part = PROGRAMS[kind]
    return start(module.main, *settings, "--data_path", data / part, "--output_dir", output, *flags)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The end state of each program's run that nothing interrupted."""
    states = {}
    for kind in PROGRAMS:
        output = tmp_path_factory.mktemp(kind)
        done = run(kind, data, output)
        assert done.returncode == 0, done.stderr
        states[kind] = end_state(output), log(output)
    return states


def end_state(output) -> dict:
    return torch.load(output / "checkpoint-1.pth", weights_only=True)


@pytest.fixture
def usual_algorithms(monkeypatch):
    """Leaves torch as it was after a run with --deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def log(output) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def assert_equal(ours, theirs, where="") -> None:
    """Two nested states, bit for bit."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_end(output, state: dict, entries: list[dict]) -> None:
    for name in ("model", "optimizer", "model_ema", "best"):
        if name in state and name != "best":
            assert_equal(end_state(output)[name], state[name], name)
        elif name in state:
            assert end_state(output)[name] == state[name]
    ours = {entry["epoch"]: entry for entry in log(output)}
    assert list(ours) == [0, 1]
    for entry in entries:
        assert ours[entry["epoch"]]["loss"] == pytest.approx(entry["loss"], rel=1e-12)
        assert ours[entry["epoch"]]["lr"] == entry["lr"]


def signal_at(monkeypatch, step: int, *numbers: int) -> None:
    """The process gets the signals after its optimiser step `step`, counted from 1."""
    steps, advance = iter(range(1, 100)), Console.advance

    def advance_and_signal(self):
        advance(self)
        if next(steps) == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Console, "advance", advance_and_signal)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_deterministic_algorithms_change_nothing_on_the_cpu(kind, data, straight, tmp_path, usual_algorithms):
    assert not torch.are_deterministic_algorithms_enabled()
    done = run(kind, data, tmp_path, "--deterministic")
    assert done.returncode == 0, done.stderr
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert_same_end(tmp_path, *straight[kind])


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (2, 2), (STEPS, 0), (STEPS + 3, 2)])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_run_stopped_anywhere_ends_in_the_same_bits(kind, step, workers, data, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, step, signal.SIGTERM)
        stopped = run(kind, data, tmp_path, "--num_workers", workers)
    epoch, batch = divmod(step, STEPS) if step % STEPS else (step // STEPS - 1, STEPS)
    assert stopped.returncode == SAVED
    assert f"stopped in epoch {epoch} after {batch} of {STEPS} batches, saved in" in stopped.stderr
    state = torch.load(tmp_path / LAST, weights_only=True)
    assert (state["epoch"], state["batch"]) == (epoch - 1, batch)

    resumed = run(kind, data, tmp_path, "--num_workers", workers)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{epoch} of 2 epochs are done, and {batch} of {STEPS} batches of the next" in resumed.stdout
    assert_same_end(tmp_path, *straight[kind])


def test_a_checkpoint_tells_where_and_by_what_it_was_made(data, tmp_path, monkeypatch):
    signal_at(monkeypatch, 3, signal.SIGUSR1)
    assert run("finetuning", data, tmp_path).returncode == SAVED
    state = torch.load(tmp_path / LAST, weights_only=True)
    expected = {
        "model",
        "optimizer",
        "optimizer_name",
        "scaler",
        "model_ema",
        "epoch",
        "batch",
        "layout",
        "best",
        "progress",
    }
    assert expected | {"args", "model_settings", "class_names", "version"} == set(state)
    layout = {"num_videos": 9, "seed": 0, "world_size": 1, "batch_size": 2, "update_freq": 1}
    assert state["layout"] == layout
    assert state["version"] == code_version()


def test_a_signal_during_validation_repeats_the_validation(data, straight, tmp_path, monkeypatch):
    def validate(*args, ema: bool, **settings):
        if not ema:
            os.kill(os.getpid(), signal.SIGTERM)
        return [{"top1": 100.0, "top5": 100.0, "loss": 0.0}]  # of a validation cut short: must not count

    with monkeypatch.context() as patch:
        patch.setattr(engine_for_finetuning, "validate", validate)
        stopped = run("finetuning", data, tmp_path)
    assert stopped.returncode == SAVED and f"after {STEPS} of {STEPS} batches" in stopped.stderr
    assert run("finetuning", data, tmp_path).returncode == 0
    assert_same_end(tmp_path, *straight["finetuning"])


def test_checkpoints_by_the_clock(data, straight, tmp_path):
    """Every step is later than 1e-9 minutes after the last checkpoint."""
    done = run("pretraining", data, tmp_path, "--save_ckpt_minutes", "1e-9")
    assert done.returncode == 0
    state = torch.load(tmp_path / LAST, weights_only=True)
    assert (state["epoch"], state["batch"]) == (0, STEPS)
    (tmp_path / "checkpoint-1.pth").unlink()
    assert newest_checkpoint(tmp_path, print)[0].name == LAST
    assert f"{STEPS} of {STEPS} batches" in run("pretraining", data, tmp_path).stdout
    assert_equal(end_state(tmp_path)["model"], straight["pretraining"][0]["model"])


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped"])
def test_a_damaged_last_checkpoint_is_named_and_passed_over(damage, data, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, STEPS + 2, signal.SIGTERM)
        run("pretraining", data, tmp_path)
    content = bytearray((tmp_path / LAST).read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 16
    (tmp_path / LAST).write_bytes(content)
    resumed = run("pretraining", data, tmp_path)
    assert re.search(rf"{LAST}: not a readable checkpoint .* trying an older one", resumed.stderr)
    assert "checkpoint-0.pth: 1 of 2 epochs are done" in resumed.stdout
    assert_equal(end_state(tmp_path)["model"], straight["pretraining"][0]["model"])


def test_old_checkpoints_are_pruned_but_not_the_best_or_the_newest(data, tmp_path):
    done = run("finetuning", data, tmp_path, "--epochs", "4", "--keep_ckpts", "2")
    assert done.returncode == 0
    names = {p.name for p in tmp_path.glob("*.pth")}
    assert names == {"checkpoint-best.pth", "checkpoint-2.pth", "checkpoint-3.pth"}


def test_what_a_killed_process_left_half_written_is_removed(data, tmp_path):
    (tmp_path / f".{LAST}.123.tmp").write_bytes(b"half a checkpoint")
    assert run("pretraining", data, tmp_path, "--epochs", "1").returncode == 0
    assert not list(tmp_path.glob(".*"))


@contextlib.contextmanager
def small_disk(tmp_path):
    """A file system with room for one checkpoint and a half; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(data, straight, tmp_path):
    """The first checkpoint stays whole, training continues, and the run says at its end that the last is missing."""
    with small_disk(tmp_path) as disk:
        full = run("pretraining", data, disk)
        assert full.returncode == 1
        assert re.search(r"checkpoint-1\.pth could not be written .*\n?.*training continues", full.stderr)
        assert "free some space and rerun the same command" in full.stderr
        assert [p.name for p in disk.glob("*.pth")] == ["checkpoint-0.pth"] and not list(disk.glob(".*.tmp"))
        shutil.copytree(disk, tmp_path / "larger")
    resumed = run("pretraining", data, tmp_path / "larger")
    assert resumed.returncode == 0 and "checkpoint-0.pth: 1 of 2 epochs are done" in resumed.stdout
    assert_equal(end_state(tmp_path / "larger")["model"], straight["pretraining"][0]["model"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_costs_entries_of_the_log_and_not_the_run(tmp_path):
    with small_disk(tmp_path) as disk:
        warned = []
        log = RunLog(output_dir=str(disk), reporters=[TensorBoard(str(disk / "curves"))], warn=warned.append)
        picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        for epoch in range(3):
            log.scalars(epoch, {"loss": 1.0})
            log.epoch({"epoch": epoch})
            log.picture(epoch, picture)
        assert len(warned) == len(set(warned)) >= 2 and all("training continues" in text for text in warned)
        filler.unlink()
        log.scalars(3, {"loss": 1.0})
        log.epoch({"epoch": 3})
        log.picture(3, picture)
        log.close()
        assert [json.loads(line)["epoch"] for line in (disk / "log.txt").read_text().splitlines()] == [3]
        assert (disk / "pictures" / "epoch-0003.png").is_file() and list((disk / "curves").glob("events*"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(data, tmp_path, monkeypatch):
    """The same without mounting: the disk is full after 100 kB."""
    run("pretraining", data, tmp_path, "--epochs", "1")
    before = (tmp_path / "checkpoint-0.pth").read_bytes()
    real = torch.save

    def save(state, file):
        file.write(b"x" * 100_000)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        done = run("pretraining", data, tmp_path)
    assert torch.save is real and done.returncode == 1
    assert "checkpoint-1.pth could not be written ([Errno 28] No space left on device)" in done.stderr
    assert (tmp_path / "checkpoint-0.pth").read_bytes() == before and not list(tmp_path.glob(".*"))
    assert [entry["epoch"] for entry in log(tmp_path)] == [0, 1]


def test_another_batch_size_goes_on_where_the_videos_are(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        run("pretraining", data, tmp_path)
    resumed = run("pretraining", data, tmp_path, "--batch_size", "1", "--lr", "0.1")
    assert "a step was 1 process x 2 videos x 1 batch = 2, now it is 1 process x 1 video " in resumed.stdout
    assert "the epoch continues at its video 6" in resumed.stdout
    assert "changed since then: --lr 0.05 -> 0.1" in resumed.stdout
    assert resumed.returncode == 0 and "step 9/18" in resumed.stdout


def test_a_stop_between_accumulated_steps(data, tmp_path, monkeypatch):
    """Two batches make a step; the run that is stopped after the first step equals the one that isn't."""
    flags = ["--update_freq", "2", "--epochs", "2"]
    assert run("pretraining", data, tmp_path / "straight", *flags).returncode == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGTERM)
        assert "after 2 of 4 batches" in run("pretraining", data, tmp_path / "out", *flags).stderr
    assert run("pretraining", data, tmp_path / "out", *flags).returncode == 0
    assert_equal(end_state(tmp_path / "out")["model"], end_state(tmp_path / "straight")["model"])


def test_under_deepspeed_too(data, straight, tmp_path, monkeypatch):
    """Stopped under DeepSpeed and gone on without it: its steps equal the native ones to rounding."""
    with monkeypatch.context() as patch:
        signal_at(patch, STEPS + 2, signal.SIGTERM)
        stopped = run("pretraining", data, tmp_path, "--enable_deepspeed")
    assert stopped.returncode == SAVED and f"after 2 of {STEPS} batches" in stopped.stderr
    resumed = run("pretraining", data, tmp_path)
    assert resumed.returncode == 0 and "changed since then: --enable_deepspeed True -> False" in resumed.stdout
    for name, value in straight["pretraining"][0]["model"].items():
        torch.testing.assert_close(end_state(tmp_path)["model"][name], value, rtol=1e-4, atol=2e-5)


def test_nothing_is_started_afresh_where_all_checkpoints_are_damaged(data, tmp_path):
    run("pretraining", data, tmp_path, "--epochs", "1")
    (tmp_path / "checkpoint-0.pth").write_bytes(b"torn")
    done = run("pretraining", data, tmp_path)
    assert done.returncode == 1 and "none of the checkpoints" in done.stderr and "--no_auto_resume" in done.stderr
    assert (tmp_path / "checkpoint-0.pth").read_bytes() == b"torn"


def test_pruning_leaves_what_was_just_written_beside_later_epochs_of_another_run(data, tmp_path):
    run("pretraining", data, tmp_path, "--epochs", "1")
    (tmp_path / "checkpoint-0.pth").rename(tmp_path / "checkpoint-7.pth")
    done = run("pretraining", data, tmp_path, "--no_auto_resume", "--keep_ckpts", "1")
    assert done.returncode == 0
    assert {p.name for p in tmp_path.glob("*.pth")} == {"checkpoint-1.pth", "checkpoint-7.pth"}


def test_resume_is_for_the_first_start_of_a_command_only(data, straight, tmp_path, monkeypatch):
    """Started again with the same --resume, a run goes on where it was, not at the old file."""
    run("pretraining", data, tmp_path / "old")
    flags = ["--resume", tmp_path / "old" / "checkpoint-0.pth"]
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        stopped = run("pretraining", data, tmp_path / "new", *flags)
    assert "1 of 2 epochs are done\n" in stopped.stdout
    again = run("pretraining", data, tmp_path / "new", *flags)
    assert f"resumed {tmp_path / 'new' / LAST}: 1 of 2 epochs are done, and 2 of 4 batches" in again.stdout
    assert_equal(end_state(tmp_path / "new")["model"], straight["pretraining"][0]["model"])


def test_changed_flags_of_the_optimiser_hold_and_another_optimiser_is_refused(data, tmp_path):
    run("pretraining", data, tmp_path, "--epochs", "1")
    done = run("pretraining", data, tmp_path, "--opt_betas", "0.5", "0.6", "--use_checkpoint")
    changed = re.search("changed since then: (.*)", done.stdout)[1]
    assert "--opt_betas None -> [0.5, 0.6]" in changed and "--use_checkpoint False -> True" in changed
    assert end_state(tmp_path)["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.6)
    done = run("pretraining", data, tmp_path, "--opt", "sgd", "--epochs", "3")
    assert done.returncode == 1 and "was made with the optimiser AdamW, --opt sgd is another" in done.stderr


def test_an_output_folder_that_cannot_be_is_told_at_once(data, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("pretraining", data, tmp_path / "file" / "out")
    assert done.returncode == 1 and "--output_dir" in done.stderr and "can't be written to" in done.stderr


def test_a_run_outlives_a_full_disk_behind_its_console(data, tmp_path, monkeypatch):
    module, settings, part = PROGRAMS["pretraining"]
    flags = ["--data_path", str(data / part), "--output_dir", str(tmp_path), "--epochs", "1"]
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails
        monkeypatch.setattr("sys.stdout", full)
        assert module.main([*settings, *flags]) == 0
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-0.pth").is_file()


def test_another_list_starts_the_epoch_again(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, STEPS + 1, signal.SIGTERM)
        run("pretraining", data, tmp_path)
    resumed = run("pretraining", data, tmp_path, "--seed", "7")
    assert "9 videos with --seed 0 are now 9 videos with --seed 7, in another order" in resumed.stdout
    assert "1 of 2 epochs are done\n" in resumed.stdout and resumed.returncode == 0


# --- real processes ------------------------------------------------------------------------------------------


def begin(kind: str, data, output, *flags, processes: int = 1) -> subprocess.Popen:
    """A program in processes of its own, the signals of which are this test's to send."""
    module, settings, part = PROGRAMS[kind]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    flags = [*settings, "--data_path", str(data / part), "--output_dir", str(output), *flags]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), module.__file__, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Reads the process's output up to a line with the text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, SAVED), (signal.SIGUSR1, SAVED), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_a_run(number, status, data, tmp_path):
    """As Ctrl-C and SLURM send it: the data workers get it too. No process is left behind."""
    process = begin("pretraining", data, tmp_path, "--epochs", "500", "--log_freq", "1", "--num_workers", "2")
    wait_for(process, "epoch 1  step")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors and f"saved in {tmp_path / LAST}" in errors
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_second_signal_leaves_at_once(data, tmp_path):
    process = begin("pretraining", data, tmp_path, "--epochs", "500", "--log_freq", "1", "--update_freq", "4")
    wait_for(process, "epoch 0  step")
    process.send_signal(signal.SIGSTOP)  # both arrive before it can save
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    while "second signal" not in (line := process.stderr.readline()):
        assert line or process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)


def ignores(process: subprocess.Popen, number: int) -> bool:
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(ignored and int(ignored[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads in /proc whether a signal is ignored")
def test_slurms_warning_during_the_imports_does_not_end_a_program():
    for module, _, _ in PROGRAMS.values():
        process = subprocess.Popen([sys.executable, module.__file__], stderr=subprocess.PIPE, text=True)
        while not ignores(process, signal.SIGUSR1):  # the first thing that it does
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 1 and "--data_path is missing" in errors


def test_after_the_end_a_signal_is_what_it_was_before():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with StopSignals():
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN
    assert signal.signal(signal.SIGUSR1, before) == signal.SIG_IGN


def test_rank_0_speaks_for_all(monkeypatch, capfd):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.status == SAVED
        assert ("SIGUSR1: finishing the step" in capfd.readouterr().err) == (rank == 0)


def test_another_number_of_processes_goes_on_within_the_epoch(data, straight, tmp_path, monkeypatch):
    """One process with two videos a step stops; two with one each end where it would have ended."""
    flags = ["--sampler", "mlp"]
    one = run("pretraining", data, tmp_path / "one", *flags)
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        run("pretraining", data, tmp_path / "two", *flags)
    resumed = start_process(
        *("run_mae_pretraining.py", *PRETRAIN, "--data_path", data / "train.csv", *flags, "--batch_size", "1"),
        *("--output_dir", tmp_path / "two"),
        processes=2,
    )
    assert one.returncode == resumed.returncode == 0, resumed.stderr
    assert "now it is 2 processes x 1 video x 1 batch = 2" in resumed.stdout
    assert "the epoch continues at its video 4" in resumed.stdout
    theirs = end_state(tmp_path / "one")["model"]
    for name, value in end_state(tmp_path / "two")["model"].items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=2e-5)


def test_two_processes_stop_after_the_same_step(data, tmp_path):
    """Only one of them gets the signal; the run that goes on equals one that was not stopped."""
    flags = ["--batch_size", "1", "--log_freq", "1"]
    whole = start_process(
        *("run_mae_pretraining.py", *PRETRAIN, "--data_path", data / "train.csv", *flags),
        *("--output_dir", tmp_path / "straight"),
        processes=2,
    )
    assert whole.returncode == 0, whole.stderr
    process = begin("pretraining", data, tmp_path / "out", *flags, processes=2)
    wait_for(process, "step 1/8")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "run_mae"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGUSR1)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and errors.count("saved in") == 1
    assert (tmp_path / "out" / LAST).is_file()
    done = start_process(
        *("run_mae_pretraining.py", *PRETRAIN, "--data_path", data / "train.csv", *flags),
        *("--output_dir", tmp_path / "out"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    assert_equal(end_state(tmp_path / "out")["model"], end_state(tmp_path / "straight")["model"])
