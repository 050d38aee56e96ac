"""From a URL to an opened adapter: the whole plugin system.

``sqlite:///var/yard.db?sync=full`` → scheme → module, imported only when asked for → adapter. The path of a file's URL
is absolute, a server's URL names its host; tuning lies in the query, and a word there that the adapter does not know is
refused.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from ..core.attest import PublicKey, public_keys
from ..core.errors import Invalid
from ..ports.blobs import BlobStore, CaptureGrants
from ..ports.builders import DockerfileBuilder
from ..ports.bus import EventBus
from ..ports.images import ImageStore
from ..ports.store import DocumentStore
from ..ports.targets import DeploymentTarget
from .store_late import LateStore

if TYPE_CHECKING:
    from .bus_kafka_stream import StreamKafka

MAX_URL = 4096
SECRET = re.compile(r"pass|secret|token|key|sig|cred", re.IGNORECASE)


@dataclass(frozen=True)
class Adapter:
    """Where the class behind a scheme lies, what ``pip`` must install for it, and the query words it knows."""

    module: str
    name: str
    extra: str | None = None
    options: Mapping[str, type] | None = None
    network: bool = False
    """Its URL names hosts: it is opened with the URL, less the query. Else with the path."""


SQLITE = {"sync": str, "busy_s": float}
MONGO = {"replicaSet": str, "authSource": str, "authMechanism": str, "tls": str, "tlsCAFile": str, "timeout_s": float,
         "pool": int}
KAFKA = {"partitions": int, "replication": int, "retention_days": float, "session_s": float, "instance": str,
         "security_protocol": str, "sasl_mechanism": str, "cafile": str}
STORES = {"sqlite": Adapter("store_sqlite", "SqliteStore", options=SQLITE),
          "mongodb": Adapter("store_mongo", "MongoStore", "mongo", MONGO, network=True)}
BUSES = {"sqlite": Adapter("bus_sqlite", "SqliteBus", options={**SQLITE, "retention_days": float}),
         "kafka": Adapter("bus_kafka", "KafkaBus", "kafka", KAFKA, network=True)}
AZURE = {"timeout_s": float}
STREAMS = {"kafka": Adapter("bus_kafka_stream", "StreamKafka", "faust", KAFKA, network=True)}
BLOBS = {"file": Adapter("blobs_dir", "DirBlobs"),
         "azure": Adapter("blobs_azure", "AzureBlobs", "azure", AZURE, network=True)}
GRANTS = {"file": Adapter("blobs_dir", "DirGrants"),
          "azure": Adapter("blobs_azure_grants", "AzureGrants", "azure", AZURE, network=True)}
IMAGES = {"oci-layout": Adapter("images_layout", "LayoutImages"),
          "oci": Adapter("images_registry", "RegistryImages", options={"tls": str, "timeout_s": float, "proxy": str},
                         network=True)}
SIGNED = {"require_signed": str}
"""What every target's URL may say: a file of the public keys that images must be signed by."""
BUILDS = {"dockerfiles": str, "build_memory_mib": float, "build_cpus": float, "build_s": float}
"""What a docker target's URL says for the image builder; the target itself does not look at it."""
ENGINE = {"network": str, "at_exit": str, **SIGNED, **BUILDS}
TARGETS = {"process": Adapter("targets_process", "ProcessTarget", options=SIGNED),
           "docker": Adapter("targets_docker", "DockerTarget", "docker", ENGINE, network=True)}
BUILDERS = {"docker": Adapter("builders_docker", "DockerBuilder", "docker", ENGINE, network=True)}


async def open_store(url: str, service: str) -> DocumentStore:
    """The documents of ``service``: ``sqlite:///PATH[?sync=full&busy_s=10]``,
    ``mongodb://[USER:PASSWORD@]HOST:PORT[,…]/DATABASE[?replicaSet=rs0]``."""
    class_, where = await asyncio.to_thread(_adapter, "store", url, STORES)  # drivers take long to import
    store: DocumentStore = await class_.open(where.place, service, **where.options)
    return store


async def open_store_late(url: str, service: str) -> DocumentStore:
    """As ``open_store``; a store on a server is opened when that answers, and Unavailable until then."""
    class_, where = _adapter("store", url, STORES)
    if not isinstance(where.place, str):
        return await open_store(url, service)
    return LateStore(lambda: class_.open(where.place, service, **where.options))


async def open_bus(url: str) -> EventBus:
    """``sqlite:///PATH[?sync=full&retention_days=14]``; the file may be the store's.
    ``kafka://[USER:PASSWORD@]HOST:PORT[,…][/PREFIX][?partitions=6]``."""
    class_, where = _adapter("bus", url, BUSES)
    bus: EventBus = await class_.open(where.place, **where.options)
    return bus


async def open_stream(bus_url: str) -> StreamKafka:
    """What the stream worker needs of the bus at ``bus_url``: only Kafka has it."""
    if not bus_url.startswith("kafka://"):
        raise Invalid("`modelyard serve stream` needs bus=kafka://HOST:PORT (MODELYARD_BUS): live windows come from "
                      f"Kafka, not from {mask(bus_url)}", field="bus")
    class_, where = _adapter("bus", bus_url, STREAMS)
    opened: StreamKafka = await class_.open(where.place, **where.options)
    return opened


async def open_blobs(url: str) -> BlobStore:
    """``file:///FOLDER``, ``azure://[ACCOUNT:KEY@]HOST[:PORT][/ACCOUNT]/CONTAINER``."""
    return await _plain("blobs", url, BLOBS)  # type: ignore[no-any-return]


async def open_grants(blobs_url: str) -> CaptureGrants:
    """What lends capture destinations inside the blob store at ``blobs_url``."""
    return await _plain("blobs", blobs_url, GRANTS)  # type: ignore[no-any-return]


async def open_images(url: str) -> ImageStore:
    """``oci-layout:///FOLDER``, ``oci://HOST:PORT[/PREFIX][?tls=off&timeout_s=30&proxy=off]``."""
    return await _plain("images", url, IMAGES)  # type: ignore[no-any-return]


async def open_target(name: str, url: str, *, images: ImageStore, data: Path, ends: bool = False) -> DeploymentTarget:
    """The deployment target ``name``: ``process://``, ``docker://[HOST:PORT][?network=bridge&at_exit=keep]`` (no host:
    the engine of this machine). ``?require_signed=FILE``: see ``signed_by`` of the port.
    ``ends``: closing it ends what it runs on this machine."""
    class_, where = _adapter(f"targets.{name}", url, TARGETS)
    file = where.options.pop("require_signed", None)
    where = Where(where.place, {word: value for word, value in where.options.items() if word not in BUILDS})
    keys = () if file is None else await asyncio.to_thread(_keys, f"targets.{name}", file)
    target: DeploymentTarget
    if isinstance(where.place, str):
        target = await class_.open(where.place, name, images, data, ends, **where.options)
    else:
        target = await asyncio.to_thread(class_, name, images, data, ends)
    target.signed_by = keys
    return target


async def open_builder(targets: Mapping[str, str], data: Path) -> DockerfileBuilder | None:
    """What builds the Dockerfiles that users bring: the engine of the first docker target whose URL lets it,
    ``docker://…?dockerfiles=NETWORK[&build_memory_mib=4096&build_cpus=2&build_s=1800]``. ``NETWORK`` is what their
    steps are in: ``none``, ``bridge`` or another of the engine's. None when no target says so."""
    for name, url in targets.items():
        if urlsplit(url).scheme in BUILDERS and "dockerfiles" in dict(
                parse_qsl(urlsplit(url).query, keep_blank_values=True)):
            class_, where = await asyncio.to_thread(_adapter, f"targets.{name}", url, BUILDERS)
            options = {word: value for word, value in where.options.items() if word in BUILDS}
            builder: DockerfileBuilder = await class_.open(where.place, data, **options)
            return builder
    return None


def _keys(setting: str, file: str) -> Sequence[PublicKey]:
    """An empty file must not mean that anything may run."""
    try:
        return public_keys(Path(file).expanduser().read_bytes(), f"{setting}: {file}")
    except OSError as exc:
        raise Invalid(f"{setting}: require_signed names {file}, which cannot be read: {exc.strerror or exc}",
                      field=setting) from exc


async def _plain(setting: str, url: str, table: Mapping[str, Adapter]) -> Any:
    class_, where = _adapter(setting, url, table)
    if isinstance(where.place, str):
        return await class_.open(where.place, **where.options)
    return await asyncio.to_thread(class_, where.place)


@dataclass(frozen=True)
class Where:
    """What a URL says, checked: a path on this machine, or the URL of a server without its query."""

    place: Path | str
    options: dict[str, Any]


def _adapter(setting: str, url: str, table: Mapping[str, Adapter]) -> tuple[Any, Where]:
    """The class for a URL and what the URL says. Raises Invalid, naming the setting and never a credential."""
    shown = mask(url)
    if len(url) > MAX_URL or any(ord(c) < 32 or ord(c) == 127 for c in url):
        raise Invalid(f"{setting}: a URL has at most {MAX_URL} characters and no control characters", field=setting)
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), max_num_fields=32)
    except ValueError as exc:
        raise Invalid(f"{setting}={shown} is not a URL", field=setting) from exc
    adapter = table.get(parts.scheme)
    if adapter is None:
        known = ", ".join(f"{scheme}://" for scheme in sorted(table))
        raise Invalid(f"{setting}={shown}: unknown scheme '{parts.scheme}'; known here: {known}", field=setting)
    options = _options(f"{setting}={shown}", pairs, adapter.options or {})
    if adapter.network:
        if not parts.netloc and table is not TARGETS and table is not BUILDERS:
            raise Invalid(f"{setting}={shown} names no host; write {parts.scheme}://HOST:PORT/…", field=setting)
        return _load(setting, adapter), Where(urlunsplit(parts._replace(query="", fragment="")), options)
    if parts.netloc not in ("", "localhost"):
        raise Invalid(f"{setting}={shown}: a path on this machine is needed, with three slashes: "
                      f"{parts.scheme}:///absolute/path", field=setting)
    if table is not TARGETS and parts.path in ("", "/"):
        raise Invalid(f"{setting}={shown} names no path; write {parts.scheme}:///absolute/path", field=setting)
    return _load(setting, adapter), Where(Path("/" + unquote(parts.path).lstrip("/")), options)


def on_server(url: str) -> bool:
    """Whether the URL does not name files of this machine: a server, or nothing that is known."""
    scheme = url.partition(":")[0]
    known = [table[scheme] for table in (STORES, BUSES, BLOBS, IMAGES, TARGETS) if scheme in table]
    return not known or any(adapter.network for adapter in known)


def _options(about: str, pairs: list[tuple[str, str]], known: Mapping[str, type]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, text in pairs:
        if name not in known:
            raise Invalid(f"{about}: unknown option '{name[:40]}'; known: {', '.join(sorted(known)) or 'none'}")
        if name in options:
            raise Invalid(f"{about}: option '{name}' is given twice")
        try:
            options[name] = known[name](text)
        except ValueError as exc:
            raise Invalid(f"{about}: option '{name}' must be a number") from exc
        if isinstance(options[name], int | float) and not 0 < options[name] < 1e6:
            raise Invalid(f"{about}: option '{name}' must be above 0 and below 1,000,000")
    return options


def _load(setting: str, adapter: Adapter) -> Any:
    try:
        module = importlib.import_module(f".{adapter.module}", __package__)
    except ImportError as exc:
        if adapter.extra is None:
            raise
        raise Invalid(f"{setting} needs a package that is not installed ({exc.name}); run "
                      f"pip install 'modelyard[{adapter.extra}]'", field=setting) from exc
    return getattr(module, adapter.name)


def mask(url: str) -> str:
    """The URL without user name, password, and query values that look like credentials: fit for errors and logs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    place = parts.netloc.rpartition("@")
    query = "&".join(
        f"{name}=***" if SECRET.search(name) and name not in SIGNED else item
        for item in parts.query.split("&") if item
        for name in [item.partition("=")[0]]
    )
    text = urlunsplit((parts.scheme, f"***@{place[2]}" if place[1] else parts.netloc, parts.path, query, ""))
    if parts.scheme and not parts.netloc and f"{parts.scheme}://" in url and "://" not in text:
        text = text.replace(f"{parts.scheme}:", f"{parts.scheme}://", 1)
    return text if len(text) <= 200 else text[:200] + "…"
