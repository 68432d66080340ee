"""Frame-index rules: equal to the published code where it is sound, and sensible where it is not."""

import numpy as np
import pytest
from golden import needs_golden, table

from clips import frame_indices

TABLES = table("frame_index_tables")


def rows(name, **only):
    """Parametrises over the rows of one table that have the values of `only`, each named by its numbers."""
    found = [row for row in TABLES.get(name, []) if only.items() <= row.items()]
    names = ["-".join(str(v) for v in row.values() if isinstance(v, int | float)) for row in found]
    return pytest.mark.parametrize("row", found, ids=names)


def numbers(row, *keys):
    return [row[key] for key in keys]


class Recorder:
    """Stands in for a numpy Generator: notes the range it is asked for and returns one end of it."""

    def __init__(self, end: str):
        self.end = end

    def integers(self, low, high, endpoint=False):
        assert endpoint
        self.range = [low, high]
        return low if self.end == "low" else high

    def uniform(self, low, high):
        self.range = [low, high]
        return low if self.end == "low" else high


# --- equal to the published code ----------------------------------------------------------------------------


@needs_golden
@rows("pretrain_clip")
def test_pretraining_clip(row):
    size = numbers(row, "num_frames", "clip_len", "stride")
    starts = row.get("indices_for_start", {"0": row.get("indices")})
    for start, expected in starts.items():
        assert frame_indices.pretrain_indices(int(start), *size).tolist() == expected
    rng = Recorder("high")
    clip = frame_indices.pretrain_clip(*size, rng)
    assert rng.range == row.get("start_range", [0, 0])
    assert clip.tolist() == list(starts.values())[-1]


@needs_golden
@rows("k400_train_and_val_clip")
def test_dense_clip(row):
    size = numbers(row, "num_frames", "clip_len", "sampling_rate")
    window, rng = size[1] * size[2], Recorder("high")
    clip = frame_indices.dense_clip(*size, rng)
    if not row["random"]:
        assert clip.tolist() == row["indices"] and rng.range == [0, 0]
        return
    assert rng.range == [row["end_low"] - window, row["end_high_exclusive"] - 1 - window]
    for end, expected in row["indices_for_end"].items():
        assert frame_indices.dense_indices(int(end) - window, *size).tolist() == expected


@needs_golden
@rows("k400_test_views")
def test_dense_views(row):
    views = frame_indices.dense_views(*numbers(row, "num_frames", "clip_len", "sampling_rate", "test_num_segment"))
    assert views.tolist() == row["views"]


@needs_golden
@rows("ssv2_train_and_val_ranges")
def test_segment_clip(row):
    size = numbers(row, "num_frames", "num_segments")
    for end in ("low", "high"):
        clip = frame_indices.segment_clip(*size, Recorder(end), still_if_short=True)
        assert clip.tolist() == row["min" if end == "low" else "max"]


@needs_golden
@rows("ssv2_test_views", test_num_segment=2)  # the number of views that the published rule is made for
def test_segment_views(row):
    size = numbers(row, "num_frames", "num_segments", "test_num_segment")
    assert frame_indices.segment_views(*size).tolist() == row["views"]


@needs_golden
@rows("mae_st_temporal")
def test_mae_st(row):
    size = numbers(row, "video_frames", "num_frames", "sampling_rate", "fps")
    span = frame_indices.mae_st_span(*size[1:])
    assert span == row["clip_span"]
    assert frame_indices.mae_st_views(*size).tolist() == row["test_views_10"]
    assert frame_indices.mae_st_indices(0, *size[:2], span).tolist() == row["indices_if_start_0"]
    rng = Recorder("low")
    assert frame_indices.mae_st_clip(*size, rng).tolist() == row["indices_if_start_0"]
    assert rng.range == row["start_range_random"]
    centre = frame_indices.mae_st_indices(row["single_centre_start"], *size[:2], span)
    assert frame_indices.mae_st_clip(*size).tolist() == centre.tolist()


# --- true of every rule -------------------------------------------------------------------------------------

RULES = {
    "pretrain": lambda frames, rng: frame_indices.pretrain_clip(frames, 16, 4, rng),
    "dense": lambda frames, rng: frame_indices.dense_clip(frames, 16, 4, rng),
    "dense, every frame": lambda frames, rng: frame_indices.dense_clip(frames, 8, 1, rng),
    "segments": lambda frames, rng: frame_indices.segment_clip(frames, 16, rng),
    "MAE-ST": lambda frames, rng: frame_indices.mae_st_clip(frames, 16, 4, 24.0, rng),
}
VIEWS = {
    "dense": lambda frames, views: frame_indices.dense_views(frames, 16, 4, views),
    "segments": lambda frames, views: frame_indices.segment_views(frames, 16, views),
    "MAE-ST": lambda frames, views: frame_indices.mae_st_views(frames, 16, 4, 24.0, views),
}
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 40, 63, 64, 65, 66, 250, 300]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_frames", LENGTHS)
def test_a_clip_is_frames_of_the_video_in_order(rule, num_frames):
    rng = np.random.default_rng(0)
    clips = [RULES[rule](num_frames, None)] + [RULES[rule](num_frames, rng) for _ in range(50)]
    for clip in clips:
        assert clip.shape == (8 if "every" in rule else 16,) and clip.dtype == np.int64
        assert clip.min() >= 0 and clip.max() < num_frames
        assert (np.diff(clip) >= 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_without_a_generator_the_clip_is_fixed_and_central(rule):
    clip = RULES[rule](300, None)
    assert clip.tolist() == RULES[rule](300, None).tolist()
    assert abs(clip.mean() - 149.5) < 8
    drawn = {tuple(RULES[rule](300, np.random.default_rng(seed))) for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize("rule", VIEWS)
@pytest.mark.parametrize("num_views", [1, 2, 3, 10])
@pytest.mark.parametrize("num_frames", LENGTHS)
def test_views_are_frames_of_the_video_in_order(rule, num_views, num_frames):
    views = VIEWS[rule](num_frames, num_views)
    assert views.shape == (num_views, 16) and views.dtype == np.int64
    assert views.min() >= 0 and views.max() < num_frames
    assert (np.diff(views, axis=1) >= 0).all() and (np.diff(views, axis=0) >= 0).all()


@pytest.mark.parametrize("rule", VIEWS)
def test_one_view_is_the_middle_one(rule):
    view = VIEWS[rule](300, 1)[0]
    assert abs(view.mean() - 149.5) < 8
    assert view.tolist() == VIEWS[rule](300, 3)[1].tolist() or rule == "segments"


# --- where the published code is not followed ---------------------------------------------------------------


@pytest.mark.parametrize("num_frames", range(1, 16))
def test_a_video_shorter_than_the_segments_keeps_its_motion(num_frames):
    for rng in (None, np.random.default_rng(0)):
        clip = frame_indices.segment_clip(num_frames, 16, rng)
        assert set(clip) == set(range(num_frames))  # every frame is there
    assert set(frame_indices.segment_clip(num_frames, 16, rng, still_if_short=True)) == {0}


def test_segment_views_of_any_number_are_equally_long_and_interleaved():
    views = frame_indices.segment_views(96, 16, 3)
    assert views.T.ravel().tolist() == list(range(0, 96, 2))
    assert frame_indices.segment_views(96, 16, 1).tolist() == [list(range(3, 96, 6))]
