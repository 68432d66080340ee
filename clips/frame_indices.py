"""Which frames of a video make a clip: functions of integers, with no file and no decoder in them.

For a video of D frames and clips of T, indices are int64: (T,) for a clip and (views,T) for test views.
Where a rule leaves a choice, `rng` (a numpy Generator) makes it; without one the middle is taken, so that
validation can be repeated (the published code draws its validation clips, too). A single test view is the
middle one (the published code divides by zero).
"""

import numpy as np


def _pick(rng, low, high):
    """An integer from low..high, both included."""
    return (low + high) // 2 if rng is None else rng.integers(low, high, endpoint=True)


def pretrain_indices(start: int, num_frames: int, clip_len: int, stride: int) -> np.ndarray:
    """Every stride-th frame from `start`, the last one reached repeated; frame D-1 is never reached."""
    return start + stride * np.minimum(np.arange(clip_len), max((num_frames - 2 - start) // stride, 0))


def pretrain_clip(num_frames: int, clip_len: int, stride: int, rng=None) -> np.ndarray:
    """Pre-training clip of AdaMAE and VideoMAE: a start in 0..D - T*stride, or 0 in a shorter video."""
    start = _pick(rng, 0, max(num_frames - clip_len * stride, 0))
    return pretrain_indices(start, num_frames, clip_len, stride)


def dense_indices(start: int, num_frames: int, clip_len: int, stride: int) -> np.ndarray:
    """T frames spread over the window start..start + T*stride (they lie T*stride/(T-1) apart, as published).

    A video that is not longer than the window gives D/stride frames spread over all of it, then its last one.
    """
    window = clip_len * stride
    if num_frames > window:
        spread = np.linspace(start, start + window, clip_len)
        return np.clip(spread, start, start + window - 1).astype(np.int64)
    distinct = num_frames // stride
    padded = np.concatenate([np.linspace(0, num_frames, distinct), np.full(clip_len - distinct, num_frames)])
    return np.clip(padded, 0, num_frames - 1).astype(np.int64)


def dense_clip(num_frames: int, clip_len: int, stride: int, rng=None) -> np.ndarray:
    """Fine-tuning clip on Kinetics-400, UCF101 and HMDB51: a window starting in 0..D - 1 - T*stride."""
    start = _pick(rng, 0, max(num_frames - 1 - clip_len * stride, 0))
    return dense_indices(start, num_frames, clip_len, stride)


def dense_views(num_frames: int, clip_len: int, stride: int, num_views: int) -> np.ndarray:
    """Test views on the same sets: windows of T among every stride-th frame, from the first to the last."""
    pool = np.arange(0, num_frames, stride)
    pool = np.pad(pool, (0, max(clip_len - len(pool), 0)), mode="edge")
    starts = _even_starts(len(pool) - clip_len, num_views)
    return pool[starts[:, None] + np.arange(clip_len)]


def _even_starts(last: int, num_views: int) -> np.ndarray:
    """Integers from 0 to `last`, evenly spaced and rounded down; the middle one if only one is wanted."""
    return np.array([last // 2]) if num_views == 1 else np.arange(num_views) * last // (num_views - 1)


def segment_bounds(num_frames: int, num_segments: int, reference: bool = False):
    """First and last frame, both (T,), of each of T equal segments (the frames left over are not used).

    A video of fewer frames than segments gives one frame each, spread over it; with reference=True it gives
    frame 0 throughout, as the published code does: a still picture.
    """
    length, order = num_frames // num_segments, np.arange(num_segments)
    if length == 0:
        only = order * (0 if reference else num_frames) // num_segments
        return only, only
    return order * length, order * length + length - 1


def segment_clip(num_frames: int, num_segments: int, rng=None, reference: bool = False) -> np.ndarray:
    """Fine-tuning clip on Something-Something V2: one frame of each segment (Wang et al., TSN, 2016)."""
    return _pick(rng, *segment_bounds(num_frames, num_segments, reference))


def segment_views(num_frames: int, num_segments: int, num_views: int, reference: bool = False):
    """Test views on Something-Something V2: one frame per segment, V views interleaved; int64 (V,T).

    With reference=True as published: always two interleaved views, whose sorted frames are, for V > 2, filled
    up with copies of one frame to V*T; returns a list then, since these views differ in length.
    """
    length = num_frames / num_segments
    first = length * np.arange(num_segments)
    if not reference:
        shifts = np.arange(num_views) / num_views if num_views > 1 else np.array([0.5])
        return np.floor(first + length * shifts[:, None]).astype(np.int64)
    pool = np.concatenate([first, first + length / 2, np.full((num_views - 2) * num_segments, first[-1])])
    pool = np.sort(pool.astype(np.int64))
    return [pool[view::2] for view in range(num_views)]


def mae_st_span(clip_len: int, stride: int, fps: float) -> float:
    """Frames of a video of `fps` in the time that T*stride frames take at 30 frames per second."""
    return clip_len * stride / 30 * fps


def mae_st_indices(start: float, num_frames: int, clip_len: int, span: float) -> np.ndarray:
    """T frames spread over start..start + span - 1, the last frame of the video repeated beyond its end."""
    return np.clip(np.linspace(start, start + span - 1, clip_len), 0, num_frames - 1).astype(np.int64)


def mae_st_clip(num_frames: int, clip_len: int, stride: int, fps: float, rng=None) -> np.ndarray:
    """Clip of MAE-ST (Feichtenhofer et al., 2022): a real-valued start in [0, D - span]."""
    span = mae_st_span(clip_len, stride, fps)
    slack = max(num_frames - span, 0.0)
    start = slack // 2 if rng is None else rng.uniform(0, slack)
    return mae_st_indices(start, num_frames, clip_len, span)


def mae_st_views(num_frames: int, clip_len: int, stride: int, fps: float, num_views: int = 10) -> np.ndarray:
    """Test views of MAE-ST: evenly placed, their distance rounded down to whole frames."""
    span = mae_st_span(clip_len, stride, fps)
    slack = max(num_frames - span, 0.0)
    starts = [slack // 2] if num_views == 1 else np.arange(num_views) * (slack // (num_views - 1))
    return np.stack([mae_st_indices(start, num_frames, clip_len, span) for start in starts])
