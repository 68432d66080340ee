"""Decoding: every decoder returns the same, right frames of every kind of file, or a VideoError."""

import pickle

import av
import numpy as np
import pytest
import torch
import videos
from videos import BROKEN, KINDS, STEPS

from clips import decoders
from clips.decoders import DECODERS, resolve_decoder
from clips.video import open_video
from clips.video_index import VideoError
from utils import SettingError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind): the path of a video of that kind, encoded once."""
    folder, paths = tmp_path_factory.mktemp("videos"), {}

    def make(kind):
        if kind not in paths:
            paths[kind] = videos.write_kind(folder, kind)
        return paths[kind]

    return make


@pytest.fixture(params=list(DECODERS))
def decoder(request):
    try:
        return resolve_decoder(request.param)
    except SettingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", KINDS)
def test_all_frames_are_there_in_order_and_upright(made, decoder, kind):
    _, num_frames, settings = KINDS[kind]
    mean_step = sum(STEPS) / len(STEPS) if "variable" in kind else 1
    with open_video(made(kind), decoder) as opened:
        frames = opened.get_frames(range(opened.num_frames))
        assert opened.num_frames == num_frames
        assert opened.size == settings.get("size", (48, 64))
        # Matroska rounds times to milliseconds; how long an uneven last frame lasts is the container's guess
        assert opened.fps == pytest.approx(30 / mean_step, rel=0.08 if "variable" in kind else 0.003)
        assert frames.dtype == torch.uint8 and frames.shape == (num_frames, 3, *opened.size)
        assert videos.read_numbers(frames) == list(range(num_frames))


@pytest.mark.parametrize("kind", KINDS)
def test_any_indices_in_any_order_give_those_frames(made, decoder, kind):
    rng = np.random.default_rng(0)
    for _ in range(3):
        with open_video(made(kind), decoder) as opened:
            for _ in range(2):  # the second time the decoder starts from where it stopped
                indices = rng.integers(0, opened.num_frames, 6)
                assert videos.read_numbers(opened.get_frames(indices)) == indices.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", ["torchcodec", "decord"], indirect=True)
def test_decoders_agree_in_every_pixel(made, decoder, kind):
    with open_video(made(kind), decoder) as one, open_video(made(kind), "pyav") as other:
        assert (one.num_frames, one.fps, one.size) == (other.num_frames, other.fps, other.size)
        indices = range(0, one.num_frames, 5)
        assert torch.equal(one.get_frames(indices), other.get_frames(indices))


@pytest.mark.parametrize("kind", ["H.264 with B-frames", "HEVC", "VP9 in WebM", "MPEG-4 in AVI", "BT.709"])
def test_common_files_are_read_by_the_decoder_asked_for(made, decoder, kind):
    with open_video(made(kind), decoder) as opened:
        assert type(opened._reader) is DECODERS[decoder]


@pytest.mark.parametrize("decoder", ["torchcodec", "decord"], indirect=True)
def test_large_noisy_pictures_agree_too(tmp_path, decoder):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 85, 3)).astype(np.uint8)
    frames = noise.repeat(4, axis=1).repeat(4, axis=2)  # 256 x 340, as videos of Kinetics often are
    path = videos.write_video(tmp_path / "noise.mp4", frames=frames, crf="23", bf="2")
    with open_video(path, decoder) as one, open_video(path, "pyav") as other:
        assert torch.equal(one.get_frames(range(6)), other.get_frames(range(6)))


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path, made, decoder):
    path = videos.write_trimmed(made("H.264, one key frame"), tmp_path / "trimmed.mp4", first=17)
    with open_video(path, decoder) as opened:
        assert opened.num_frames == 60 - 17
        assert videos.read_numbers(opened.get_frames([42, 0, 5])) == [59, 17, 22]


def test_each_distinct_frame_is_decoded_once(made, decoder, monkeypatch):
    asked = []
    with open_video(made("H.264 with B-frames"), decoder) as opened:
        read = opened._reader.read
        monkeypatch.setattr(opened._reader, "read", lambda indices: asked.append(indices) or read(indices))
        frames = opened.get_frames([7, 3, 7, 7, 20, 3])
    assert asked == [[3, 7, 20]]
    assert videos.read_numbers(frames) == [7, 3, 7, 7, 20, 3]


def test_pyav_only_converts_wanted_frames_and_decodes_in_one_thread(made, monkeypatch):
    converted = []
    picture = decoders.PyAV._picture
    monkeypatch.setattr(decoders.PyAV, "_picture", lambda self, f: converted.append(f.pts) or picture(self, f))
    with open_video(made("H.264 with B-frames"), "pyav") as opened:
        opened.get_frames([3, 40, 41])
        assert opened._reader.stream.codec_context.thread_count == 1
    assert len(converted) == 3


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_file_is_a_video_error(tmp_path, decoder, defect):
    path = videos.write_broken(tmp_path, defect)
    with pytest.raises(VideoError) as raised, open_video(path, decoder) as opened:
        opened.get_frames(range(opened.num_frames))
    error = raised.value
    assert error.path == path and error.reason and "\n" not in error.reason
    assert str(error) == f"{path}: {error.reason}"
    assert "audio" not in defect or error.reason.startswith("has no video stream")
    assert "zero" not in defect or error.reason == "is empty (0 bytes)"
    if defect in ("missing", "not a video", "damaged in the middle"):
        assert isinstance(error.__cause__, Exception)  # what the library said is kept


def test_a_file_cut_between_two_frames_is_a_video_error(tmp_path, decoder):
    """The bytes that are left are all valid: only the header tells that there should be more."""
    path = videos.write_video(tmp_path / "a.mp4", 60, g="20", movflags="faststart")
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: positions[30]])
    with pytest.raises(VideoError, match=r"cut off: 1\.0 s of video, its header says 2\.0 s"):
        open_video(path, decoder)


def test_a_matroska_file_cut_in_its_middle_is_a_video_error(tmp_path, decoder):
    """Its streams have no duration, only the file has one."""
    path = videos.write_video(tmp_path / "whole.mkv", 120, g="10")
    cut = videos.write_cut(path, tmp_path / "cut.mkv", 0.6)
    with pytest.raises(VideoError, match="cut off"):
        open_video(cut, decoder)


def test_a_file_cut_within_its_last_frame_is_noticed_on_opening(tmp_path, decoder):
    path = videos.write_video(tmp_path / "a.mp4", 60, g="20", bf="0", movflags="faststart")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(VideoError, match="is damaged or cut off at frame 59"):
        open_video(path, decoder)


def test_a_wrong_suffix_does_no_harm(tmp_path, decoder):
    path = videos.write_video(tmp_path / "a.mp4", 20).rename(tmp_path / "a.avi")
    with open_video(path, decoder) as opened:
        assert videos.read_numbers(opened.get_frames([3, 19])) == [3, 19]


def test_frames_larger_than_8k_are_refused_before_they_take_memory(tmp_path, decoder):
    path = videos.write_video(tmp_path / "a.avi", 1, size=(16, 16400), codec="mjpeg", pix_fmt="yuvj420p")
    with pytest.raises(VideoError, match="has frames of 16400 x 16 pixels, more than 8K"):
        open_video(path, decoder)


def test_a_video_whose_frames_change_their_size_is_refused(tmp_path):
    path = videos.write_resized(tmp_path / "a.avi")
    with open_video(path, "pyav") as opened:
        assert opened.get_frames([0, 4]).shape == (2, 3, 48, 64)
    with open_video(path, "pyav") as opened, pytest.raises(VideoError, match="changes its size to 128 x 96"):
        opened.get_frames([0, 7])


def test_only_a_file_may_be_to_blame_for_lack_of_memory(tmp_path, monkeypatch):
    """FFmpeg runs out of memory where a file asks for absurd amounts; Python where the machine has none left."""
    path = videos.write_video(tmp_path / "a.mp4", 5)
    for error, raised in (
        (av.error.MemoryError(12, "Cannot allocate memory"), VideoError),
        (MemoryError(), MemoryError),
    ):
        with open_video(path, "pyav") as opened, pytest.raises(raised):
            monkeypatch.setattr(opened._reader, "read", lambda _, error=error: (_ for _ in ()).throw(error))
            opened.get_frames([0])


@pytest.mark.parametrize("indices", [[30], [-1], [0, 99], []])
def test_an_index_out_of_range_is_a_video_error(tmp_path, decoder, indices):
    path = videos.write_video(tmp_path / "a.mp4", 30)
    with open_video(path, decoder) as opened, pytest.raises(VideoError, match="frames 0 to 29"):
        opened.get_frames(indices)


def test_video_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "is empty", "a.mp4: is empty")


@pytest.fixture
def without(monkeypatch):
    """without(names): make these decoders fail to load."""

    def fail():
        raise ImportError("no such library")

    def disable(*names):
        for name in names:
            monkeypatch.setattr(DECODERS[name], "load", staticmethod(fail))
        resolve_decoder.cache_clear()

    yield disable
    resolve_decoder.cache_clear()


def test_auto_takes_the_first_decoder_that_loads(without):
    without()
    assert resolve_decoder("auto") == resolve_decoder("pyav") == "pyav"
    without("pyav")
    assert resolve_decoder("auto") in ("torchcodec", "decord")
    without("torchcodec")
    assert resolve_decoder("auto") == "decord"


def test_a_decoder_asked_for_by_name_must_load(without):
    without("torchcodec")
    with pytest.raises(SettingError, match=r"torchcodec can't be used here \(no such library\): install"):
        resolve_decoder("torchcodec")
    with pytest.raises(SettingError, match="--decoder opencv: choose one of auto, pyav, torchcodec, decord"):
        resolve_decoder("opencv")


@pytest.mark.parametrize("size", [(40, 48), (48, 40), (64, 80), (36, 52)])
def test_any_width_is_read(tmp_path, size, decoder):
    """decord refuses some widths whose rows it pads; they are read all the same."""
    path = videos.write_video(tmp_path / "a.mp4", 12, size=size)
    with open_video(path, decoder) as video:
        assert videos.read_numbers(video.get_frames([0, 5, 11])) == [0, 5, 11]
