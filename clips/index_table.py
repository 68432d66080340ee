"""The indexes of a list's videos, in shared memory: a file is scanned once, not at every opening.

Scanning takes a tenth of a training clip's time or more. A worker's own memory would not do: each epoch deals the
videos out anew, so that one of W workers has met a given video after e epochs with probability 1 - (1 - 1/W)^e only.
"""

import mmap
import os
import struct
import time
import zlib

from clips.video_index import VideoIndex, index_video, video_errors

RECORD = 256  # bytes; an index takes about 70, and more where frame times or key frames follow no pattern
SETTLED = 2.0  # seconds after which a further change of a file surely gives it another time of change


class IndexTable:
    """Knows the index of each of a list's videos that this process, or one forked from it, has scanned.

    It takes RECORD bytes for each of these videos. An index that needs more is not kept, nor is that of a file that
    has changed a moment ago; such files are scanned at every opening. A pickled copy starts empty.
    """

    def __init__(self, num_videos: int):
        self.num_videos = num_videos
        self.memory = mmap.mmap(-1, max(1, num_videos) * RECORD)  # pages take up memory only once written to

    def __reduce__(self):
        return IndexTable, (self.num_videos,)

    def find(self, number: int, path) -> VideoIndex:
        """Returns the index of video `number`, the file `path`, as it is now.

        Raises:
            VideoError: as from `index_video`.
        """
        with video_errors(path):
            status = os.stat(path)
        times = status.st_mtime_ns, status.st_ctime_ns
        version = struct.pack("=3Q2q", status.st_dev, status.st_ino, status.st_size, *times)
        place = slice(number * RECORD, (number + 1) * RECORD)
        kept = self.memory[place]
        checksum, record = kept[:4], kept[4:]
        if record.startswith(version) and checksum == _checksum(record):
            return VideoIndex.unpack(record[len(version) :])
        index = index_video(path)
        record = (version + index.pack()).ljust(RECORD - 4, b"\0")
        if len(record) == RECORD - 4 and time.time() - status.st_ctime > SETTLED:
            self.memory[place] = _checksum(record) + record
        return index


def _checksum(record: bytes) -> bytes:
    """Tells a whole record from one that another process is writing at this moment."""
    return zlib.crc32(record).to_bytes(4, "little")
