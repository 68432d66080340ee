"""Ends a distributed run of which one process died or hangs, and says which rank that was and where it ran.

A collective only tells that somebody is missing. So every process writes signs of life to the store at which all
of them met: its host, a count of beats, and where its main thread's loop stands (`tick`). Rank 0 reads them all.
It names a rank that has not beaten for too long (dead or frozen), one that failed, and one whose loop stands still
while it is the furthest behind, so that the others wait for it. The other ranks watch rank 0's beats and read its
verdict. Times are the reader's own, so the machines' clocks may differ.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from typing import NamedTuple

from torch.distributed import PrefixStore, Store

FAILED_GRACE = 10.0  # seconds in which the others may end by themselves, and say why, after one rank failed


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


class Fault(NamedTuple):
    """The ranks for which the run must end, and the reason in words."""

    ranks: list[int]
    reason: str


def find_gone(peers: list[Peer], *, timeout: float, now: float) -> Fault | None:
    """Ranks that gave no sign of life for `timeout` seconds, or failed `FAILED_GRACE` seconds ago; else None.

    Args:
        now: the `time.monotonic` at which the peers' signs were last read.
    """
    silent = [p for p in peers if p.runs and now - p.heard > timeout]
    if silent:
        words = [f"{p} has not been heard of for {now - p.heard:.0f} s{_last_at(p)}" for p in silent]
        return Fault([p.rank for p in silent], f"{_listed(words)}: dead, frozen or cut off")
    failed = [p for p in peers if not p.runs and p.sign.state != "done" and now - p.changed > FAILED_GRACE]
    if failed:
        return Fault([p.rank for p in failed], _listed([f"{p} failed: {p.sign.state}" for p in failed]))
    return None


def find_hung(peers: list[Peer], *, timeout: float, now: float) -> Fault | None:
    """Of all ranks those furthest behind, if all of these stand still for `timeout` seconds; else None.

    One behind that goes on, such as a rank that saves, is waited for.
    """
    running = [p for p in peers if p.sign is not None and p.runs]
    behind = min((p.sign.position for p in running), default=())
    last = [p for p in running if p.sign.position == behind]
    if not last or any(now - p.moved <= timeout for p in last):
        return None
    words = [f"{p} hangs, for {now - p.moved:.0f} s{_last_at(p)}" for p in last]
    return Fault([p.rank for p in last], _listed(words))


def _last_at(peer: Peer) -> str:
    return f" (last sign of life: {peer.sign.where})" if peer.sign is not None else ""


def _listed(words: list[str], most: int = 8) -> str:
    rest = len(words) - most
    return "; ".join(words[:most]) + (f"; and {rest} more" if rest > 0 else "")


class Watchdog:
    """Publishes this rank's signs of life, and watches: rank 0 all ranks, the others rank 0 (module docstring).

    One thread talks with the store, which blocks for as long as the process that holds it is frozen. So another
    one judges.

    Args:
        store: where the processes met; a connection of its own is opened to it.
        timeout: seconds after which a silent rank or one that stands still ends the run.
    """

    def __init__(self, *, store: Store, rank: int, size: int, timeout: float):
        self.store = PrefixStore("watchdog", store.clone())
        self.rank, self.size, self.timeout = rank, size, timeout
        self.interval = min(1.0, timeout / 10)
        self.host, self.beats, self.state = socket.gethostname(), 0, "running"
        self.place: tuple[int, tuple[int, ...], str] = (0, (), "the start")  # ticks, position, where
        self.peers = [Peer(r) for r in (range(size) if rank == 0 else [0])]
        self.verdict: Fault | None = None  # of rank 0
        self.ended = threading.Event()
        self.publish()
        self.talker = threading.Thread(target=self.talk, name="watchdog-talk", daemon=True)
        self.judge = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.talker.start()
        self.judge.start()

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

    def talk(self) -> None:
        with contextlib.suppress(RuntimeError):  # the process that held the store is gone: silence from now on
            while not self.ended.wait(self.interval):
                self.publish()
                self.read(self.peers)
                if self.verdict:
                    self.store.set("verdict", json.dumps(self.verdict))
                elif self.rank and self.store.check(["verdict"]):
                    self.leave(Fault(*json.loads(self.store.get("verdict"))))

    def watch(self) -> None:
        while not self.ended.wait(self.interval):
            now = time.monotonic()
            fault = find_gone(self.peers, timeout=self.timeout, now=now)
            if self.rank == 0 and not fault:
                fault = find_hung(self.peers, timeout=self.timeout, now=now)
            if fault:
                self.say(f"{fault.reason}; the run ends (--dist_timeout {self.timeout:g})")
                if self.rank == 0:
                    self.verdict = fault
                    time.sleep(3 * self.interval)  # the others hear it before the store or the launcher goes
                self.leave(fault)

    def leave(self, fault: Fault) -> None:
        """Ends this process, whose main thread may wait for ever. A rank at fault shows where it hangs."""
        if self.rank in fault.ranks:
            self.say(f"{fault.reason}; here it is:")
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
        self.talker.join(2 * self.interval)
        self.state = state
        if not self.talker.is_alive():
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
