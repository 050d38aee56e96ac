"""One replica's life: read the image, listen, load the models, answer, and on SIGTERM leave without losing a call."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import sys
import time
from collections.abc import Callable

from ..core.errors import Invalid
from . import collect, garbage
from .admin import Admin
from .capture import CaptureLog
from .dataplane import DataPlane
from .image import Image
from .notices import say
from .otlp import Otlp, Plan
from .runners import CannotStart
from .settings import Settings
from .transport import CONNECTION_AGE_S, Transport
from .transport_direct import DirectTransport

CANNOT_START = 3
DRAIN_S = CONNECTION_AGE_S * 1.1 + 0.5
"""By then every connection of before the drain was told to end; their age is jittered by a tenth."""
QUIET_S = 1.0
"""Nobody called for so long: while draining, nobody is there."""
SWITCH_S = 0.001
"""User code that computes gives way to the event loop this often, so that health and refusals stay quick."""
ADMIN_S = 0.5
"""Whoever asks how we are is answered for so long after everybody else."""
LEAVE_S = 20.0
"""From the signal to the end of what is in flight; capture is flushed after it, within 25 s altogether."""


class Replica:
    """Everything of one process. ``run`` returns the exit status."""

    def __init__(self, settings: Settings, image: Image) -> None:
        self.settings, self.image = settings, image
        self.log = _open_log(settings, image)
        name = settings.deployment or settings.image.partition(":")[0] or "model"
        self.plane = DataPlane(name, settings.limits, self.log)
        self.admin = DirectTransport(settings.admin, self.plane, site=Admin(self.plane, self.drain, self.spread))
        self.transports: list[Transport] = [open_grpc(settings, self.plane), open_rest(settings, self.plane)]
        self.plane.otlp = _open_otlp(settings, self.plane)
        self._stop = asyncio.Event()
        self._draining_since = 0.0

    async def run(self) -> int:
        """Until a signal. Raises OSError when an address cannot be had, CannotStart when a model cannot."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            await self._start()
            await self._stop.wait()
            await self._leave(time.monotonic())
        finally:
            self._close()
        return 0

    async def _start(self) -> None:
        addresses = {"admin": await self.admin.start()}
        for transport in self.transports:
            addresses[transport.name] = f"{await transport.start()} ({transport.library})"
        say(f"listening: {', '.join(f'{k} {v}' for k, v in addresses.items())}; loading models")
        began = time.monotonic()
        load = asyncio.ensure_future(self.plane.load(self.image, self.settings.image_version))
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((load, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not load.done():
            load.cancel()
            return
        load.result()
        garbage.loaded(self._quiet)
        for transport in self.transports:
            await transport.loaded()
        say(f"ready after {time.monotonic() - began:.2f} s: {', '.join(self.plane.table.names)}")
        if self.plane.otlp is not None:
            self.plane.otlp.start()

    async def drain(self) -> None:
        """Not ready any more, but every call is answered; clients are led away. Repeating is fine."""
        if self._draining_since:
            return
        self._draining_since = time.monotonic()
        self.plane.drain()
        for transport in self.transports:
            await transport.drain()
        say("draining")

    async def spread(self) -> None:
        """Other replicas have come: callers find them when they connect anew."""
        for transport in self.transports:
            await transport.spread()

    async def _leave(self, asked: float) -> None:
        await self.drain()
        while not self._nobody_is_there():  # noqa: ASYNC110 - what is waited for is that nothing happens
            await asyncio.sleep(0.05)
        grace = max(LEAVE_S - (time.monotonic() - asked), 0.5)
        await asyncio.gather(*(transport.stop(grace) for transport in self.transports))
        if self.plane.otlp is not None:
            await self.plane.otlp.close()
        await self.admin.stop(ADMIN_S)

    def _nobody_is_there(self) -> bool:
        return self._quiet() or time.monotonic() - self._draining_since >= DRAIN_S

    def _quiet(self) -> bool:
        return self.plane.metrics.in_flight == 0 and time.monotonic() - self.plane.last_call >= QUIET_S

    def _close(self) -> None:
        self.plane.close()
        collect.bind(None)
        if self.log is not None:
            self.log.close()


def open_grpc(settings: Settings, plane: DataPlane) -> Transport:
    """The transport that ``--transport`` asks for; ``auto``: the fast one where it is installed. Raises Invalid."""
    there = importlib.util.find_spec("h2corn") is not None
    if settings.transport == "h2" and not there:
        raise Invalid("--transport h2 needs the package h2corn, which this image does not have; use --transport grpc")
    if settings.transport == "grpc" or not there:
        from .transport_grpc import GrpcTransport

        return GrpcTransport(settings.grpc, plane, settings.tls)
    from .transport_h2 import H2Transport

    return H2Transport(settings.grpc, plane, settings.tls)


def open_rest(settings: Settings, plane: DataPlane) -> Transport:
    """The fast one, which needs nothing more; with ``--transport grpc`` aiohttp alone."""
    if settings.transport == "grpc":
        from .transport_rest import RestTransport

        return RestTransport(settings.http, plane, settings.tls)
    return DirectTransport(settings.http, plane, settings.tls)


def _open_log(settings: Settings, image: Image) -> CaptureLog | None:
    if settings.spool is None:
        return None
    about = {"workspace": settings.workspace, "deployment": settings.deployment, "image": settings.image,
             "models": [model.id for model in image.models]}
    log = CaptureLog.open(settings.spool, settings.replica, about, settings.capture)
    collect.bind(log)
    return log


def _open_otlp(settings: Settings, plane: DataPlane) -> Otlp | None:
    """Raises Invalid."""
    wanted = Plan.read()
    if wanted is None:
        return None
    about = {"service.name": plane.deployment, "service.version": settings.image_version,
             "service.instance.id": settings.replica, "modelyard.image": settings.image,
             "modelyard.workspace": settings.workspace}
    made = Otlp(wanted, {name: value for name, value in about.items() if value}, plane.metrics, say)
    plane.metrics.gauge("modelyard_scoring_otlp", "Spans that a collector took and that it missed, and exports that "
                        "failed.", "what", lambda: made.totals)
    return made


async def _serve(settings: Settings) -> int:
    image = Image.read(settings.root)
    image.publish()
    return await Replica(settings, image).run()


def serve(settings: Settings) -> int:
    """Runs a replica; the exit status: 0 after a signal, 1 when it cannot listen, 3 when a model cannot start."""
    sys.setswitchinterval(SWITCH_S)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(settings))
    except CannotStart as exc:
        if exc.__cause__ is not None and exc.__cause__.__traceback__ is not None:
            import traceback

            traceback.print_exception(exc.__cause__)
        say(f"cannot start: {exc}")
        return CANNOT_START
    except OSError as exc:
        say(f"cannot start: {exc}")
        return 1


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None
