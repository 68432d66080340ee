"""Reading chosen frames of a video file, with torchcodec, decord or PyAV behind one class."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clips.decoders import DECODERS, PyAV, resolve_decoder
from clips.video_index import VideoError, VideoIndex, index_video, video_errors


class Video:
    """An open video with num_frames, fps (mean, 1/s) and size (H,W); PyAV reads what the decoder can't.

        with open_video("clip.mp4") as video:
            frames = video.get_frames([0, 4, 8])  # uint8 (3,3,H,W)

    Args:
        index: of this file, where it is known; otherwise the file is scanned.

    Raises:
        VideoError: the file is missing, empty, cut off or unreadable, or has no video.
        SettingError: the decoder can't be used.
    """

    def __init__(self, path, decoder: str = "auto", index: VideoIndex | None = None):
        reader = DECODERS[resolve_decoder(decoder)]
        index = index or index_video(path)
        if reader.misreads & index.traits:
            reader = PyAV
        self.path, self.num_frames, self.fps, self.size = path, index.num_frames, index.fps, index.size
        self._index = index
        with video_errors(path):
            self._reader = self._open(reader)

    def _open(self, reader):
        try:
            return reader(self.path, self._index)
        except Exception:
            if reader is PyAV:
                raise
            return PyAV(self.path, self._index)  # decord refuses AV1, for one

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._reader.close()

    def get_frames(self, indices) -> Tensor:
        """Returns frames as uint8 (T,3,H,W), upright, RGB, each distinct one decoded once.

        Args:
            indices: T integers in any order, repeats included.

        Raises:
            VideoError: an index is out of range, or a frame can't be decoded.
        """
        distinct, place = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if len(distinct) == 0 or distinct[0] < 0 or distinct[-1] >= self.num_frames:
            asked = f"{distinct[0]} to {distinct[-1]}" if len(distinct) else "none"
            raise VideoError(self.path, f"has frames 0 to {self.num_frames - 1}, asked for {asked}")
        with video_errors(self.path):
            frames = self._read(distinct.tolist())  # (H,W,3) each
            return torch.from_numpy(np.stack([frames[k] for k in place])).permute(0, 3, 1, 2)  # (T,3,H,W)

    def _read(self, indices: list[int]) -> Sequence[np.ndarray]:
        try:
            return self._reader.read(indices)
        except Exception:
            if isinstance(self._reader, PyAV):
                raise
            self._reader.close()  # decord refuses frames 40 or 48 pixels wide only now
            self._reader = PyAV(self.path, self._index)
            return self._reader.read(indices)


def open_video(path, decoder: str = "auto", index: VideoIndex | None = None) -> Video:
    """Opens a video file, see `Video`."""
    return Video(path, decoder, index)
