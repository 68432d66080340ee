"""A new mask rule and a new target, registered from outside: one function or class and one row each."""

import json

import numpy as np
import pytest
import torch
from einops import reduce
from PIL import Image
from programs import start
from torch.nn.functional import cross_entropy
from videos import write_list, write_videos

from masking_generator import RULES, Rule, draw_evenly, floor_masked
from modeling_pretrain import create_pretrain_model
from optim import create_optimizer
from pictures.drawing import filmstrip
from pictures.panels import BLANK, mask_panels, prediction_panel, training_picture
from pictures.reconstruction import PictureSettings, reconstruct
from run_mae_pretraining import main
from runs.engine import Engine
from targets import TARGETS, Losses, Target, create_target
from weights.names import load_weights
from weights.pretraining import load_pretrain_model

SETTINGS = {"name": "pretrain_videomae_tiny_patch8_64", "num_frames": 8, "input_size": 32, "decoder_depth": 1}
FLAGS = [
    *("--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--num_frames", "8"),
    *("--decoder_depth", "1", "--batch_size", "3", "--epochs", "1", "--warmup_epochs", "0", "--lr", "0.05"),
    *("--sampling_rate", "1", "--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav"),
    *("--save_ckpt_freq", "1", "--log_freq", "1", "--mask_type", "first_half", "--mask_ratio", "0.75"),
]


def first_half_visible(log_p, uniform, window, count):
    """Only tokens of the first half of the clip are visible."""
    return draw_evenly(uniform[:, : uniform.shape[1] // 2], count)


class MeanColour(Target):
    """The mean red, green and blue of a token."""

    width = 3

    def __call__(self, pixels, masked):
        colours = reduce(
            pixels, "b c (t f) (h p) (w q) -> b (t h w) c", "mean", f=2, p=self.patch, q=self.patch
        )  # (B,N,3)
        return colours.gather(1, masked[:, :, None].expand(-1, -1, 3))


class Brightness(MeanColour):
    """Which of eight degrees of brightness a token has, as a tokenizer would number it."""

    width = 8
    error_note = "cross-entropy"

    def __call__(self, pixels, masked):
        return (super().__call__(pixels, masked).mean(2) * 8).long().clamp_max(7)  # (B,Nm)

    def error(self, prediction, target, loss="mse"):
        return cross_entropy(prediction.float().transpose(1, 2), target, reduction="none")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(RULES, "first_half", Rule(first_half_visible, floor_masked))
    monkeypatch.setitem(TARGETS, "mean_colour", MeanColour)
    monkeypatch.setitem(TARGETS, "brightness", Brightness)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A list of three small videos."""
    folder = tmp_path_factory.mktemp("videos")
    names = write_videos(folder, range(20, 23), size=(40, 48))
    return write_list(folder / "list.csv", *(f"{name} 0" for name in names))


@pytest.mark.parametrize("mask_type", ["first_half", "adaptive"])
@pytest.mark.parametrize(("name", "width"), [("mean_colour", 3), ("brightness", 8)])
def test_they_train_and_lower_the_loss(name, width, mask_type):
    torch.manual_seed(0)
    model = create_pretrain_model(**SETTINGS, target=name, mask_type=mask_type, mask_ratio=0.75)
    optimizer = create_optimizer(model, lr=1e-3, weight_decay=0.0)
    engine = Engine(model, optimizer, device=torch.device("cpu"))
    losses = Losses(target=create_target(name, patch=model.patch))
    pixels, found = torch.rand(2, 3, 8, 32, 32), []
    for _ in range(8):
        output = engine(pixels)
        values = losses(output, pixels)
        engine.backward(values["loss"])
        engine.step()
        found.append(values["loss_reconstruction"].item())
    assert output.prediction.shape == (2, 48, width)
    if mask_type == "first_half":
        assert output.visible.max() < 32
    assert found[-1] < 0.95 * found[0]


def test_a_rule_may_read_the_sampler(monkeypatch):
    def most_probable(log_p, uniform, window, count):
        return log_p.topk(count, dim=1).indices

    monkeypatch.setitem(RULES, "most_probable", Rule(most_probable, floor_masked, adaptive=True))
    model = create_pretrain_model(**SETTINGS, mask_type="most_probable", mask_ratio=0.75).eval()
    output = model(torch.rand(2, 3, 8, 32, 32))
    assert torch.equal(output.visible, output.log_probs.topk(16, dim=1).indices.sort().values)
    assert model.sampler_parameters()


@pytest.mark.parametrize("name", ["mean_colour", "brightness"])
def test_a_target_that_cannot_be_drawn_has_a_panel_that_says_so(name):
    model = create_pretrain_model(**SETTINGS, target=name)
    settings = PictureSettings(target=create_target(name, patch=8))
    pixels = torch.rand(2, 3, 8, 32, 32)
    rec = reconstruct(model, pixels, settings)
    panel = prediction_panel(rec)
    assert panel.label.notes == ("this target can't be drawn",) and (panel.frames == BLANK).all()
    assert torch.equal(rec.error.isnan(), rec.visible) and not rec.error[~rec.visible].isnan().any()
    assert training_picture(model, pixels, settings).ndim == 3
    assert filmstrip(mask_panels(model, pixels, settings)).ndim == 3


@pytest.mark.parametrize("name", ["mean_colour", "brightness"])
def test_the_program_knows_them(videos, tmp_path, name):
    flags = [*FLAGS, "--data_path", videos, "--output_dir", tmp_path, "--target", name, "--vis_freq", "1"]
    done = start(main, *flags)
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / "log.txt").read_text())
    assert np.isfinite(entry["loss_reconstruction"]) and entry["loss_reconstruction"] > 0
    (picture,) = (tmp_path / "pictures").glob("*.png")
    assert Image.open(picture).width > 5 * 160
    model = load_pretrain_model(load_weights(tmp_path / "checkpoint-0.pth"))
    assert model.decoder.head.out_features == TARGETS[name].width
    assert model.masking.mask_type == "first_half"

    other = start(main, *flags, "--epochs", "2", "--target", "pixels")
    assert other.returncode != 0 and f"target = {name}, this run has target = pixels" in other.stderr


def test_a_checkpoint_without_a_target_resumes(videos, tmp_path):
    """As files are that were written before there was a choice of targets."""
    flags = [*FLAGS, "--data_path", videos, "--output_dir", tmp_path, "--vis_freq", "0"]
    assert start(main, *flags).returncode == 0
    path = tmp_path / "checkpoint-0.pth"
    state = torch.load(path, weights_only=True)
    assert state["model_settings"].pop("target") == "pixels"
    assert state["args"].pop("target") == "pixels"
    torch.save(state, path)
    done = start(main, *flags, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "checkpoint-0.pth: 1 of 2 epochs are done" in done.stdout
