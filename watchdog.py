"""Ends a distributed run of which one process died or hangs, and says which rank that was and where it ran.

A collective only tells that somebody is missing. So a thread of every process writes signs of life to the store
at which the processes met: the host, a count of beats, and where the main thread's loop stands (`tick`). The
thread of rank 0 reads them all. It names a rank that has not beaten for too long (dead or frozen), one that
failed, and of those whose loops stand still the ones that are the furthest behind: the others wait for them. The
other ranks read rank 0's signs and its verdict. Times are the reader's own, so clocks of machines may differ.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import PrefixStore, Store

FAILED_GRACE = 10.0  # seconds in which the others may end by themselves, and say why, after one rank failed
TORCHRUN_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


class Sign(NamedTuple):
    """One sign of life. `position` orders the ranks: the lowest is the furthest behind."""

    host: str
    beats: int
    ticks: int
    position: tuple[int, ...]
    where: str
    state: str  # "running", "done", or how it failed


class Peer:
    """What is known of another rank: its last sign, and when its thread and its loop last went on."""

    def __init__(self, rank: int):
        self.rank = rank
        self.sign: Sign | None = None
        self.heard = self.moved = self.changed = time.monotonic()

    def hear(self, sign: Sign) -> None:
        now, old = time.monotonic(), self.sign
        if old is None or sign.beats != old.beats:
            self.heard = now
        if old is None or sign.ticks != old.ticks:
            self.moved = now
        if old is None or sign.state != old.state:
            self.changed = now
        self.sign = sign

    @property
    def runs(self) -> bool:
        return self.sign is None or self.sign.state == "running"

    def __str__(self) -> str:
        if self.sign is None:
            return f"rank {self.rank}, which never gave a sign of life,"
        return f"rank {self.rank} on host {self.sign.host}"


def find_fault(peers: list[Peer], *, timeout: float, now: float) -> tuple[list[int], str] | None:
    """The ranks for which the run must end, and the reason in words; None while all is well.

    Args:
        timeout: seconds that a rank may be silent, or its loop stand still.
        now: the `time.monotonic` at which the peers' signs were last read.
    """
    silent = [p for p in peers if p.runs and now - p.heard > timeout]
    if silent:
        words = [f"{p} has not been heard of for {now - p.heard:.0f} s{_last_at(p)}" for p in silent]
        return [p.rank for p in silent], f"{_listed(words)}: dead, frozen or cut off"
    failed = [p for p in peers if not p.runs and p.sign.state != "done" and now - p.changed > FAILED_GRACE]
    if failed:
        return [p.rank for p in failed], _listed([f"{p} failed: {p.sign.state}" for p in failed])
    still = [p for p in peers if p.sign is not None and p.runs and now - p.moved > timeout]
    if still:
        behind = min(p.sign.position for p in still)
        hung = [p for p in still if p.sign.position == behind]
        words = [f"{p} hangs, for {now - p.moved:.0f} s{_last_at(p)}" for p in hung]
        return [p.rank for p in hung], _listed(words)
    return None


def _last_at(peer: Peer) -> str:
    return f" (last at {peer.sign.where})" if peer.sign is not None else ""


def _listed(words: list[str], most: int = 8) -> str:
    rest = len(words) - most
    return "; ".join(words[:most]) + (f"; and {rest} more" if rest > 0 else "")


class Watchdog(threading.Thread):
    """Publishes this rank's signs of life, and watches: rank 0 all ranks, the others rank 0 (module docstring).

    Args:
        store: where the processes met; a connection of its own is opened to it.
        timeout: seconds after which a silent rank or one that stands still ends the run.
    """

    def __init__(self, *, store: Store, rank: int, size: int, timeout: float):
        super().__init__(name="watchdog", daemon=True)
        self.store = PrefixStore(f"watchdog/{os.environ.get(TORCHRUN_ATTEMPT, 0)}", store.clone())
        self.store.set_timeout(timedelta(seconds=timeout))
        self.rank, self.size, self.timeout = rank, size, timeout
        self.interval = min(1.0, timeout / 10)
        self.host, self.beats, self.state = socket.gethostname(), 0, "running"
        self.place: tuple[int, tuple[int, ...], str] = (0, (), "the start")  # ticks, position, where
        self.peers = [Peer(r) for r in (range(size) if rank == 0 else [0])]
        self.ended = threading.Event()
        self.publish()
        self.start()

    def tick(self, where: str, *position: int) -> None:
        """The main thread goes on. Only memory is touched; without a position the last one stays."""
        self.place = (self.place[0] + 1, position or self.place[1], where)

    def publish(self) -> None:
        self.beats += 1
        self.store.set(str(self.rank), json.dumps(Sign(self.host, self.beats, *self.place, self.state)))

    def read(self, peers: list[Peer]) -> None:
        found = [p for p in peers if p.sign is not None or self.store.check([str(p.rank)])]
        for peer, text in zip(found, self.store.multi_get([str(p.rank) for p in found]) if found else []):
            host, beats, ticks, position, where, state = json.loads(text)
            peer.hear(Sign(host, beats, ticks, tuple(position), where, state))

    def run(self) -> None:
        connected = True
        while not self.ended.wait(self.interval):
            if connected:
                try:
                    self.publish()
                    self.read(self.peers)
                    if self.rank and self.store.check(["verdict"]):
                        self.leave(*json.loads(self.store.get("verdict")))
                except RuntimeError:  # the process that holds the store is gone or frozen: silence from now on
                    connected = False
            fault = find_fault(self.peers, timeout=self.timeout, now=time.monotonic())
            if fault and not self.ended.is_set():
                self.accuse(*fault, connected=connected)

    def accuse(self, ranks: list[int], reason: str, *, connected: bool) -> None:
        """Says who is at fault, tells the others, and ends this process."""
        self.say(f"{reason}; the run ends (--dist_timeout {self.timeout:g})")
        if connected and self.rank == 0:
            with contextlib.suppress(RuntimeError):  # this process ends in any case
                self.store.set("verdict", json.dumps([ranks, reason]))
                time.sleep(2 * self.interval)  # the others read it before the store or the launcher goes
        self.leave(ranks, reason)

    def leave(self, ranks: list[int], reason: str) -> None:
        """Ends this process, whose main thread may wait for ever. A rank at fault shows where it hangs."""
        if self.rank in ranks:
            self.say(f"{reason}; here it is:")
            faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(1)

    def say(self, text: str) -> None:
        print(f"rank {self.rank} on host {self.host}: {text}", file=sys.__stderr__, flush=True)

    def name_missing(self) -> str:
        """The ranks that give no sign of life for three beats from now, in words; "" if all are well."""
        peers = [Peer(r) for r in range(self.size) if r != self.rank]
        try:
            self.read(peers)
            start = time.monotonic()
            time.sleep(3 * self.interval)
            self.read(peers)
        except RuntimeError:
            return f"{self.peers[0] if self.rank else 'the launcher'} can't be reached any more"
        gone = [p for p in peers if p.runs and p.heard < start]
        return _listed([f"{p} is gone{_last_at(p)}" for p in gone])

    def close(self, error: BaseException | None) -> None:
        """Leaves the watch. After an `error` says which rank and host it is, and which ranks are missing."""
        state = "done"
        if error is not None:
            lines = str(error).strip().splitlines()
            state = f"{type(error).__name__}: {lines[0] if lines else ''}"
            missing = self.name_missing() if isinstance(error, RuntimeError) else ""
            self.say(f"{state}; {missing}" if missing else state)
        self.ended.set()
        self.join(2 * self.interval)
        self.state = state
        if not self.is_alive():
            with contextlib.suppress(RuntimeError):  # the store may be gone with the rank that held it
                self.publish()


_watchdog: Watchdog | None = None


def watch(store: Store, *, rank: int, size: int, timeout: float) -> None:
    """Starts this process's watchdog; arguments as in `Watchdog`."""
    global _watchdog
    _watchdog = Watchdog(store=store, rank=rank, size=size, timeout=timeout)


def tick(where: str, *position: int) -> None:
    """Tells that this process's loop goes on; two ticks must lie closer together than `--dist_timeout`.

    Args:
        where: for a person, e.g. "epoch 3, batch 12".
        position: numbers that grow with the work done alike on all ranks, e.g. (3, 12); leave them out where
            ranks do different things, as in saving.
    """
    if _watchdog is not None:
        _watchdog.tick(where, *position)


def unwatch(error: BaseException | None = None) -> None:
    """Ends the watch, for good or because of `error`, which is then printed with this rank and its host."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close(error)
        _watchdog = None
