"""A node: settings → adapters → contexts → services → run, until it is told to stop.

    await run(load(), ["registry"])            # returns after SIGTERM or Ctrl-C; raises ModelyardError when it cannot
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import platform
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from .adapters import urls
from .adapters.store_late import LateStore
from .core.errors import Invalid, ModelyardError, Unavailable
from .kernel.folder import lock, prepare, service_token
from .kernel.forward import Peers
from .kernel.guard import Guard
from .kernel.idempotency import FORGET
from .kernel.observe import fields, setup_logging
from .kernel.run import Wakes, run_service
from .kernel.server import Hosted, Server, build
from .kernel.service import Context, Service
from .ports import Port
from .ports.bus import EventBus
from .ports.targets import DeploymentTarget
from .settings import DEFAULT_PORT, Settings

log = logging.getLogger(__name__)
P = TypeVar("P", bound=Port)
ROOMS = {"registry": ".registry", "image-builder": ".image_builder", "deployer": ".deployer", "telemetry": ".telemetry"}
"""Service → the room that declares it as ``SERVICE``."""
TARGETS_OF = "deployer"
OF_IMAGES = ("image-builder", TARGETS_OF)


def services(names: Sequence[str] = ()) -> list[Service]:
    """The declared services; all of them without names. Invalid for a name that is none."""
    if unknown := [n for n in names if n not in ROOMS]:
        raise Invalid(f"no service is called {', '.join(unknown)}; there are: {', '.join(ROOMS)}", field="service")
    wanted = dict.fromkeys(names) or ROOMS
    return [importlib.import_module(ROOMS[name], __package__).SERVICE for name in wanted]


def check_machine() -> None:
    """Invalid on a machine that replicas cannot run on."""
    system, machine = platform.system(), platform.machine().lower()
    if system != "Linux" or machine not in ("x86_64", "amd64", "aarch64", "arm64"):
        raise Invalid(f"`modelyard serve` runs on Linux on x86-64 or arm64, not on {system} {machine}; the SDK and "
                      "the command line work here against a server elsewhere (MODELYARD_URL)", code="machine")


@dataclass(frozen=True)
class Node:
    """The services of this process, opened and answering at ``url``; ``work`` is what runs in the background."""

    url: str
    server: Server
    parts: Parts

    @property
    def names(self) -> list[str]:
        """The services that run here."""
        return [h.service.name for h in self.parts.hosted]

    async def work(self) -> None:
        """Relays, consumers and loops, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for h in self.parts.hosted:
                service = replace(h.service, loops=(*h.service.loops, FORGET))
                wakes = self.parts.wakes[h.service.name]
                group.create_task(run_service(h.context, service, self.parts.bus, wakes))


@dataclass(frozen=True)
class Parts:
    """What a node is made of: opened adapters, and the services with their contexts."""

    bus: EventBus
    targets: dict[str, DeploymentTarget]
    hosted: list[Hosted]
    wakes: dict[str, Wakes]


@asynccontextmanager
async def opened(settings: Settings, names: Sequence[str] = ()) -> AsyncIterator[Node]:
    """A node that listens; leaving closes everything. Its background work is the caller's to run (``Node.work``)."""
    wanted, house = await asyncio.to_thread(services, names), await asyncio.to_thread(services)
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(prepare, settings.data)
        for service in wanted:
            stack.callback(os.close, await asyncio.to_thread(lock, settings.data, service.name))
        token = settings.service_token.get_secret_value() if settings.service_token else \
            await asyncio.to_thread(service_token, settings.data)
        if settings.service_token is None and len(wanted) < len(house) and urls.on_server(settings.store):
            log.warning("MODELYARD_SERVICE_TOKEN is not set: services refuse each other unless all of them use the "
                        "data folder %s; give every one of them the same token", settings.data)
        guard = Guard(_hosts(settings), token=await asyncio.to_thread(settings.secret), service_token=token)
        peers = Peers(settings.services, token)
        stack.push_async_callback(peers.close)
        parts = await _open(stack, settings, wanted, peers)
        needed: dict[str, Port] = {f"store of {h.service.name}": h.context.store for h in parts.hosted}
        for port in needed.values():
            await _there(port)
        server = Server(build(parts.hosted, house, bus=parts.bus, peers=peers, guard=guard, needed=needed,
                              wanted=_elsewhere(settings, parts.hosted)))
        stack.push_async_callback(server.stop)
        number = await server.start(settings.host, _port(settings, wanted, house))
        url = f"http://{_address(settings.host)}:{number}"
        peers.urls.update({s.name: url for s in wanted})
        yield Node(url, server, parts)


def _elsewhere(settings: Settings, hosted: Sequence[Hosted]) -> dict[str, Port]:
    """What lies on servers beside the store and the bus, as far as these services use it."""
    ports: dict[str, Port] = {}
    if urls.on_server(settings.blobs):
        ports["blobs"] = hosted[0].context.blobs
    if urls.on_server(settings.images) and any(h.service.name in OF_IMAGES for h in hosted):
        ports["images"] = hosted[0].context.images
    return ports


async def _there(store: Port) -> None:
    """A file that cannot be used is told at once. A server that does not answer is waited for: this node answers
    meanwhile, `/readyz` says what is missing, and nothing has to be started again."""
    try:
        await store.check()
    except Unavailable as exc:
        if not isinstance(store, LateStore):
            raise
        log.warning("not ready, and waiting: %s", exc)


async def _open(stack: AsyncExitStack, settings: Settings, wanted: Sequence[Service], peers: Peers) -> Parts:
    def keep(port: P) -> P:
        stack.push_async_callback(port.close)
        return port

    bus = keep(await urls.open_bus(settings.bus))
    blobs = keep(await urls.open_blobs(settings.blobs))
    grants = keep(await urls.open_grants(settings.blobs))
    images = keep(await urls.open_images(settings.images))
    targets: dict[str, DeploymentTarget] = {}
    ends = {s.name for s in wanted} == ROOMS.keys()  # all-in-one: what runs on this machine ends with it
    if any(s.name == TARGETS_OF for s in wanted):
        for name, url in settings.targets.items():
            targets[name] = keep(await urls.open_target(name, url, images=images, data=settings.data, ends=ends))
    builds = any(s.name == OF_IMAGES[0] for s in wanted)
    if builder := await urls.open_builder(settings.targets, settings.data) if builds else None:
        keep(builder)
    hosted, wakes = [], {}
    for service in wanted:
        store = keep(await urls.open_store_late(settings.store, service.name))
        wakes[service.name] = Wakes()
        hosted.append(Hosted(service, Context(
            service=service.name, store=store, blobs=blobs, images=images, grants=grants, targets=targets,
            peers=peers, data=settings.data, wake=wakes[service.name].wake, open_images=urls.open_images,
            dockerfiles=builder)))
    return Parts(bus, targets, hosted, wakes)


LOOK_S = 12.0


@dataclass(frozen=True)
class Look:
    """One outside thing as it is found: ``trouble`` is "" when it answers, else what is wrong and what to do."""

    name: str
    url: str
    trouble: str


async def look(settings: Settings, servers_only: bool = False) -> list[Look]:
    """Opens everything that the settings name and asks whether it works, side by side, each for ``LOOK_S``."""

    async def at(name: str, url: str, opening: Callable[[], Awaitable[Port]]) -> Look:
        try:
            async with asyncio.timeout(LOOK_S):
                port = await opening()
                try:
                    await port.check()
                finally:
                    await port.close()
        except ModelyardError as exc:
            return Look(name, urls.mask(url), exc.message)
        except TimeoutError:
            return Look(name, urls.mask(url), f"no answer within {LOOK_S:g} s; is it reachable from here?")
        return Look(name, urls.mask(url), "")

    async def target(name: str, url: str) -> Port:
        images = await urls.open_images(settings.images)
        try:
            return await urls.open_target(name, url, images=images, data=settings.data)
        finally:
            await images.close()

    things: list[tuple[str, str, Callable[[], Awaitable[Port]]]] = [
        ("store", settings.store, lambda: urls.open_store(settings.store, "registry")),
        ("bus", settings.bus, lambda: urls.open_bus(settings.bus)),
        ("blobs", settings.blobs, lambda: urls.open_blobs(settings.blobs)),
        ("images", settings.images, lambda: urls.open_images(settings.images)),
        *((f"target {name}", url, partial(target, name, url)) for name, url in settings.targets.items())]
    return list(await asyncio.gather(*(at(*thing) for thing in things if urls.on_server(thing[1]) or not servers_only)))


async def collect(settings: Settings, *, older_s: float, dry: bool) -> list[dict[str, Any]]:
    """What of images nothing needs any more (``kind``, ``name``, ``size``), taken away unless ``dry``. The services may
    run meanwhile. A registry collects its own garbage: of it nothing is found."""
    from .adapters.images_layout import LayoutImages
    from .adapters.images_layout_gc import LayoutSweep
    from .image_builder.gc import Garbage

    if not await asyncio.to_thread((settings.data / "VERSION").is_file):
        raise Invalid(f"{settings.data} is not a data folder of Modelyard; name it with --data", field="data")
    async with AsyncExitStack() as stack:
        store = await urls.open_store(settings.store, "image-builder")
        stack.push_async_callback(store.close)
        images = await urls.open_images(settings.images)
        stack.push_async_callback(images.close)
        await images.check()
        broom = LayoutSweep(images) if isinstance(images, LayoutImages) else None
        found = await Garbage(store, images, broom, settings.data).collect(older_s=older_s, dry=dry)
    return [stray.document for stray in found]


def _port(settings: Settings, wanted: Sequence[Service], house: Sequence[Service]) -> int:
    """``--port``; else a single service's own from ``services``; else 8700."""
    if settings.port is not None:
        return settings.port
    if len(wanted) == 1 < len(house):
        return urlsplit(settings.services[wanted[0].name]).port or DEFAULT_PORT
    return DEFAULT_PORT


def _address(host: str) -> str:
    """How this process reaches itself when it listens on ``host``."""
    plain = host.strip("[]")
    known = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}
    return known.get(plain) or (f"[{plain}]" if ":" in plain else plain)


def _hosts(settings: Settings) -> set[str]:
    """Host names to answer to: those allowed, the one listened on, and how services call each other."""
    called = {urlsplit(url).hostname or "" for url in settings.services.values()}
    listened = _address(settings.host)
    return {*settings.allowed_hosts, *called, listened} - {""}


async def run(settings: Settings, names: Sequence[str] = (), *,
              ready: Callable[[str, list[str]], None] | None = None) -> None:
    """Runs services until SIGTERM or Ctrl-C, then drains; a second Ctrl-C ends at once. No names: all of them.

    ``ready`` is told the URL and the services once requests are answered. All-in-one, replicas are stopped at the
    end; apart they go on serving and are adopted again. Raises Invalid, Conflict or Unavailable, saying what to do.
    """
    check_machine()
    setup_logging(settings.log_level)
    stop = _stop_signals()
    async with opened(settings, names) as node:
        log.info("answering", extra=fields(url=node.url, services=node.names))
        if ready is not None:
            ready(node.url, node.names)
        work, told = asyncio.create_task(node.work()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping")
            await node.server.stop()
        finally:
            broken = work.done() and not work.cancelled()
            for task in (work, told):
                task.cancel()
            await asyncio.gather(work, told, return_exceptions=True)
        if broken:
            work.result()
    log.info("stopped")


def _stop_signals() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; the second SIGINT ends the process there and then."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupt() -> None:
        if stop.is_set():
            print("stopped at once; replicas may go on running", file=sys.stderr, flush=True)
            os._exit(130)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    return stop
