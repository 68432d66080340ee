import json
from collections import Counter

import golden
import numpy as np
import pytest
import torch
from golden import needs_golden
from PIL import Image

import augment
from clips import transforms
from clips.transforms import View

SPATIAL = golden.table("spatial_view_tables")
MULTI_SCALE = SPATIAL.get("multi_scale_crop", [])


def random_clip(frames=4, height=36, width=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=g)


def levels_apart(a, b):
    """How far normalised pixels (C,T,H,W) are apart, in grey levels."""
    return (a - b).abs() * 255 * torch.tensor(augment.IMAGENET_STD).view(3, 1, 1, 1)


def inside(view, width, height):
    return 0 <= view.left <= width - view.width and 0 <= view.top <= height - view.height


# --- multi-scale crop ---------------------------------------------------------------------------------------


def row_name(row):
    return "{}x{}-to-{}".format(*row["image_wh"], row["out"])


@needs_golden
@pytest.mark.parametrize("row", MULTI_SCALE, ids=row_name)
def test_multi_scale_sizes_and_offsets_are_the_published_ones(row):
    width, height = row["image_wh"]
    sizes = transforms.multi_scale_sizes(width, height, row["out"])
    assert [list(s) for s in sizes] == row["candidate_crops_wh"]
    for w, h in sizes:
        offsets = transforms.multi_scale_offsets(width, height, w, h)
        assert json.loads(json.dumps(offsets)) == row["offsets_xy"][f"{w}x{h}"]


def test_multi_scale_draws_every_size_and_place_equally_often_and_never_flips():
    sizes = transforms.multi_scale_sizes(400, 300, 112)
    places = [(x, y, w, h) for w, h in sizes for x, y in transforms.multi_scale_offsets(400, 300, w, h)]
    assert len(places) == 10 * 13
    expected = Counter(places)  # a crop as high as the frame has several places in common
    transform = transforms.MultiScaleCrop(size=112)
    rng = np.random.default_rng(0)
    views = [transform.draw(400, 300, rng) for _ in range(26_000)]
    drawn = Counter(v[:4] for v in views)
    assert drawn.keys() == expected.keys()
    assert all(abs(drawn[p] - 200 * n) < 5 * (200 * n) ** 0.5 for p, n in expected.items())
    assert not any(v.flip for v in views)


@pytest.mark.parametrize("width, height, size", [(300, 223, 224), (222, 222, 224), (1, 1, 224), (5, 3, 64)])
def test_multi_scale_crop_never_leaves_the_frame(width, height, size):
    transform = transforms.MultiScaleCrop(size=size)
    rng = np.random.default_rng(1)
    assert all(inside(transform.draw(width, height, rng), width, height) for _ in range(200))
    assert transform(random_clip(2, height, width), rng).shape == (2, 3, size, size)


def test_a_size_near_the_output_is_cut_at_the_output_size():
    assert {s for s in transforms.multi_scale_sizes(226, 226, 224) if max(s) > 200} >= {(224, 224)}
    assert transforms.multi_scale_sizes(227, 227, 224)[0] == (227, 227)


# --- crop, resize, flip -------------------------------------------------------------------------------------


@needs_golden
def test_crop_and_resize_give_the_published_pixels():
    data = golden.tensors("transforms")
    clip = data["in.frames_uint8_THWC"].permute(0, 3, 1, 2)
    view = View(left=5, top=4, width=27, height=31)
    clip = transforms.apply_view(clip, view, 24).transpose(0, 1)  # C T H W
    got = augment.normalize(augment.to_pixels(clip[None]))[0]
    assert levels_apart(got, data["out.pretrain_crop_w27_h31_x5_y4_to_24_CTHW"]).max() < 1.001


@pytest.mark.parametrize("view", [View(0, 0, 48, 36), View(3, 2, 40, 30, flip=True), View(9, 9, 12, 10)])
def test_apply_view_is_pil_crop_resize_and_mirror(view):
    clip = random_clip()
    got = transforms.apply_view(clip, view, 20)
    assert got.dtype == torch.uint8 and got.shape == (4, 3, 20, 20)
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    for frame, ours in zip(clip, got):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy()).crop(box)
        image = image.resize((20, 20), Image.Resampling.BILINEAR)
        if view.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (ours.int() - expected.int()).abs().max() <= 1


def test_a_crop_of_the_output_size_is_not_resampled():
    clip = random_clip()
    assert torch.equal(transforms.apply_view(clip, View(7, 5, 24, 24), 24), clip[:, :, 5:29, 7:31])


@pytest.mark.parametrize("crop", ["multi_scale", "random_resized"])
def test_one_view_for_all_frames_of_a_clip(crop):
    transform = transforms.CROPS[crop](size=16, flip=0.5)
    rng = np.random.default_rng(2)
    still = random_clip(1).expand(5, -1, -1, -1)
    moved = []
    for _ in range(8):
        out = transform(still, rng)
        assert out.dtype == torch.uint8
        assert torch.equal(out, out[:1].expand_as(out))
        moved.append(out[0])
    assert len({m.numpy().tobytes() for m in moved}) > 4  # but another one for the next clip


@needs_golden
def test_fine_tuning_crop_is_the_published_one_to_half_a_level():
    data = golden.tensors("transforms")
    clip = data["in.frames_uint8_THWC"].permute(0, 3, 1, 2)
    clip = transforms.apply_view(clip, View(left=7, top=3, width=31, height=20), 24, antialias=False)
    got = augment.normalize(augment.to_pixels(clip.transpose(0, 1)[None]))[0]
    assert levels_apart(got, data["out.finetune_rrc_i3_j7_h20_w31_to_24_CTHW"]).max() < 0.5001


def test_resize_without_antialias_is_the_exact_value_rounded():
    clip = random_clip(3, 50, 70)
    exact = torch.nn.functional.interpolate(clip.double(), size=(33, 90), mode="bilinear")
    got = transforms.resize(clip, 33, 90, antialias=False)
    assert got.dtype == torch.uint8 and (got - exact).abs().max() < 0.5001
    sharp = transforms.resize(random_clip(2) // 255 * 255, 60, 60, interpolation="bicubic", antialias=False)
    assert sharp.max() == 255 and sharp.min() == 0  # overshoots are clipped, not wrapped around


# --- random resized crop ------------------------------------------------------------------------------------


def test_random_resized_views_keep_their_ranges():
    transform = transforms.RandomResizedCrop(size=32, scale=(0.3, 0.6), ratio=(0.8, 1.25), flip=0.5)
    rng = np.random.default_rng(3)
    views = [transform.draw(320, 240, rng) for _ in range(2000)]
    assert all(inside(v, 320, 240) for v in views)
    area = np.array([v.width * v.height / (320 * 240) for v in views])
    aspect = np.array([v.width / v.height for v in views])
    # rounding the sides moves area and aspect by about a percent
    assert 0.297 < area.min() < 0.31 and 0.59 < area.max() < 0.606
    assert 0.79 < aspect.min() < 0.81 and 1.23 < aspect.max() < 1.27
    assert abs(area.mean() - 0.45) < 0.01
    assert abs(np.log(aspect).mean()) < 0.01
    assert abs(np.mean([v.flip for v in views]) - 0.5) < 0.05


@pytest.mark.parametrize(
    "width, height, box", [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (1, 1, (0, 0, 1, 1))]
)
def test_random_resized_falls_back_to_the_centre_of_a_very_long_frame(width, height, box):
    transform = transforms.RandomResizedCrop(size=32)
    assert transform.draw(width, height, np.random.default_rng(4))[:4] == box


def test_the_generator_alone_decides():
    for crop in ("multi_scale", "random_resized"):
        transform = transforms.build_pretrain_transform(crop, size=16)
        first, second = (transform.draw(320, 240, np.random.default_rng(5)) for _ in range(2))
        assert first == second


# --- crops of validation and test ---------------------------------------------------------------------------


def view_name(row):
    return "{}x{}-short-{}-crops-{}".format(*row["video_hw"], row["short_side"], row["num_crops"])


@needs_golden
@pytest.mark.parametrize("row", SPATIAL.get("test_spatial_views", []), ids=view_name)
def test_crops_of_a_test_are_the_published_ones(row):
    size = row["short_side"]
    crops = transforms.EvenCrops(short_side=size, size=size, num_crops=row["num_crops"])
    shape = transforms.resized_shape(*row["video_hw"], crops.short_side)
    assert list(shape) == row["resized_hw"]
    on_height = row["cropped_axis"] == "height"
    assert crops.corners(*shape) == [(s, 0) if on_height else (0, s) for s in row["starts"]]
    centre = transforms.EvenCrops(short_side=size, size=size)
    assert [list(c) for c in centre.corners(*shape)] == [row["val_center_crop_top_left"]]


@needs_golden
@pytest.mark.parametrize("row", SPATIAL.get("mae_st_uniform_crop", []), ids=lambda row: str(row["hw"]))
def test_crops_of_a_test_of_mae_st(row):
    size = row["size"]
    crops = transforms.EvenCrops(short_side=min(row["hw"]), size=size, num_crops=3, round_up=True)
    assert [list(c) for c in crops.corners(*row["hw"])] == row["top_left"]


@needs_golden
def test_validation_pixels_are_the_published_ones_to_a_level():
    data = golden.tensors("transforms")
    clip = data["in.frames_uint8_THWC"].permute(0, 3, 1, 2)
    (clip,) = transforms.EvenCrops(short_side=24, size=24)(clip)
    got = augment.normalize(augment.to_pixels(clip.transpose(0, 1)[None]))[0]
    apart = levels_apart(got, data["out.val_resize24_center24_CTHW"])
    # OpenCV computes with 11 bits of fraction: here and there it rounds to the neighbouring level
    assert apart.max() < 1.001 and (apart > 0.001).float().mean() < 0.1


@pytest.mark.parametrize("height, width", [(36, 48), (48, 36), (40, 40), (10, 90)])
@pytest.mark.parametrize("num_crops", [1, 2, 3, 5])
def test_crops_are_cut_evenly_from_one_end_to_the_other(height, width, num_crops):
    crops = transforms.EvenCrops(short_side=24, size=20, num_crops=num_crops)
    clip = random_clip(3, height, width)
    got = crops(clip)
    assert got.shape == (num_crops, 3, 3, 20, 20) and got.dtype == torch.uint8
    whole = transforms.resize(clip, *transforms.resized_shape(height, width, crops.short_side), antialias=False)
    assert min(whole.shape[-2:]) == 24
    corners = crops.corners(*whole.shape[-2:])
    assert all(torch.equal(g, whole[..., y : y + 20, x : x + 20]) for g, (y, x) in zip(got, corners))
    along, across = (0, 1) if height >= width else (1, 0)
    assert {c[across] for c in corners} == {2}  # the middle of the short side
    room = max(whole.shape[-2:]) - 20
    ends = [0, room] if num_crops > 1 else [room // 2] * 2
    places = [c[along] for c in corners]
    assert [places[0], places[-1]] == ends
    assert max(np.diff(places), default=0) - min(np.diff(places), default=0) <= 1


def test_a_short_side_below_the_size_of_the_crops_is_an_error():
    with pytest.raises(ValueError, match=r"--short_side_size 192.*--input_size 224"):
        transforms.EvenCrops(short_side=192, size=224)


# --- building by name ---------------------------------------------------------------------------------------


def test_builder_knows_each_crop_and_its_published_flip():
    assert transforms.build_pretrain_transform("multi_scale", size=8).flip == 0
    assert transforms.build_pretrain_transform("random_resized", size=8).flip == 0.5
    assert transforms.MultiScaleCrop(size=8, flip=0.25).flip == 0.25
    transform = transforms.RandomResizedCrop(size=8, scale=(0.1, 0.2), ratio=(1, 1))
    assert (transform.scale, transform.ratio) == ((0.1, 0.2), (1, 1))


def test_interpolation_changes_the_pixels_of_a_resize():
    pixels = []
    for interpolation in ("bilinear", "bicubic"):
        transform = transforms.build_pretrain_transform("multi_scale", size=20, interpolation=interpolation)
        pixels.append(transform(random_clip(), np.random.default_rng(6)))
    assert pixels[0].shape == pixels[1].shape and not torch.equal(*pixels)


def test_colour_jitter_is_drawn_once_per_clip_after_the_same_view():
    plain = transforms.build_pretrain_transform("multi_scale", size=20)
    jittered = transforms.build_pretrain_transform("multi_scale", size=20, color_jitter=0.4)
    still = random_clip(1).expand(3, -1, -1, -1)
    before, after = (t(still, np.random.default_rng(7)) for t in (plain, jittered))
    assert after.dtype == torch.uint8 and after.shape == before.shape
    assert not torch.equal(after, before)
    assert torch.equal(after, after[:1].expand_as(after))
    # the same picture in other colours
    light = [x.float().mean(1).flatten() for x in (before, after)]
    assert torch.corrcoef(torch.stack(light))[0, 1] > 0.95


def test_colour_jitter_factors_keep_their_range():
    rng = np.random.default_rng(8)
    factors = np.array([transforms.ColorJitter(strength=0.4).draw(rng) for _ in range(2000)])
    assert factors.shape == (2000, 3)
    assert 0.6 <= factors.min() < 0.602 and 1.398 < factors.max() <= 1.4
    assert np.array([transforms.ColorJitter(strength=3.0).draw(rng) for _ in range(50)]).min() >= 0


def test_an_unknown_crop_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"--crop corner.*multi_scale.*random_resized"):
        transforms.build_pretrain_transform("corner", size=8)


# --- on the device ------------------------------------------------------------------------------------------


def test_to_pixels_and_normalize():
    clips = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1).expand(2, 3, 4, 5, 6)
    pixels = augment.to_pixels(clips)
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 4, 5, 6)
    assert torch.equal(pixels[0, :, 0, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    got = augment.normalize(pixels, mean=(0.5, 0.2, 0.0), std=(0.5, 1.0, 2.0))
    assert got.shape == pixels.shape
    torch.testing.assert_close(got[1, :, 3, 4, 5], torch.tensor([-1.0, 0.0, 0.5]))


def test_normalize_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match=r"1 channels.*3 means"):
        augment.normalize(torch.zeros(2, 1, 4, 5, 6))


def test_the_crop_of_mae_st_is_taken_from_frames_of_256_pixels_without_antialias():
    clip = torch.randint(0, 256, (2, 3, 120, 160), dtype=torch.uint8)
    crop = transforms.MaeStCrop(size=64, flip=0.0)
    whole = transforms.resize(clip, 256, 341, antialias=False)
    view = crop.draw(341, 256, np.random.default_rng(3))
    assert 0.45 < view.width * view.height / (256 * 341) <= 1
    naive = torch.nn.functional.interpolate(
        whole[..., view.top : view.top + view.height, view.left : view.left + view.width].float(),
        size=(64, 64),
        mode="bilinear",
        align_corners=False,
    )
    assert torch.equal(crop(clip, np.random.default_rng(3)), naive.round().clamp(0, 255).byte())


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40), (48, 48)])
def test_the_centre_crop_is_the_largest_central_square(height, width):
    clip = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = transforms.build_pretrain_transform("center", size=side)
    assert torch.equal(crop(clip, np.random.default_rng(0)), clip[..., top : top + side, left : left + side])


def test_scale_and_flip_of_pretraining_crops_can_be_set():
    crop = transforms.build_pretrain_transform("mae_st", size=32, scale=(0.9, 1.0), flip=1.0)
    views = [crop.draw(300, 256, np.random.default_rng(seed)) for seed in range(20)]
    assert all(view.flip and view.width * view.height > 0.85 * 300 * 256 for view in views)
    for name, scale in (("multi_scale", (0.5, 1)), ("random_resized", (1, 0.5)), ("mae_st", (0, 1))):
        with pytest.raises(ValueError, match="--crop_scale"):
            transforms.build_pretrain_transform(name, size=32, scale=scale)
