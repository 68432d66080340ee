"""The decoders: torchcodec, decord and PyAV read chosen frames of an indexed file."""

import functools
import importlib
from bisect import bisect_right
from collections.abc import Sequence

import av
import numpy as np

from clips.video_index import VideoError, VideoIndex, open_stream
from utils import SettingError


class PyAV:
    """Reads frames with PyAV, which brings its own FFmpeg."""

    misreads = frozenset()  # traits of files that the decoder gets wrong

    def __init__(self, path, index: VideoIndex):
        self.path, self.index = path, index
        self.stored_size = index.size if index.turns % 2 == 0 else index.size[::-1]
        self.container, self.stream = open_stream(path)

    @staticmethod
    def load():
        return av

    def read(self, indices: list[int]) -> Sequence[np.ndarray]:
        """Returns the frames at ascending, distinct indices: uint8 (H,W,3) each, upright, RGB."""
        pictures = {}
        if "no times" not in self.index.traits:
            self._read_from_keys(indices, pictures)
        if len(pictures) < len(indices):  # also where a seek landed too late
            self._read_in_order(indices, pictures)
        return [pictures[i] for i in indices]

    def close(self):
        self.container.close()

    def _picture(self, frame) -> np.ndarray:
        if frame.is_corrupt:
            raise VideoError(self.path, f"is damaged at {frame.time} s")
        if (frame.height, frame.width) != self.stored_size:
            raise VideoError(self.path, f"changes its size to {frame.width} x {frame.height} at {frame.time} s")
        return np.rot90(frame.to_ndarray(format="rgb24", threads=1), self.index.turns)

    def _read_from_keys(self, indices: list[int], pictures: dict[int, np.ndarray]):
        """Seeks to each key frame that some of the frames depend on, and decodes from there."""
        times, keys, groups = self.index.times, self.index.keys, {}
        for i in indices:
            key = keys[max(bisect_right(keys, times[i]) - 1, 0)]
            groups.setdefault(key, {})[times[i]] = i
        for key, wanted in groups.items():
            self.container.seek(key, stream=self.stream)
            for frame in self._decode_towards(wanted):
                if frame.pts in wanted:
                    pictures[wanted[frame.pts]] = self._picture(frame)
                if frame.pts is not None and frame.pts >= max(wanted):
                    break

    def _decode_towards(self, wanted):
        """Yields the frames from here on, without those that are neither wanted nor referred to."""
        context = self.stream.codec_context
        for packet in self.container.demux(self.stream):
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from context.decode(packet if packet.size else None)

    def _read_in_order(self, indices: list[int], pictures: dict[int, np.ndarray]):
        """Decodes from the beginning, counting."""
        self.close()
        self.container, self.stream = open_stream(self.path)
        wanted = set(indices)
        for k, frame in enumerate(self.container.decode(self.stream)):
            if k in wanted:
                pictures[k] = self._picture(frame)
            if k == indices[-1]:
                return
        raise VideoError(self.path, f"frame {indices[-1]} could not be decoded")


class TorchCodec:
    """Reads frames with torchcodec, which needs FFmpeg's libraries: the system's, or those that env.sh links."""

    misreads = frozenset({"no times", "no seek table", "chroma"})

    def __init__(self, path, index: VideoIndex):
        self.decoder = self.load()(str(path), num_ffmpeg_threads=1, seek_mode="exact", device="cpu")
        if len(self.decoder) != index.num_frames:
            raise VideoError(path, f"torchcodec counts {len(self.decoder)} frames, PyAV {index.num_frames}")

    @staticmethod
    def load():
        if getattr(importlib.import_module("torchcodec"), "ffmpeg_major_version", "unknown") is None:
            raise ImportError("torchcodec finds no FFmpeg libraries, see PRETRAIN.md")
        return importlib.import_module("torchcodec.decoders").VideoDecoder

    def read(self, indices: list[int]) -> Sequence[np.ndarray]:
        return self.decoder.get_frames_at(indices).data.permute(0, 2, 3, 1).numpy()

    def close(self):
        self.decoder = None


class Decord:
    """Reads frames with decord, as the published code does; decord is no longer maintained."""

    misreads = TorchCodec.misreads | {"open GOP", "trimmed", "rotated"}

    def __init__(self, path, index: VideoIndex):
        decord = self.load()
        # fault_tol: an error, rather than a copy of a neighbour, for any frame that can't be decoded
        self.reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
        if len(self.reader) != index.num_frames:
            raise VideoError(path, f"decord counts {len(self.reader)} frames, PyAV {index.num_frames}")

    @staticmethod
    def load():
        return importlib.import_module("decord")

    def read(self, indices: list[int]) -> Sequence[np.ndarray]:
        return self.reader.get_batch(indices).asnumpy()

    def close(self):
        self.reader = None


DECODERS = {"pyav": PyAV, "torchcodec": TorchCodec, "decord": Decord}  # "auto" tries them in this order


@functools.cache
def resolve_decoder(name: str) -> str:
    """Returns the decoder that `name` stands for: itself, or for "auto" the first one that works.

    Raises:
        SettingError: the name is unknown, or the libraries of the decoder can't be loaded.
    """
    if name != "auto" and name not in DECODERS:
        raise SettingError(f"--decoder {name}: choose one of auto, {', '.join(DECODERS)}")
    for candidate in DECODERS if name == "auto" else [name]:
        try:
            DECODERS[candidate].load()
            return candidate
        except Exception as error:  # a broken library may raise anything on import
            problem = error
    reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    raise SettingError(
        f"--decoder {name} can't be used here ({reason}): install it, or choose auto or pyav"
    ) from problem
