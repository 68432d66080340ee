"""Pre-training on the targets other than pixels, by the program, on real video files."""

import json

import pytest
import torch
from programs import start, start_process
from tokenizer import export
from videos import write_list, write_videos

from masking_generator import RULES
from modeling_pretrain import create_pretrain_model
from run_mae_pretraining import main
from runs.checkpoints import save_checkpoint
from targets import Losses, Target, create_target
from weights.names import load_weights
from weights.pretraining import load_pretrain_model

SMALL = {"name": "pretrain_videomae_tiny_patch8_64", "num_frames": 8, "input_size": 32, "decoder_depth": 1}
TARGETS = ["hog", "features", "tokens"]
WIDTHS = {"features": 128, "tokens": 16}
FLAGS = [
    *("--model", SMALL["name"], "--num_frames", "8", "--input_size", "32", "--decoder_depth", "1"),
    *("--mask_ratio", "0.8", "--batch_size", "4", "--warmup_epochs", "0", "--sampling_rate", "1", "--lr", "0.1"),
    *("--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav", "--log_freq", "1"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A list of eight small videos."""
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, range(20, 28), size=(40, 48))
    return write_list(folder / "list.csv", *(f"{name} 0" for name in names))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder of frozen networks."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(1)
    for name, changes in {"teacher": {}, "other": {"mask_type": "tube"}, "long": {"num_frames": 16}}.items():
        settings = {**SMALL, **changes}
        model = create_pretrain_model(**settings)
        save_checkpoint(folder / f"{name}.pth", {"model": model.state_dict(), "model_settings": settings})
    export(folder / "tokenizer.pt2", batch=None)
    export(folder / "other.pt2", batch=None)
    export(folder / "threes.pt2", batch=3)
    export(folder / "large.pt2", batch=None, side=64)
    (folder / "broken.pt2").write_bytes((folder / "tokenizer.pt2").read_bytes()[:999])
    return folder


def flags_of(target: str, networks, *, other: bool = False) -> list:
    """The flags that a target needs; `other`: with another network."""
    files = {
        "features": ["--teacher", networks / f"{'other' if other else 'teacher'}.pth"],
        "tokens": ["--tokenizer", networks / f"{'other' if other else 'tokenizer'}.pt2", "--tokenizer_vocab", "16"],
    }
    return ["--target", target, *files.get(target, [])]


def pretrain(data, output, *flags, processes: int = 0):
    flags = (*FLAGS, "--data_path", data, "--output_dir", output, *flags)
    return start_process("run_mae_pretraining.py", *flags, processes=processes) if processes else start(main, *flags)


def losses(output) -> list[float]:
    return [json.loads(line)["loss_reconstruction"] for line in (output / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_twenty_steps_lower_the_loss(target, data, networks, tmp_path):
    """And there are pictures; the checkpoint has no weights of a frozen network, and is read without it."""
    more = ["--epochs", "10", "--save_ckpt_freq", "10", "--vis_freq", "10"]
    done = pretrain(data, tmp_path, *flags_of(target, networks), *more)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == 10 and losses(tmp_path)[-1] < 0.95 * losses(tmp_path)[0]
    assert list((tmp_path / "pictures").glob("*.png"))
    found = load_weights(tmp_path / "checkpoint-9.pth")
    assert not [name for name in found.tensors if "teacher" in name]
    load_pretrain_model(found)


@pytest.mark.parametrize("target", ["features", "tokens"])
def test_a_resumed_run_equals_a_straight_one(target, data, networks, tmp_path):
    flags = [*flags_of(target, networks), "--epochs", "2", "--save_ckpt_freq", "1", "--vis_freq", "0"]
    assert pretrain(data, tmp_path, *flags).returncode == 0
    last = tmp_path / "checkpoint-1.pth"
    straight = torch.load(last, weights_only=True)["model"]
    last.unlink()
    done = pretrain(data, tmp_path, *flags)
    assert "checkpoint-0.pth: 1 of 2 epochs are done" in done.stdout, done.stderr
    resumed = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)

    other = pretrain(data, tmp_path, *flags, *flags_of(target, networks, other=True))
    assert other.returncode != 0 and "Traceback" not in other.stderr
    assert f"target_settings = {{'width': {WIDTHS[target]}, 'network': '--" in other.stderr


def test_two_processes_train_as_one(data, networks, tmp_path):
    """With a mask that has no dropout, unlike the sampler."""
    flags = [*flags_of("features", networks), "--epochs", "1", "--vis_freq", "0", "--mask_type", "tube"]
    found = []
    for processes, batch in ((0, 4), (2, 2)):
        done = pretrain(data, tmp_path / str(processes), *flags, "--batch_size", batch, processes=processes)
        assert done.returncode == 0, done.stderr
        found.append(losses(tmp_path / str(processes)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "features"], "--target features needs --teacher FILE"),
        (["--target", "hog", "--teacher", "teacher.pth"], "--target hog takes no --teacher"),
        (["--target", "features", "--teacher", "missing.pth"], "missing.pth: no such checkpoint"),
        (["--target", "tokens"], "--target tokens needs --tokenizer FILE"),
        (["--target", "tokens", "--tokenizer", "tokenizer.pt2"], "--tokenizer_vocab is missing"),
        (
            ["--target", "tokens", "--tokenizer", "tokenizer.pt2", "--tokenizer_vocab", "3"],
            "tokenizer.pt2 gives the ids 0 to 15: --tokenizer_vocab 3",
        ),
        (
            ["--target", "tokens", "--tokenizer", "threes.pt2", "--tokenizer_vocab", "16"],
            "threes.pt2 takes 3 clips at a time, which does not divide the 4 of a batch",
        ),
        (
            ["--target", "tokens", "--tokenizer", "large.pt2", "--tokenizer_vocab", "16"],
            "float32 and gives (any, 256) int64, this model needs (B, 3, 8, 32, 32) float32 and (B, 64) int64",
        ),
        (
            ["--target", "tokens", "--tokenizer", "broken.pt2", "--tokenizer_vocab", "16"],
            "broken.pt2 is not a readable program of torch.export.save",
        ),
        (
            ["--target", "tokens", "--tokenizer", "teacher.pth", "--tokenizer_vocab", "16"],
            "teacher.pth is not a readable program of torch.export.save",
        ),
        (
            ["--target", "features", "--teacher", "long.pth"],
            "long.pth has 8 x 4 x 4 tokens of 2 x 8 x 8 (frames x pixels), this model has 4 x 4 x 4 tokens",
        ),
    ],
)
def test_wrong_settings_are_one_line(flags, words, data, networks, tmp_path):
    flags = [networks / flag if flag.endswith((".pth", ".pt2")) else flag for flag in flags]
    done = pretrain(data, tmp_path, "--epochs", "1", *flags)
    assert done.returncode != 0 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def tiny_target(name: str) -> tuple[dict, Target]:
    """Settings of the model, and a target whose frozen network is a stand-in."""
    generator = torch.Generator().manual_seed(0)
    made = {
        "features": lambda pixels: torch.rand(len(pixels), 64, 32, generator=generator),
        "tokens": lambda pixels: torch.randint(0, 32, (len(pixels), 64), generator=generator),
    }
    if name == "hog":
        return {}, create_target(name, patch=8)
    settings = {"width": 32, "network": "a test's"}
    return settings, create_target(name, patch=8, teacher=made[name], **settings)


@pytest.mark.parametrize("mask_type", list(RULES))
@pytest.mark.parametrize("name", TARGETS)
def test_every_mask_type_trains(name, mask_type):
    settings, target = tiny_target(name)
    model = create_pretrain_model(**SMALL, target=name, target_settings=settings, mask_type=mask_type, mask_ratio=0.75)
    pixels = torch.rand(2, 3, 8, 32, 32)
    values = Losses(target=target)(model(pixels), pixels)
    values["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
