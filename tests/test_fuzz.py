"""Videos damaged at random: every decoder reads or refuses them; crashes and hangs are survived."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clips.decoders import DECODERS, resolve_decoder
from utils import SettingError

PROGRAM = Path(__file__).with_name("fuzz.py")
NUM_MUTATIONS, PARTS = 360, 3  # 72 mutations show every way to damage every sort of file


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_damaged_video_is_read_or_refused(decoder, part, capsys):
    try:
        resolve_decoder(decoder)
    except SettingError as error:
        pytest.skip(str(error))
    size = NUM_MUTATIONS // PARTS
    command = [sys.executable, str(PROGRAM), decoder, str(part * size), str((part + 1) * size)]
    path = {"PYTHONPATH": f"{PROGRAM.parents[1]}:{PROGRAM.parent}"}
    done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{decoder}, mutations from {part * size}: {found}")
    counts = found["counts"]
    assert sum(counts.values()) == size
    assert "wrong" not in found, found["wrong"]
    # neither trivial: most damage is noticed, some does no harm. Crashes and hangs are survived, and counted.
    assert counts["refused"] > size // 4 and counts["read"] > size // 10
    assert found["memory_mib"] < 2000
