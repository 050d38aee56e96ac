"""Which proxy a call of ours goes through: what HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY say, as curl and uv
read them. They are looked at anew for each call, where a redirect leads as well."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping

from yarl import URL

from ..core.errors import Invalid

OFF = "off"
NAMED = "HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
NEAR = ("localhost", "127.0.0.1", "::1")
"""What no proxy leads to, in the words of NO_PROXY."""


def loopback(host: str) -> bool:
    """Whether ``HOST[:PORT]`` is this machine: there no TLS is expected, and no proxy in between."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    address = _address(name.strip("[]"))
    return name == "localhost" or (address is not None and address.is_loopback)


def through(url: URL, wanted: str = "") -> URL | None:
    """The proxy that a call to ``url`` goes through, as aiohttp takes it: credentials are in it. ``wanted`` goes before
    the environment: a proxy's URL, or ``off``. Invalid for what is no HTTP proxy."""
    if wanted == OFF:
        return None
    if not wanted:
        wanted = _set(f"{url.scheme}_proxy") or _set("all_proxy")
        if not wanted or loopback(url.raw_authority) or _without(url.host or "", url.port):
            return None
    return checked(wanted)


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """What another program needs besides to choose as ``through`` does: nothing, where no proxy is named."""
    if not any(environment.get(name) or environment.get(name.upper())
               for name in ("https_proxy", "http_proxy", "all_proxy")):
        return {}
    direct = ",".join(filter(None, [environment.get("no_proxy") or environment.get("NO_PROXY"), *NEAR]))
    return {"NO_PROXY": direct, "no_proxy": direct}


def checked(text: str) -> URL:
    """A proxy's URL; without a scheme it is ``http``."""
    try:
        proxy = URL(text if "://" in text else f"http://{text}")
        fits = proxy.scheme in ("http", "https") and bool(proxy.host)
    except ValueError:
        fits = False
    if not fits:  # the text may hold a password
        raise Invalid(f"a proxy is http://[USER:PASSWORD@]HOST:PORT; mend what {NAMED} say, or proxy= "
                      "in the URL of images")
    return proxy


def _set(name: str) -> str:
    return os.environ.get(name) or os.environ.get(name.upper()) or ""


def _without(host: str, port: int | None) -> bool:
    """Whether NO_PROXY holds the host: itself, a domain above it, its network; with a port, only that one."""
    address = _address(host)
    for entry in re.split(r"[\s,]+", _set("no_proxy").lower()):
        if entry == "*":
            return True
        name, _, only = entry.rpartition(":") if re.search(r"[^:]:\d+$|\]:\d+$", entry) else (entry, "", "")
        name = name.strip("[]").removeprefix("*").lstrip(".")
        if not name or (only and int(only) != port):
            continue
        if address is not None:
            try:
                if address in ipaddress.ip_network(name, strict=False):
                    return True
            except ValueError:
                continue
        elif host.lower() == name or host.lower().endswith("." + name):
            return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
