"""Which frames of a video make a clip: functions of integers, without files or decoders.

For a video of D frames and clips of T, indices are int64: (T,) for a clip, (V,T) for V test views. Where a rule
leaves a choice, `rng` makes it; without one the middle is taken, so that validation is repeatable (the published
code draws its validation clips, too). A single test view is the middle one (the published code divides by zero).
"""

import numpy as np


def _pick(rng: np.random.Generator | None, low, high):
    """Draws from the integers low..high, both included; they may be arrays."""
    return (low + high) // 2 if rng is None else rng.integers(low, high, endpoint=True)


def pretrain_indices(start: int, num_frames: int, clip_len: int, stride: int) -> np.ndarray:
    """Takes every stride-th frame from `start`, and repeats the last one reached; frame D-1 is never reached."""
    return start + stride * np.minimum(np.arange(clip_len), max((num_frames - 2 - start) // stride, 0))


def pretrain_clip(num_frames: int, clip_len: int, stride: int, rng=None) -> np.ndarray:
    """Draws a pre-training clip of AdaMAE and VideoMAE: it starts in 0..D - T*stride, at 0 in a shorter video."""
    start = _pick(rng, 0, max(num_frames - clip_len * stride, 0))
    return pretrain_indices(start, num_frames, clip_len, stride)


def dense_indices(start: int, num_frames: int, clip_len: int, stride: int) -> np.ndarray:
    """Spreads T frames over the window start..start + T*stride, T*stride/(T-1) apart, as published.

    A video no longer than the window gives D/stride frames spread over all of it, then repeats its last frame.
    """
    window = clip_len * stride
    if num_frames > window:
        spread = np.linspace(start, start + window, clip_len)
        return np.clip(spread, start, start + window - 1).astype(np.int64)
    distinct = num_frames // stride
    padded = np.concatenate([np.linspace(0, num_frames, distinct), np.full(clip_len - distinct, num_frames)])
    return np.clip(padded, 0, num_frames - 1).astype(np.int64)


def dense_clip(num_frames: int, clip_len: int, stride: int, rng=None) -> np.ndarray:
    """Draws a fine-tuning clip on Kinetics, UCF101 and HMDB51: its window starts in 0..D - 1 - T*stride."""
    start = _pick(rng, 0, max(num_frames - 1 - clip_len * stride, 0))
    return dense_indices(start, num_frames, clip_len, stride)


def dense_views(num_frames: int, clip_len: int, stride: int, num_views: int) -> np.ndarray:
    """Takes test views on the same sets: windows of T among every stride-th frame, from the first to the last."""
    pool = np.arange(0, num_frames, stride)
    pool = np.pad(pool, (0, max(clip_len - len(pool), 0)), mode="edge")
    last = len(pool) - clip_len
    starts = np.array([last // 2]) if num_views == 1 else np.arange(num_views) * last // (num_views - 1)  # (V,)
    return pool[starts[:, None] + np.arange(clip_len)]  # (V,T)


def segment_clip(num_frames: int, num_segments: int, rng=None, still_if_short: bool = False) -> np.ndarray:
    """Draws a fine-tuning clip on Something-Something V2: one frame of each segment (TSN, Wang et al., 2016).

    The frames left over after T equal segments are not used. A video of fewer frames than segments gives one frame
    to each, spread over the video.

    Args:
        still_if_short: such a video gives frame 0 throughout, as in the published code: a still picture.
    """
    length, order = num_frames // num_segments, np.arange(num_segments)
    if length == 0:
        first = last = order * (0 if still_if_short else num_frames) // num_segments  # (T,)
    else:
        first, last = order * length, order * length + length - 1  # (T,) each
    return _pick(rng, first, last)


def segment_views(num_frames: int, num_segments: int, num_views: int) -> np.ndarray:
    """Takes test views on Something-Something V2: one frame per segment, V views interleaved.

    For two views, the published number, these are the published ones.
    """
    length = num_frames / num_segments
    shifts = np.arange(num_views) / num_views if num_views > 1 else np.array([0.5])
    return np.floor(length * np.arange(num_segments) + length * shifts[:, None]).astype(np.int64)  # (V,T)


def mae_st_span(clip_len: int, stride: int, fps: float) -> float:
    """Returns how many frames a video of `fps` shows in the time of T*stride frames at 30 per second."""
    return clip_len * stride / 30 * fps


def mae_st_indices(start: float, num_frames: int, clip_len: int, span: float) -> np.ndarray:
    """Spreads T frames over start..start + span - 1; beyond its end the video's last frame is repeated."""
    return np.clip(np.linspace(start, start + span - 1, clip_len), 0, num_frames - 1).astype(np.int64)


def mae_st_clip(num_frames: int, clip_len: int, stride: int, fps: float, rng=None) -> np.ndarray:
    """Draws a clip of MAE-ST (Feichtenhofer et al., 2022): a real-valued start in [0, D - span]."""
    span = mae_st_span(clip_len, stride, fps)
    slack = max(num_frames - span, 0.0)
    start = slack // 2 if rng is None else rng.uniform(0, slack)
    return mae_st_indices(start, num_frames, clip_len, span)


def mae_st_views(num_frames: int, clip_len: int, stride: int, fps: float, num_views: int = 10) -> np.ndarray:
    """Takes test views of MAE-ST: evenly spaced, their distance rounded down to whole frames."""
    span = mae_st_span(clip_len, stride, fps)
    slack = max(num_frames - span, 0.0)
    starts = [slack // 2] if num_views == 1 else np.arange(num_views) * (slack // (num_views - 1))
    return np.stack([mae_st_indices(start, num_frames, clip_len, span) for start in starts])
