"""The pictures: what the panels show, and the program that draws them."""

import argparse
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from videos import read_numbers, write_video

from augment import normalize, to_pixels
from clips.video import open_video
from masking_generator import visible_count
from modeling_pretrain import create_pretrain_model
from pictures import drawing, panels
from pictures.reconstruction import PictureSettings, predict_all, reconstruct, undisturbed
from runs.checkpoints import save_checkpoint
from targets import create_target, patchify, unpatchify
from weights.names import load_weights
from weights.pretraining import pretrain_settings

PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "visualize.py"
spec = importlib.util.spec_from_file_location("visualize", PROGRAM)
visualize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(visualize)

PIXELS = create_target("pixels", patch=8)
SHOWN = PictureSettings(target=PIXELS)
SETTINGS = {"name": "pretrain_videomae_tiny_patch8_64", "num_frames": 8, "input_size": 32, "mask_ratio": 0.9}


def make_model(**changes):
    torch.manual_seed(0)
    return create_pretrain_model(**{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Two clips (2,3,8,32,32) of a real video."""
    path = write_video(tmp_path_factory.mktemp("video") / "numbers.mp4", 30)
    with open_video(path) as video:
        frames = video.get_frames(range(16))[:, :, :32, :32]  # (16,3,32,32)
    return to_pixels(frames).view(2, 8, 3, 32, 32).transpose(1, 2).contiguous()


def frames_of(clips):
    return (clips * 255).round().byte().permute(0, 2, 3, 4, 1).numpy()


def by_token(frames, rec):
    """uint8 frames (B,T,H,W,3) as tokens (B,N,P)."""
    return patchify(torch.from_numpy(frames).permute(0, 4, 1, 2, 3), rec.patch)


# --- the panels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_type", ["adaptive", "tube"])
def test_five_panels_of_every_frame(pixels, mask_type):
    shown = panels.five_panels(reconstruct(make_model(mask_type=mask_type), pixels, SHOWN))
    assert [p.label.title.split()[0] for p in shown] == [*("video", "probability", "mask", "prediction", "error")]
    assert all(p.frames.shape == (2, 8, 32, 32, 3) and p.frames.dtype == np.uint8 for p in shown)
    assert np.array_equal(shown[0].frames, frames_of(pixels))


def test_a_model_without_a_sampler_has_a_blank_probability_panel(pixels):
    rec = reconstruct(make_model(mask_type="tube"), pixels, SHOWN)
    panel = panels.probability_panel(rec)
    assert "no sampler" in panel.label.notes
    assert len(np.unique(panel.frames)) == 1


def test_pasted_patches_are_the_original(model, pixels):
    rec = reconstruct(model, pixels, replace(SHOWN, show_visible="pasted"))
    shown, original = by_token(panels.prediction_panel(rec).frames, rec), by_token(frames_of(pixels), rec)
    assert torch.equal(shown[rec.visible], original[rec.visible])
    assert not torch.equal(shown[~rec.visible], original[~rec.visible])


def test_predicted_differs_from_pasted_in_the_visible_patches_only(model, pixels):
    pasted = reconstruct(model, pixels, replace(SHOWN, show_visible="pasted"))
    predicted = reconstruct(model, pixels, replace(SHOWN, show_visible="predicted"))
    assert torch.equal(pasted.visible, predicted.visible)
    differs = (patchify(pasted.prediction - predicted.prediction, 8) != 0).any(2)
    assert torch.equal(differs, pasted.visible)


def test_predictions_of_all_tokens_hold_those_of_the_masked_ones(model, pixels):
    with undisturbed(model, 0):
        out, predicted = predict_all(model, normalize(pixels), None)
    of_masked = predicted.gather(1, out.masked[:, :, None].expand_as(out.prediction))
    torch.testing.assert_close(of_masked, out.prediction)


def test_unnormalising_the_true_target_gives_the_original(pixels):
    everything = torch.arange(64).expand(2, -1)
    target = PIXELS(pixels, everything)
    restored = unpatchify(PIXELS.to_pixels(target, pixels), (4, 4, 4), 8)
    torch.testing.assert_close(restored, pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize_target", [True, False])
def test_the_caption_says_where_the_statistics_come_from(model, pixels, normalize_target):
    target = create_target("pixels", patch=8, normalize=normalize_target)
    rec = reconstruct(model, pixels, PictureSettings(target=target))
    assert any("original" in note for note in panels.prediction_panel(rec).label.notes) == normalize_target


def test_the_mask_panel_shows_exactly_the_visible_tokens(model, pixels):
    rec = reconstruct(model, pixels, SHOWN)
    panel = panels.mask_panel(rec)
    shown, original = by_token(panel.frames, rec), by_token(frames_of(pixels), rec)
    grey = (shown == round(panels.GREY * 255)).all(2)
    assert (~grey).sum(1).tolist() == [model.masking.num_visible] * 2
    assert torch.equal(shown[~grey], original[~grey])
    assert panel.label.notes == (f"{model.masking.num_visible} of 64 patches visible",)


def test_the_error_map_is_grey_where_visible_and_brighter_where_larger(model, pixels):
    rec = reconstruct(model, pixels, replace(SHOWN, error_top=2.0))
    assert torch.equal(rec.error.isnan(), rec.visible)
    tokens = by_token(panels.error_panel(rec).frames, rec).float()
    assert (tokens == tokens[:, :, :1]).all(2)[rec.visible].all(), "visible tokens are one grey"
    assert (tokens.view(2, 64, -1, 3).std(2) == 0).all(), "one colour a token"
    colour_map = panels.colormaps[panels.ERROR_COLOURS]
    expected = colour_map((rec.error / 2).numpy(), bytes=True)[..., :3]
    assert torch.equal(tokens[:, :, :3][~rec.visible], torch.from_numpy(expected)[~rec.visible].float())


def test_clips_share_the_scale_of_the_probabilities(pixels):
    rec = reconstruct(make_model(), pixels, SHOWN)
    log_probs = torch.full((2, 64), 1 / 64).log()
    log_probs[1, :2] = torch.tensor([0.5 / 64, 1.5 / 64]).log()
    panel = panels.probability_panel(rec._replace(log_probs=log_probs))
    brightness = by_token(panel.frames, rec).float().mean(2)
    assert brightness[1, 1] == brightness.max()
    assert (brightness[0] == brightness[1, 2]).all(), "the same P has the same colour in both clips"
    assert panel.label.scale[1:] == ("0", "1.5")


def test_an_unknown_way_to_show_visible_patches_is_refused():
    with pytest.raises(ValueError, match=r"--visible blank.*pasted or predicted"):
        PictureSettings(target=PIXELS, show_visible="blank")


# --- four masking rules -------------------------------------------------------------------------------------


def test_the_comparison_shows_what_each_rule_leaves_visible(model, pixels):
    shown = panels.mask_panels(model, pixels[:1], SHOWN, mask_ratio=0.8)
    assert len(shown) == 1 + 2 * 4
    original = frames_of(pixels[:1])
    for rule, panel in zip(panels.COMPARED, shown[1::2]):
        rec = reconstruct(model, pixels[:1], SHOWN)
        grey = (by_token(panel.frames, rec) == round(panels.GREY * 255)).all(2)
        count = visible_count(rule, 0.8, model.window)
        assert (~grey).sum() == count, rule
        assert f"{count} of 64 patches visible" in panel.label.notes
        slots = (~grey).view(4, 16)
        if rule == "tube":
            assert (slots == slots[0]).all()
        if rule == "frame":
            assert set(slots.sum(1).tolist()) == {0, 16}
    assert np.array_equal(shown[0].frames, original)


def test_the_comparison_without_a_sampler_says_so(pixels):
    shown = panels.mask_panels(make_model(mask_type="random"), pixels[:1], SHOWN)
    assert len(shown) == 1 + 2 * 3 + 1
    assert shown[-1].label == drawing.Label("adaptive", ("no sampler",))


def test_a_ratio_that_some_rule_cannot_do_is_refused(model, pixels):
    with pytest.raises(ValueError, match=r"--mask_ratio 0\.99"):
        panels.mask_panels(model, pixels, SHOWN, mask_ratio=0.99)


# --- beside a training loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_training_picture_leaves_no_trace(model, pixels, training):
    model.train(training)
    before = torch.get_rng_state()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    picture = panels.training_picture(model, pixels, replace(SHOWN, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.decoder.blocks._forward_hooks
    assert torch.is_grad_enabled()

    torch.rand(7)
    assert np.array_equal(picture, panels.training_picture(model, pixels, replace(SHOWN, seed=3))), (
        "only the seed decides"
    )
    assert not np.array_equal(picture, panels.training_picture(model, pixels, replace(SHOWN, seed=4)))


def test_a_training_picture_has_a_row_for_each_clip(model, pixels):
    one, two = (panels.training_picture(model, pixels[:n], SHOWN) for n in (1, 2))
    assert one.dtype == np.uint8
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] - one.shape[0] == 160 + drawing.GAP  # 32 pixels are enlarged five times


# --- the drawing --------------------------------------------------------------------------------------------


def test_a_grid_holds_its_cells_enlarged_by_a_whole_number():
    cells = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40, 3), dtype=np.uint8)
    picture = drawing.draw_grid(cells)
    for r, c in np.ndindex(2, 3):
        top, left = drawing.MARGIN + r * (160 + drawing.GAP), drawing.MARGIN + c * (160 + drawing.GAP)
        shown = picture[top : top + 160, left : left + 160]
        assert np.array_equal(shown, cells[r, c].repeat(4, 0).repeat(4, 1))


def test_large_frames_keep_their_size():
    picture = drawing.draw_grid(np.zeros((1, 1, 224, 224, 3), np.uint8))
    assert picture.shape == (224 + drawing.GAP + 2 * drawing.MARGIN,) * 2 + (3,)


def test_a_still_clip_still_animates():
    still = drawing.Panel(drawing.Label("video"), np.zeros((1, 4, 32, 32, 3), np.uint8))
    frames = drawing.animation([still])
    assert len(frames) == 4
    assert len({frame.tobytes() for frame in frames}) == 4, "a GIF drops frames that equal the one before"


# --- the program --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("run") / "checkpoint-0.pth"
    flags = {"normalize_target": False, "sampling_rate": 2}
    save_checkpoint(path, {"model": model.state_dict(), "model_settings": SETTINGS, "args": flags})
    return path


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--device", "cpu", *map(str, words)])
    visualize.main()


def number_of_frames(path) -> int:
    with Image.open(path) as picture:
        return picture.n_frames


def test_draws_a_gif_and_a_png_for_each_video(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    videos = [write_video(tmp_path / name, 30) for name in ("a/clip.mp4", "b/clip.mp4", "b/clip.avi")]
    output = tmp_path / "pictures"
    run(
        monkeypatch, "--model", checkpoint, *videos, "--output", output, "--compare_masks",
        *("--visible", "predicted", "--three_rows"),
    )  # fmt: skip
    names = {str(p.relative_to(output)) for p in output.rglob("*.*")}
    stems = ("a/clip", "b/clip.mp4", "b/clip.avi")
    assert names == {stem + end for stem in stems for end in (".gif", ".png", "_rows.png", "_masks.png")}
    for stem in stems:
        assert number_of_frames(output / f"{stem}.gif") == SETTINGS["num_frames"]
        assert number_of_frames(output / f"{stem}.png") == 1


@pytest.mark.parametrize(
    ("words", "videos", "ratio"),
    [
        (["--compare_masks", "a.mp4"], ["a.mp4"], 0.8),
        (["a.mp4", "b.mp4", "--compare_masks"], ["a.mp4", "b.mp4"], 0.8),
        (["--compare_masks", "a.mp4", "b.mp4"], ["a.mp4", "b.mp4"], 0.8),
        (["--compare_masks", "0.9", "a.mp4", "--three_rows", "b.mp4"], ["a.mp4", "b.mp4"], 0.9),
        (["a.mp4"], ["a.mp4"], None),
        (["--list", "val.csv", "--compare_masks"], [], 0.8),
    ],
)
def test_a_video_is_no_ratio(words, videos, ratio):
    for command in (["--model", "m", "--output", "o", *words], [*words, "--output", "o", "--model", "m"]):
        args = visualize.parse_args(command)
        assert (args.videos, args.compare_masks) == (videos, ratio)


def test_draws_the_videos_of_a_folder(tmp_path, checkpoint, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "x.mp4", 30)
    run(monkeypatch, "--model", checkpoint, "--output", tmp_path / "out", "--compare_masks", tmp_path / "in")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"x.gif", "x.png", "x_masks.png"}
    assert capsys.readouterr().out.startswith("1 video\n")


@pytest.mark.parametrize("words", [[], ["a.mp4", "--list", "val.csv"]])
def test_videos_come_from_one_source(tmp_path, checkpoint, monkeypatch, words):
    with pytest.raises(SystemExit, match="name the videos to draw, or their --list, and not both"):
        run(monkeypatch, "--model", checkpoint, "--output", tmp_path, *words)


def test_frames_are_chosen_as_in_training_unless_a_flag_says_otherwise(tmp_path, model):
    path = tmp_path / "m.pth"
    flags = {"sampling": "mae_st", "sampling_rate": 3}
    save_checkpoint(path, {"model": model.state_dict(), "model_settings": SETTINGS, "args": flags})

    def clips(*more):
        return visualize.load_model(visualize.parse_args(["--model", str(path), "--output", "o", "a.mp4", *more]))[2]

    assert clips() == flags
    assert clips("--sampling", "pretrain", "--sampling_rate", "2") == {"sampling": "pretrain", "sampling_rate": 2}


@pytest.mark.parametrize("kind", drawing.ANIMATIONS)
def test_an_animation_keeps_the_colours(tmp_path, model, pixels, kind):
    frames = drawing.animation(panels.five_panels(reconstruct(model, pixels, SHOWN)))
    drawing.save_animation(tmp_path / f"clip.{kind}", frames, fps=8)
    with Image.open(tmp_path / f"clip.{kind}") as moving:
        assert moving.n_frames == len(frames)
        assert moving.info["loop"] == 0
        for k, frame in enumerate(frames):
            moving.seek(k)
            assert moving.convert("RGB") and moving.info["duration"] == 120  # a WebP has its times with its pixels
            error = np.asarray(moving.convert("RGB")).astype(float) - frame
            assert np.sqrt((error**2).mean()) < 4


def test_draws_some_videos_of_a_list(tmp_path, checkpoint, monkeypatch):
    for k in range(5):
        write_video(tmp_path / f"{k}.mp4", 8)
    (tmp_path / "val.csv").write_text("".join(f"{k}.mp4 {k}\n" for k in range(5)))
    output, headings = tmp_path / "pictures", []
    drawn = visualize.filmstrip
    monkeypatch.setattr(
        visualize, "filmstrip", lambda *a, heading: headings.append(heading) or drawn(*a, heading=heading)
    )
    words = ["--model", checkpoint, "--list", tmp_path / "val.csv", "--num_clips", 3, "--output", output]
    run(monkeypatch, *words)
    assert sorted(p.name for p in output.glob("*.gif")) == ["0.gif", "2.gif", "4.gif"]
    assert headings == ["0", "2", "4"]
    (tmp_path / "labels.txt").write_text("up\ndown\nleft\nright\nrotate_cw\n")
    run(monkeypatch, *words, "--labels", tmp_path / "labels.txt")
    assert headings[3:] == ["0: up", "2: left", "4: rotate_cw"]


def test_the_clip_is_the_middle_of_the_video(tmp_path):
    path = write_video(tmp_path / "numbers.mp4", 40, size=(64, 64))
    clip = visualize.load_clip(str(path), make_model(input_size=64), sampling_rate=2, decoder="auto")
    assert clip.shape == (1, 3, 8, 64, 64)
    frames = (clip[0] * 255).round().byte().transpose(0, 1)
    assert read_numbers(frames) == list(range(12, 28, 2))


def test_the_clip_is_the_middle_of_the_frame(tmp_path):
    path = write_video(tmp_path / "wide.mp4", 20, size=(32, 64))
    clip = visualize.load_clip(str(path), make_model(), sampling_rate=1, decoder="auto")
    with open_video(path) as video:
        frames = video.get_frames(range(6, 14))[..., 16:48]  # (8,3,32,32)
    assert torch.equal(clip[0], to_pixels(frames).transpose(0, 1))


def read_training(path):
    found = load_weights(path)
    settings, clips = visualize.read_training(pretrain_settings(found), found.flags, patch=8)
    return settings.target.normalize, clips["sampling_rate"]


def test_reads_how_the_model_was_trained(tmp_path, checkpoint):
    assert read_training(checkpoint) == (False, 2)
    published, weights = tmp_path / "published.pth", make_model().state_dict()
    save_checkpoint(published, {"model": weights, "args": argparse.Namespace(normlize_target=False)})
    assert read_training(published) == (False, 4)
    save_checkpoint(published, {"model": weights})
    assert read_training(published) == (True, 4)


def test_a_broken_video_is_reported_and_the_others_are_drawn(tmp_path, checkpoint, monkeypatch, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    good = write_video(tmp_path / "good.mp4", 30)
    output = tmp_path / "pictures"
    videos = [tmp_path / "broken.mp4", tmp_path / "missing.mp4", good]
    with pytest.raises(SystemExit, match="2 of the videos could not be read"):
        run(monkeypatch, "--model", checkpoint, *videos, "--output", output)
    errors = capsys.readouterr().err
    assert re.search(r"broken\.mp4: .+", errors)
    assert re.search(r"missing\.mp4: .+", errors)
    assert {p.name for p in output.iterdir()} == {"good.gif", "good.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere.pth"], r"nowhere\.pth: no such checkpoint"),
        (["--mask_ratio", "1.5"], r"--mask_ratio 1\.5"),
        (["--compare_masks", "0.99"], r"--mask_ratio 0\.99"),
        (["--fps", "0"], "--fps 0"),
        (["--labels", "labels.txt"], "--labels names the classes of a --list"),
        (["--error_top", "-1"], "--error_top -1"),
        (["--sampling_rate", "0"], "--sampling_rate 0"),
        (["--num_clips", "0"], "--num_clips 0"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path, checkpoint, monkeypatch, flags, message):
    words = ["--model", checkpoint, "a.mp4", "--output", tmp_path, *flags]
    with pytest.raises(SystemExit, match=message) as caught:
        run(monkeypatch, *words)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_text("not a checkpoint")
    with pytest.raises(SystemExit, match=r"weights\.pth: not a readable checkpoint"):
        run(monkeypatch, "--model", path, "a.mp4", "--output", tmp_path)
    save_checkpoint(path, {"model": {"head.weight": torch.zeros(1)}})
    with pytest.raises(SystemExit, match=r"weights\.pth: not a pre-training checkpoint"):
        run(monkeypatch, "--model", path, "a.mp4", "--output", tmp_path)
