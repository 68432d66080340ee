"""Ends a distributed run in which a process died or hangs, and names that rank and its host.

A collective that times out does not say which rank is missing. So every process writes heartbeats to the store at
which all of them met: its host, a count, and the position of its training loop (`tick`). Rank 0 reads them all. It
names a rank whose heartbeats stopped (dead or frozen), one that failed, and one whose loop stands still while it
is the furthest behind, so that the others wait for it. The other ranks watch rank 0 and read its verdict. Times
are measured by the reader, so the machines' clocks may differ.
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

FAILED_GRACE = 10.0  # seconds in which the other ranks may end by themselves, with their own message


class Sign(NamedTuple):
    """One heartbeat. `position` orders the ranks: the lowest is the furthest behind."""

    host: str
    beats: int
    ticks: int
    position: tuple[int, ...]
    where: str
    state: str  # "running", "done", or how it failed


class Peer:
    """What is known of another rank: its last heartbeat, and when it and its loop last advanced."""

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
            return f"rank {self.rank}, which never joined the watch,"
        return f"rank {self.rank} on host {self.sign.host}"


class Fault(NamedTuple):
    """The ranks for which the run must end, and the reason in words."""

    ranks: list[int]
    reason: str


def find_gone(peers: list[Peer], *, timeout: float, now: float) -> Fault | None:
    """Ranks without a heartbeat for `timeout` seconds, or that failed `FAILED_GRACE` seconds ago; else None.

    Args:
        now: the `time.monotonic` at which the peers were last read.
    """
    silent = [p for p in peers if p.runs and now - p.heard > timeout]
    if silent:
        words = [f"{p} has sent no heartbeat for {now - p.heard:.0f} s{_last_at(p)}" for p in silent]
        return Fault([p.rank for p in silent], f"{_listed(words)}: dead, frozen or cut off")
    failed = [p for p in peers if not p.runs and p.sign.state != "done" and now - p.changed > FAILED_GRACE]
    if failed:
        return Fault([p.rank for p in failed], _listed([f"{p} failed: {p.sign.state}" for p in failed]))
    return None


def find_hung(peers: list[Peer], *, timeout: float, now: float) -> Fault | None:
    """The ranks furthest behind, if all of them have stood still for `timeout` seconds; else None.

    A rank that is behind but advances, such as one that saves, is waited for.
    """
    running = [p for p in peers if p.sign is not None and p.runs]
    behind = min((p.sign.position for p in running), default=())
    last = [p for p in running if p.sign.position == behind]
    if not last or any(now - p.moved <= timeout for p in last):
        return None
    words = [f"{p} has hung for {now - p.moved:.0f} s{_last_at(p)}" for p in last]
    return Fault([p.rank for p in last], _listed(words))


def _last_at(peer: Peer) -> str:
    return f" (last heartbeat: {peer.sign.where})" if peer.sign is not None else ""


def _listed(words: list[str], most: int = 8) -> str:
    rest = len(words) - most
    return "; ".join(words[:most]) + (f"; and {rest} more" if rest > 0 else "")


class Watchdog:
    """Publishes this rank's heartbeats, and watches: rank 0 all ranks, the others rank 0 (module docstring).

    One thread talks to the store, a call to which blocks while the process that holds it is frozen. So a second
    thread judges.

    Args:
        store: where the processes met; the watchdog opens its own connection to it.
        timeout: seconds after which a silent or hanging rank ends the run.
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
        """Notes that the main thread advances; only memory is touched. Without a position the last one stays."""
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
        with contextlib.suppress(RuntimeError):  # the process that held the store is gone
            while not self.ended.wait(self.interval if self.place[1] else self.interval / 5):  # a rank may die soon
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
                    time.sleep(3 * self.interval)  # so that the others read it before the store is gone
                self.leave(fault)

    def leave(self, fault: Fault) -> None:
        """Ends this process, whose main thread may wait forever. A rank at fault prints where it hangs."""
        if self.rank in fault.ranks:
            self.say(f"{fault.reason}; its stack:")
            faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(1)

    def say(self, text: str) -> None:
        print(f"rank {self.rank} on host {self.host}: {text}", file=sys.__stderr__, flush=True)

    def name_missing(self) -> str:
        """The ranks without a heartbeat for the next three intervals, in words; "" if there are none."""
        peers = [Peer(r) for r in range(self.size) if r != self.rank]
        try:
            self.read(peers)
            start = time.monotonic()
            time.sleep(3 * self.interval)
            self.read(peers)
        except RuntimeError:
            return f"{self.peers[0] if self.rank else 'the launcher'} is no longer reachable"
        gone = [p for p in peers if p.runs and p.heard < start]
        return _listed([f"{p} is gone{_last_at(p)}" for p in gone])

    def close(self, error: BaseException | None) -> None:
        """Ends the watch. After an `error` prints this rank and host, and which ranks are missing."""
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
    """Reports that this process's loop advances; two ticks must lie closer together than `--dist_timeout`.

    Args:
        where: for a person, e.g. "epoch 3, batch 12".
        position: numbers that grow with the work done alike on all ranks, e.g. (3, 12); leave them out where
            ranks do different things, as in saving.
    """
    if _watchdog is not None:
        _watchdog.tick(where, *position)


def unwatch(error: BaseException | None = None) -> None:
    """Ends the watch, normally or because of `error`, which is then printed with this rank and its host."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close(error)
        _watchdog = None
