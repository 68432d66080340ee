import random

import golden
import numpy as np
import pytest
import torch
from golden import needs_golden
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch.nn.functional import cross_entropy

from augment import ClipErasing, ClipMixup
from clips.draws import draw_seed, global_draws
from clips.finetune_transforms import RandAugment, build_finetune_transform
from clips.transforms import RandomResizedCrop

POLICY = "rand-m7-n4-mstd0.5-inc1"
LEVELS = golden.table("randaugment_levels")


def random_clip(frames=3, height=36, width=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=g)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- RandAugment --------------------------------------------------------------------------------------------


@needs_golden
def test_rand_augment_draws_from_the_published_operations_and_levels(monkeypatch):
    ops = RandAugment(policy=POLICY).transform.ops
    assert [op.name for op in ops] == LEVELS["ops_in_order"]
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in ops} == {(0.5, 7, 0.5)}
    for level, arguments in LEVELS["args_by_level"].items():
        for op in ops:
            for sign, expected in zip((0.0, 1.0), arguments[op.name]):
                monkeypatch.setattr(random, "random", lambda sign=sign: sign)
                assert list(op.level_fn(float(level), op.hparams)) == pytest.approx(expected)


@needs_golden
@pytest.mark.parametrize(
    "name, argument, case",
    [
        ("ShearX", 0.21, "shear_x_0.21"),
        ("Rotate", 21, "rotate_21"),
        ("TranslateXRel", 0.315, "translate_x_rel_0.315"),
        ("SolarizeIncreasing", 77, "solarize_77"),
        ("PosterizeIncreasing", 2, "posterize_2"),
        ("SolarizeAdd", 77, "solarize_add_77"),
        ("ColorIncreasing", 1.63, "color_1.63"),
    ],
)
def test_rand_augment_operations_give_the_published_pixels(name, argument, case):
    data = golden.tensors("transforms")
    (op,) = [op for op in RandAugment(policy=POLICY).transform.ops if op.name == name]
    picture = Image.fromarray(data["in.frames_uint8_THWC"][0].numpy())
    got = np.array(op.aug_fn(picture, argument, **op.kwargs))
    assert np.array_equal(got, data[f"out.op_{case}"].numpy())


def test_rand_augment_treats_all_frames_of_a_clip_alike_and_every_clip_differently():
    augment = RandAugment(policy=POLICY)
    still = random_clip(1).expand(4, -1, -1, -1)
    pictures = set()
    for seed in range(12):
        out = augment(still, rng(seed))
        assert out.dtype == torch.uint8 and out.shape == still.shape
        assert torch.equal(out, out[:1].expand_as(out))
        assert torch.equal(out, augment(still, rng(seed)))
        pictures.add(out[0].numpy().tobytes())
    assert len(pictures) > 8


def test_rand_augment_is_timm_on_each_frame():
    clip, seed = random_clip(), draw_seed(rng(5))
    settings = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BILINEAR}
    transform = rand_augment_transform(POLICY, settings)
    got = RandAugment(policy=POLICY, interpolation="bilinear")(clip, rng(5))
    for frame, ours in zip(clip, got):
        random.seed(seed)
        np.random.seed(seed)
        expected = np.array(transform(Image.fromarray(frame.permute(1, 2, 0).numpy())))
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), expected)


def test_the_global_random_states_are_left_as_they_were():
    def states():
        return random.getstate(), [np.array(part).tolist() for part in np.random.get_state()]

    before = states()
    RandAugment(policy=POLICY)(random_clip(), rng())
    ClipErasing(prob=1.0)(torch.zeros(2, 3, 4, 16, 16), rng())
    ClipMixup(num_classes=3)(torch.zeros(2, 3, 4, 16, 16), torch.tensor([0, 1]), rng())
    with pytest.raises(KeyError), global_draws(3):
        random.random()
        raise KeyError
    assert states() == before


@pytest.mark.parametrize("policy", ["original", "rand-x3", "rand-mfew", "rand-m7.5"])
def test_a_policy_that_timm_cannot_read_is_named(policy):
    with pytest.raises(ValueError, match=rf"--aa {policy}.*rand-m7"):
        build_finetune_transform(size=16, flip=True, aa=policy)


# --- the training transform ---------------------------------------------------------------------------------


def test_the_training_transform_is_rand_augment_then_the_crop():
    transform = build_finetune_transform(size=16, flip=True)
    first, crop = transform.transforms
    assert isinstance(first, RandAugment) and type(crop) is RandomResizedCrop
    assert (crop.scale, crop.ratio, crop.flip, crop.antialias) == ((0.08, 1.0), (0.75, 1.3333), 0.5, False)
    out = transform(random_clip(1).expand(4, -1, -1, -1), rng())
    assert out.shape == (4, 3, 16, 16) and out.dtype == torch.uint8
    assert torch.equal(out, out[:1].expand_as(out))


def test_clips_are_mirrored_half_the_time_or_never():
    for flip, expected in ((True, 0.5), (False, 0.0)):
        (crop,) = build_finetune_transform(size=16, flip=flip, aa="none", color_jitter=0).transforms
        generator = rng()
        share = np.mean([crop.draw(48, 36, generator).flip for _ in range(1000)])
        assert abs(share - expected) < 0.05 * (expected > 0) + 1e-9


def test_colours_are_jittered_only_without_rand_augment():
    jittered = build_finetune_transform(size=16, flip=True, aa="none", color_jitter=0.3)
    assert jittered.transforms[1].strength == 0.3
    (plain,) = build_finetune_transform(size=16, flip=True, aa="", color_jitter=0).transforms
    assert type(plain) is RandomResizedCrop


@pytest.mark.parametrize(("shape", "expected"), [((36, 48), (24, 32)), ((50, 36), (33, 24)), ((20, 20), (24, 24))])
def test_frames_may_get_a_short_side_before_everything_else(shape, expected):
    transform = build_finetune_transform(size=16, flip=True, short_side=24)
    resize, *others = transform.transforms
    assert [type(other) for other in others] == [RandAugment, RandomResizedCrop]
    clip = resize(random_clip(2, *shape), rng())
    assert clip.shape == (2, 3, *expected) and clip.dtype == torch.uint8
    assert torch.equal(resize(clip, rng()), clip)
    assert transform(random_clip(2, *shape), rng()).shape == (2, 3, 16, 16)


# --- erasing ------------------------------------------------------------------------------------------------


def erased_box(changed):
    """(top, left, height, width) of a boolean frame (H,W) that is True in one rectangle; None if nowhere."""
    if not changed.any():
        return None
    rows, columns = (changed.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    box = rows[0], columns[0], len(rows), len(columns)
    assert changed.sum() == box[2] * box[3]
    return box


def erase(clips, seed=0, **settings):
    torch.manual_seed(seed)
    return ClipErasing(**settings)(clips.clone(), rng(seed))


def test_erasing_puts_fresh_noise_into_one_box_through_time():
    clips = torch.full((400, 3, 4, 24, 32), 9.0)
    out = erase(clips)
    boxes = []
    for before, after in zip(clips, out):
        changed = before != after  # C T H W
        assert torch.equal(changed, changed[:1, :1].expand_as(changed))
        box = erased_box(changed[0, 0])
        if box is not None:
            boxes.append(box)
            noise = after[:, :, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
            assert len(noise.unique()) > 0.99 * noise.numel()  # no frame, channel or pixel like another
    assert abs(len(boxes) / 400 - 0.25) < 0.07
    area = np.array([h * w / (24 * 32) for _, _, h, w in boxes])
    aspect = np.array([h / w for _, _, h, w in boxes])
    assert 0.01 < area.min() < 0.06 and 0.27 < area.max() < 0.36
    assert 0.2 < aspect.min() < 0.5 and 2 < aspect.max() < 4.5  # rounding to whole pixels moves both
    assert all(h < 24 and w < 32 for _, _, h, w in boxes)
    noise = out[out != 9.0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_erasing_is_decided_by_its_generators():
    clips = torch.full((8, 3, 4, 24, 32), 9.0)
    first, again, other = (erase(clips, seed, prob=1.0) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(erase(clips, prob=0.0), clips)


def test_erasing_fills_as_its_mode_says():
    clips = torch.full((4, 3, 5, 24, 32), 9.0)
    const = erase(clips, prob=1.0, mode="const")
    assert set(const.unique().tolist()) == {0.0, 9.0}
    colours = erase(clips, prob=1.0, mode="rand")
    assert all(len(frame.unique()) == 2 for frame in colours.flatten(0, 2))
    with pytest.raises(ValueError, match=r"--remode noise.*pixel"):
        ClipErasing(mode="noise")


def test_several_boxes_leave_the_first_frames_clean():
    clips = torch.full((30, 3, 6, 24, 32), 9.0)
    changed = erase(clips, prob=1.0, count=3) != 9.0
    assert not changed[:, :, :2].any() and changed[:, :, 2:].any()
    assert torch.equal(changed[:, :, 2:], changed[:, :1, 2:3].expand(-1, 3, 4, -1, -1))
    assert changed[:, 0, 2].float().mean((1, 2)).max() < 0.36


# --- Mixup and CutMix ---------------------------------------------------------------------------------------


def coloured(batch=6, frames=4, height=20, width=30):
    """Clips of one colour each, (B,C,T,H,W): clip i is i everywhere; and labels i."""
    values = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    return values.expand(-1, 3, frames, height, width).clone(), torch.arange(batch)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.3, 0.8)])
def test_cutmix_touches_only_its_box_on_every_frame_and_its_area_is_the_weight(mode, minmax):
    mix = ClipMixup(num_classes=6, mixup=0.0, cutmix=1.0, cutmix_minmax=minmax, mode=mode, smoothing=0.0)
    areas = []
    for seed in range(30):
        clips, labels = coloured()
        mixed, targets = mix(clips.clone(), labels, rng(seed))
        assert mixed.shape == clips.shape and targets.shape == (6, 6)
        for i in range(6):
            changed = mixed[i] != clips[i]  # C T H W
            assert torch.equal(changed, changed[:1, :1].expand_as(changed))
            box = erased_box(changed[0, 0])
            assert set(mixed[i].unique().tolist()) <= {i, 5 - i}
            area = 0.0 if box is None else box[2] * box[3] / (20 * 30)
            expected = torch.zeros(6)
            expected[i] += 1 - area
            expected[5 - i] += area
            torch.testing.assert_close(targets[i], expected)
            areas.append(area)
    if minmax is None:
        assert min(areas) < 0.2 and max(areas) > 0.6
    else:
        assert 0.09 <= min(areas) < max(areas) <= 0.64


def test_mixup_mixes_with_the_reversed_batch_in_the_weight_of_the_labels():
    mix = ClipMixup(num_classes=6, mixup=0.8, cutmix=0.0, smoothing=0.0)
    clips, labels = coloured()
    mixed, targets = mix(clips.clone(), labels, rng(1))
    weight = targets[0, 0].item()
    assert 0 < weight < 1
    torch.testing.assert_close(mixed, weight * clips + (1 - weight) * clips.flip(0))
    eye = torch.eye(6)
    torch.testing.assert_close(targets, weight * eye + (1 - weight) * eye.flip(0))


@needs_golden
def test_soft_targets_are_the_published_ones_also_of_an_odd_batch(monkeypatch):
    data = golden.tensors("finetune")
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.3)
    mix = ClipMixup(num_classes=7, mixup=0.8, cutmix=0.0, smoothing=0.1)
    clips, labels = data["in.clip"], data["in.label"]
    assert len(clips) % 2 == 1
    mixed, targets = mix(clips.clone(), labels, rng())
    torch.testing.assert_close(targets, data["out.mixup_soft_target_lam0.3_smooth0.1"])
    torch.testing.assert_close(mixed, 0.3 * clips + 0.7 * clips.flip(0))
    torch.testing.assert_close(cross_entropy(data["out.logits"], targets), data["out.soft_ce_loss"])


@needs_golden
def test_without_mixing_the_targets_are_those_of_label_smoothing():
    data = golden.tensors("finetune")
    clips, labels, logits = data["in.clip"], data["in.label"], data["out.logits"]
    for smoothing, loss in ((0.1, "out.label_smoothing_ce_0.1"), (0.0, "out.ce_loss")):
        mix = ClipMixup(num_classes=7, mixup=0.0, cutmix=0.0, smoothing=smoothing)
        same, targets = mix(clips.clone(), labels, rng())
        assert torch.equal(same, clips)
        torch.testing.assert_close(cross_entropy(logits, targets), data[loss])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_middle_clip_of_an_odd_batch_is_mixed_with_itself(mode, batch):
    mix = ClipMixup(num_classes=batch, mode=mode, smoothing=0.0)
    for seed in range(10):
        clips, labels = coloured(batch)
        mixed, targets = mix(clips.clone(), labels, rng(seed))
        assert mixed.shape == clips.shape and targets.shape == (batch, batch)
        middle = batch // 2
        torch.testing.assert_close(mixed[middle], clips[middle])
        torch.testing.assert_close(targets[middle], torch.eye(batch)[middle])
        torch.testing.assert_close(targets.sum(1), torch.ones(batch))


def test_mixing_is_decided_by_its_generator_and_switches_between_both():
    mix = ClipMixup(num_classes=6)
    clips, labels = coloured()
    results = [mix(clips.clone(), labels, rng(seed))[0] for seed in range(20)]
    assert torch.equal(results[3], mix(clips.clone(), labels, rng(3))[0])
    cut = [set(r.unique().tolist()) <= set(range(6)) for r in results]
    assert 4 <= sum(cut) <= 16
    assert len({r.numpy().tobytes() for r in results}) == 20


def test_an_unknown_mode_of_mixing_is_named():
    with pytest.raises(ValueError, match=r"--mixup_mode half.*batch"):
        ClipMixup(num_classes=3, mode="half")
