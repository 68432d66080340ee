"""Pre-training on the targets other than pixels, by the program, on real video files."""

import json

import pytest
import torch
from programs import start
from videos import write_list, write_videos

from masking_generator import RULES
from modeling_pretrain import create_pretrain_model
from run_mae_pretraining import main
from targets import Losses, create_target

SMALL = {"name": "pretrain_videomae_tiny_patch8_64", "num_frames": 8, "input_size": 32, "decoder_depth": 1}
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
def flags():
    """The flags of each target."""
    return {"hog": ["--target", "hog"]}


@pytest.mark.parametrize("target", ["hog"])
def test_twenty_steps_lower_the_loss(target, flags, data, tmp_path):
    """And the picture at the end says that the prediction can't be drawn."""
    more = ["--epochs", "10", "--save_ckpt_freq", "10", "--vis_freq", "10"]
    done = start(main, *FLAGS, *flags[target], "--data_path", data, "--output_dir", tmp_path, *more)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss_reconstruction"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert len(losses) == 10 and losses[-1] < 0.95 * losses[0]
    assert list((tmp_path / "pictures").glob("*.png"))


@pytest.mark.parametrize("mask_type", list(RULES))
def test_every_mask_type_trains_hog(mask_type):
    model = create_pretrain_model(**SMALL, target="hog", mask_type=mask_type, mask_ratio=0.75)
    pixels = torch.rand(2, 3, 8, 32, 32)
    values = Losses(target=create_target("hog", patch=8))(model(pixels), pixels)
    values["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
