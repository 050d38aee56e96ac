"""Settings: flags > ``MODELYARD_*`` > ``modelyard.toml`` > embedded defaults. Read once, by the programs' entries.

    settings = load(port=9000)                 # what a flag gave; None means that it was not given
    settings.bus                               # 'sqlite:///home/me/.modelyard/yard.db'
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from .core.errors import Invalid

PREFIX = "MODELYARD_"
DEFAULT_PORT = 8700
DEFAULT_SERVICES = {
    "registry": "http://127.0.0.1:8701", "image-builder": "http://127.0.0.1:8702", "deployer": "http://127.0.0.1:8703",
    "edge-dispatcher": "http://127.0.0.1:8704", "telemetry": "http://127.0.0.1:8705",
    "stream": "http://127.0.0.1:8706",
}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
ELSEWHERE = frozenset({  # MODELYARD_* names that other programs of ours read
    "CONFIG", "URL", "REQUIRE", "OUTPUT", "DEPLOYMENT", "WORKSPACE", "IMAGE", "REPLICA", "CAPTURE", "LIMITS", "ROOT",
    "RESTARTED", "SPOOL_BYTES", "STUCK_S", "THREADS", "TRANSPORT",
})
LINK = re.compile(r"(^|_)(SERVICE_HOST|SERVICE_PORT\w*|PORT_[0-9]+_\w+)$|^\w+_PORT$")
"""What Kubernetes puts into a container for a service that is called ``modelyard…``: not settings."""
SECRETS = re.compile(
    r"(?i)([?&;](?!require_signed=)[^=&;]*(?:password|secret|token|key|sig)[^=&;]*=)[^&;]+")
"""Of a URL's query; a file of public keys is none."""
_file: ContextVar[Path | None] = ContextVar("modelyard_config", default=None)


def _pairs(value: Any) -> Any:
    """``a=b,c=d`` or JSON, as an environment variable gives it."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    return dict(_pair(part) for part in value.split(",") if part.strip())


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"'{text.strip()}' is not name=value; separate several by commas, or write JSON")
    return name.strip(), value.strip()


def _names(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


Map = Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs)]


def file_url(scheme: str, path: Path) -> str:
    """``sqlite`` and ``/data/yard.db`` → ``sqlite:///data/yard.db``."""
    return f"{scheme}://{quote(str(path))}"


class Settings(BaseSettings):
    """What a Modelyard server is told. Secrets come by environment or file, never by flag."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True,
                                      hide_input_in_errors=True)

    data: Path = Field(description="Folder that holds everything (mode 0700).")
    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback a token is needed.")
    port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="Port to listen on: 8700, or a single service's own from `services`.")
    store: str = Field(description="Documents: sqlite:///PATH or mongodb://HOST:PORT/DATABASE?replicaSet=NAME.")
    bus: str = Field(description="Events: sqlite:///PATH or kafka://HOST:PORT.")
    blobs: str = Field(description="Artifacts and capture: file:///FOLDER or azure://HOST/CONTAINER.")
    images: str = Field(description="Images: oci-layout:///FOLDER or oci://HOST:PORT/PREFIX.")
    targets: Map = Field({"local": "process://"}, description="Where deployments run: name=URL.")
    services: Map = Field(DEFAULT_SERVICES, description="Where the services are when they run apart: name=URL.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = Field(
        LOCAL_HOSTS, description="Host names that requests may be addressed to; `*` for any.")
    token: SecretStr | None = Field(None, description="Bearer token that callers must send.")
    token_file: Path | None = Field(None, description="File that holds the token.")
    service_token: SecretStr | None = Field(
        None, description="What services show each other; default: service.token in the data folder.")
    insecure: bool = Field(False, description="Listen beyond loopback without a token.")
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = Field(
        "info", description="debug, info, warning or error.")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _file.get())

    @model_validator(mode="before")
    @classmethod
    def _where_the_data_is(cls, given: dict[str, Any]) -> dict[str, Any]:
        data = Path(given.get("data") or "~/.modelyard").expanduser().absolute()
        return {
            "store": file_url("sqlite", data / "yard.db"), "bus": file_url("sqlite", data / "yard.db"),
            "blobs": file_url("file", data / "blobs"), "images": file_url("oci-layout", data / "images"),
            **given, "data": data,
        }

    @field_validator("port", mode="before")
    @classmethod
    def _not_a_link(cls, value: Any) -> Any:
        """Kubernetes sets MODELYARD_PORT=tcp://… beside a service that is called ``modelyard``."""
        return None if isinstance(value, str) and value.startswith("tcp://") else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("services")
    @classmethod
    def _known_services(cls, given: dict[str, str]) -> dict[str, str]:
        for name, url in given.items():
            if name not in DEFAULT_SERVICES:
                raise ValueError(f"'{name}' is no service; there are: {', '.join(DEFAULT_SERVICES)}")
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"'{url}' is not the URL of a service; write http://HOST:PORT")
        return {**DEFAULT_SERVICES, **given}

    @field_validator("store", "bus", "blobs", "images")
    @classmethod
    def _is_url(cls, url: str) -> str:
        if not re.match(r"^[a-z][a-z0-9+.\-]*://", url):
            raise ValueError(f"'{url}' is not a URL like sqlite:///PATH")
        return url

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if self.token is not None and self.token_file is not None:
            raise ValueError("give token or token_file, not both")
        if not loopback(self.host) and not self.insecure and self.token is None and self.token_file is None:
            raise ValueError(
                f"listening on {self.host} would open this yard to everybody who can reach it: set a token "
                f"({PREFIX}TOKEN or token_file), or say --insecure")
        return self

    def secret(self) -> str | None:
        """The bearer token, or None. Invalid when the file cannot be read or holds none."""
        if self.token_file is None:
            return self.token.get_secret_value() if self.token is not None else None
        try:
            token = self.token_file.expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise Invalid(f"token_file {self.token_file} cannot be read: {exc}") from exc
        if not token:
            raise Invalid(f"token_file {self.token_file} is empty")
        return token

    def masked(self) -> dict[str, Any]:
        """The effective values for printing: no secret in them, nor in their URLs."""
        shown = self.model_dump(mode="json")
        return {name: _mask(value) for name, value in shown.items()}

    def __repr__(self) -> str:
        return f"Settings({self.masked()})"

    __str__ = __repr__


def _mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _mask(v) for k, v in value.items()}
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        if parts.password is not None:
            netloc = f"{parts.username}:********@{parts.netloc.rpartition('@')[2]}"
            value = urlunsplit(parts._replace(netloc=netloc))
        return SECRETS.sub(r"\1********", value)
    return value


def loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def load(config: Path | str | None = None, **flags: Any) -> Settings:
    """The effective settings. ``config`` (or MODELYARD_CONFIG) names the file, default ``./modelyard.toml`` when it
    is there. Raises Invalid naming every problem: unknown keys and variables, values that do not fit."""
    named = config or os.environ.get(PREFIX + "CONFIG")
    file = Path(named).expanduser() if named else Path("modelyard.toml")
    if named and not file.is_file():
        raise Invalid(f"the settings file {file} is not there", field="config")
    _refuse_unknown(os.environ)
    if flags.keys() & {"token", "service_token"}:
        raise Invalid("a secret is not given by flag, where every process can read it: use the environment or a file")
    token = _file.set(file if file.is_file() else None)
    try:
        return Settings(**{k: v for k, v in flags.items() if v is not None})
    except ValidationError as exc:
        raise _told(exc) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        raise Invalid(f"the settings file {file} cannot be read: {exc}", field="config") from exc
    finally:
        _file.reset(token)


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    names = {name.removeprefix(PREFIX) for name in environ if name.startswith(PREFIX)}
    known = {name.upper() for name in Settings.model_fields} | ELSEWHERE
    unknown = sorted(n for n in names - known if not LINK.search(n) and not n.startswith("TEST_"))
    if unknown:
        raise Invalid("unknown settings in the environment: " + ", ".join(PREFIX + n for n in unknown), errors=[
            {"field": PREFIX + n, "message": f"not a setting; these are: {', '.join(sorted(Settings.model_fields))}"}
            for n in unknown])


def _told(exc: ValidationError) -> Invalid:
    errors = [{"field": ".".join(map(str, e["loc"])), "message": e["msg"].removeprefix("Value error, ")}
              for e in exc.errors()]
    for error in errors:
        if error["message"] == "Extra inputs are not permitted":
            error["message"] = f"not a setting; these are: {', '.join(sorted(Settings.model_fields))}"
    return Invalid("the settings are not valid: " + "; ".join(
        f"{e['field']}: {e['message']}" if e["field"] else e["message"] for e in errors), errors=errors)
