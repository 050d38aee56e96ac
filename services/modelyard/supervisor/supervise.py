"""The supervisor's mind: what is wanted, what serves, what is on its way, and the steps between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .desired import Desired, read_json, write_json
from .logfile import LogFile
from .relay import Relay
from .replica import SPREADS, Replica
from .rolls import Roll
from .shipper import Shipper

LOOK_S, IDLE_S = 0.5, 5.0
KEEP_LOGS = 4


class Supervisor:
    """Lives in its run folder (the working directory). ``state.json`` holds what must outlive it: the last
    generation that was good, the one that was given up and why, and which roots its children run from."""

    def __init__(self, sockets: Path, ports: Mapping[str, int]) -> None:
        self.ports = dict(ports)
        self.environ = dict(os.environ)
        self.want: Desired | None = None
        self.serving: Roll | None = None
        self.candidate: Roll | None = None
        self.draining: list[Roll] = []
        self.stopping = False
        self.relays = {kind: Relay(kind, self._choices) for kind in ports}
        self.shipper = Shipper(self.environ)
        self._sockets = sockets
        self._log = LogFile(Path("logs/supervisor.log"))
        self._wake = asyncio.Event()
        state = read_json("state.json") or {}
        self._good: dict[str, Any] | None = state.get("good")
        self._failed: dict[str, Any] = state.get("failed") or {}
        self._roll = int(state.get("roll", 0))
        self._saved: dict[str, Any] = {}
        self._ready: set[str] = set()
        self._spreading: set[asyncio.Task[None]] = set()

    async def start(self, public: Mapping[str, socket.socket]) -> None:
        for kind, sock in public.items():
            await self.relays[kind].start(sock)
        self._log.say(f"supervisor {os.getpid()} on ports {self.ports}")

    def apply(self, want: Desired) -> None:
        """Takes a new wish. The same or an older generation with another template never comes here."""
        if self.want is None or want.generation != self.want.generation:
            self._log.say(f"generation {want.generation}: {want.template['image']}, {want.replicas} replicas")
        self.want = want
        self._step()
        self._wake.set()

    async def run(self) -> None:
        """Steps whenever something changed, and now and then for what changes by time alone. Raises when it must end:
        nobody could find it any more without its folder."""
        while not self.stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self.candidate else IDLE_S):
                    await self._wake.wait()
            self._wake.clear()
            if not self.stopping:
                self._step()

    async def stop(self) -> None:
        """No new calls, the open ones answered, everything ended."""
        self.stopping = True
        self._log.say("stopping")
        for relay in self.relays.values():
            relay.close()
        rolls = [r for r in (self.serving, self.candidate, *self.draining) if r is not None]
        await asyncio.gather(*(roll.stop() for roll in rolls))
        for relay in self.relays.values():
            relay.abort()
        await self.shipper.stop()
        self._log.say("stopped")
        self._log.close()

    def report(self) -> dict[str, Any]:
        """What ``observe`` of the deployment target is made from."""
        rolls = [r for r in (self.serving, self.candidate, *self.draining) if r is not None]
        generation = self.want.generation if self.want else 0
        return {
            "generation": generation, "pid": os.getpid(), "shipper": self.shipper.pid, "ports": self.ports,
            "serving": self.serving.want.generation if self.serving else 0,
            "candidate": self.candidate.want.generation if self.candidate else 0,
            "failed": self._failed.get("reason", "") if self._failed.get("generation") == generation else "",
            "image": self.serving.want.template["image"] if self.serving else "",
            "replicas": [replica for roll in rolls for replica in roll.report()],
        }

    def _choices(self) -> list[Replica]:
        return [r for r in self.serving.replicas if r.ready and not r.leaving] if self.serving else []

    def _changed(self) -> None:
        self._wake.set()
        for relay in self.relays.values():
            relay.changed()

    def _begin(self, want: Desired) -> Roll:
        self._roll += 1
        for old in Path("logs").glob("*.log*"):
            number = old.name.partition("-")[0]
            if number.isdigit() and int(number) <= self._roll - KEEP_LOGS:
                old.unlink(missing_ok=True)
        kind = _kind(want)
        return Roll(want, self._roll, lambda w, roll, n: kind(
            w, roll, n, self._sockets, self._changed, self.environ))

    def _step(self) -> None:
        """One decision, idempotent: from what is, a step towards what is wanted. Waits for nothing."""
        if not os.path.exists("lock"):
            raise FileNotFoundError("the run folder was taken away")
        want = self.want
        if want is None:
            return
        if self.serving is None and self.candidate is None and self._good:
            good = Desired.of(self._good)
            self.serving = self._begin(want if good.template == want.template else good)
        if self.serving is not None and self.serving.want.template == want.template:
            self._discard()
            self.serving.scale(want)
        elif self._failed.get("generation") == want.generation:
            self._discard()
        elif self.candidate is not None and self.candidate.want.template == want.template:
            self.candidate.scale(want)
        else:
            self._discard()
            self.candidate = self._begin(want)
        self._judge()
        self.draining = [roll for roll in self.draining if roll.leaving]
        self._spread()
        if self.serving is not None:
            self.shipper.use(self.serving.want.template)
        self._save()

    def _spread(self) -> None:
        """When a replica joins others that serve, their connections are shared out anew."""
        ready = {replica.address("admin"): replica for replica in self._choices()}
        joined = ready.keys() - self._ready
        if joined and self._ready & ready.keys():
            for address in self._ready & ready.keys():
                if ready[address].load(SPREADS) > 1:
                    task = asyncio.get_running_loop().create_task(ready[address].spread())
                    self._spreading.add(task)
                    task.add_done_callback(self._spreading.discard)
        self._ready = set(ready)

    def _judge(self) -> None:
        """A candidate that is ready takes over; one that will not be is given up, and the old one serves on."""
        candidate = self.candidate
        if candidate is None:
            return
        if candidate.ready:
            old, self.serving, self.candidate = self.serving, candidate, None
            self._log.say(f"generation {candidate.want.generation} serves")
            for relay in self.relays.values():
                relay.changed()
            if old is not None:
                old.drain()
                self.draining.append(old)
        elif reason := candidate.hopeless or candidate.late:
            self._log.say(f"generation {candidate.want.generation} is given up: {reason}")
            self._failed = {"generation": candidate.want.generation, "reason": reason}
            self._discard()

    def _discard(self) -> None:
        """Nobody was sent to the candidate, so it needs no drain."""
        if self.candidate is not None:
            self.candidate.abandon()
            self.draining.append(self.candidate)
            self.candidate = None

    def _save(self) -> None:
        rolls = [r for r in (self.serving, self.candidate, *self.draining) if r is not None]
        if self.serving is not None:
            self._good = self.serving.want.as_json()
        roots = {roll.want.template["root"] for roll in rolls}
        if self.shipper.root:
            roots.add(self.shipper.root)
        state = {"good": self._good, "failed": self._failed, "roll": self._roll, "roots": sorted(roots)}
        if state != self._saved:
            with contextlib.suppress(OSError):  # a full disk: what runs goes on, and the next step tries again
                write_json("state.json", state)
                self._saved = state


def _kind(want: Desired) -> type[Replica]:
    """What a replica is here. Containers need a driver, so they are imported only where they are used."""
    if not want.template.get("engine"):
        return Replica
    from .contained import ContainerReplica

    return ContainerReplica
