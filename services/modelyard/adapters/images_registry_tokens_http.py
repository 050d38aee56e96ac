"""What a registry lets us in with: the Authorization of each repository, got when it is asked for and kept while it is
good. Credentials go to the registry itself and to the token server that it names, and to nobody else."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from weakref import WeakValueDictionary

import aiohttp
from yarl import URL

from ..core.errors import Denied, Unavailable
from ..kernel.proxies import through
from .images_registry_errors_http import BROKEN, refused, said
from .images_registry_login import Login, login

EARLY_S = 10.0
"""A token is renewed so long before it lapses."""
BASIC_S = 3600.0
LARGEST = 1 << 20
SHORTEST = 4
"""Of a secret that is looked for in what others say."""
CHALLENGE = re.compile(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))')
Session = Callable[[], Awaitable[aiohttp.ClientSession]]


class Allowed:
    """Of one registry. ``origin`` is where it is, ``session`` the connection to it, ``proxy`` as in ``through``."""

    def __init__(self, host: str, origin: URL, session: Session, proxy: str = "") -> None:
        self._host, self._origin, self._session, self._proxy = host, origin, session, proxy
        self._values: dict[str, tuple[str, float]] = {}
        self._scopes: dict[str, dict[str, set[str]]] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._secrets: set[str] = set()

    def header(self, repo: str) -> str:
        """The Authorization to send now; "" for none."""
        value, until = self._values.get(repo, ("", 0.0))
        return value if time.monotonic() < until else ""

    def hide(self, text: str) -> str:
        """The text without any credential that was sent."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def renew(self, repo: str, denied: str, challenges: Sequence[str]) -> str:
        """After a 401 on ``denied``: another Authorization, as one of the challenges asks for; "" when we have none.
        Calls that are refused at the same moment ask for one together."""
        async with self._turns.setdefault(repo, asyncio.Lock()):
            if (now := self.header(repo)) not in ("", denied):
                return now
            known = await login(self._host)
            if known is not None:
                self._remember(known.password, known.identity, known.token,
                               known.basic.partition(" ")[2] if known.user else "")
            value, lasts = await self._asked(repo, known, [_challenge(text) for text in challenges])
            if value:
                self._values[repo] = value, time.monotonic() + lasts
            return value

    async def _asked(self, repo: str, known: Login | None,
                     challenges: Sequence[tuple[str, Mapping[str, str]]]) -> tuple[str, float]:
        if known is not None and known.token:
            return f"Bearer {known.token}", BASIC_S
        for scheme, given in sorted(challenges, key=lambda one: one[0] != "bearer"):
            if scheme == "bearer" and "realm" in given:
                return await self._token(repo, given, known)
            if scheme == "basic" and known is not None and known.user:
                return known.basic, BASIC_S
        return "", 0.0

    def _widened(self, repo: str, scopes: str) -> list[str]:
        """All that was ever asked for here: a token that allows less would shut out who needed more a moment ago."""
        held = self._scopes.setdefault(repo, {})
        for scope in scopes.split():
            what, _, actions = scope.rpartition(":")
            held.setdefault(what, set()).update(actions.split(","))
        return [f"{what}:{','.join(sorted(actions))}" for what, actions in sorted(held.items())]

    async def _token(self, repo: str, given: Mapping[str, str], known: Login | None) -> tuple[str, float]:
        """A token of the server that the registry names, and for how many seconds it is good."""
        realm = URL(given["realm"])
        if realm.scheme != "https" and self._origin.scheme == "https":
            raise Denied(f"the registry {self._host} names a token server without TLS ({realm.host}): it gets no "
                         "credentials of ours")
        session, service = await self._session(), given.get("service", "")
        scopes = self._widened(repo, given.get("scope", ""))
        try:
            if known is not None and known.identity:
                form = {"grant_type": "refresh_token", "service": service, "scope": " ".join(scopes),
                        "client_id": "modelyard", "refresh_token": known.identity}
                call = session.post(realm, data=form, allow_redirects=False,  # the form would go along, wherever to
                                    proxy=through(realm, self._proxy))
            else:
                query = [("service", service)] if service else []
                headers = {"Authorization": known.basic} if known is not None and known.user else {}
                call = session.get(realm.extend_query(query + [("scope", s) for s in scopes]), headers=headers,
                                   proxy=through(realm, self._proxy))
            async with call as answer:
                status, headers, body = answer.status, dict(answer.headers), await _read(answer)
        except BROKEN as exc:
            raise Unavailable(f"the token server {realm.host} of {self._host} does not answer ({type(exc).__name__})"
                              ) from exc
        if status != 200:
            self._scopes.pop(repo, None)  # something in it may be more than we may have
            raise refused(self._host, f"the token server {realm.host}", status, headers, self.hide(said(body)))
        try:
            found = json.loads(body)
            token = str(found.get("token") or found["access_token"])
            self._remember(token)
            return f"Bearer {token}", max(float(found.get("expires_in") or 60) - EARLY_S, 1.0)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise Unavailable(f"the token server {realm.host} of {self._host} gave no token") from exc

    def _remember(self, *secrets: str) -> None:
        if len(self._secrets) > 1000:
            self._secrets.clear()
        self._secrets.update(secret for secret in secrets if len(secret) >= SHORTEST)


def _challenge(text: str) -> tuple[str, dict[str, str]]:
    scheme, _, rest = text.strip().partition(" ")
    return scheme.lower(), {name.lower(): quoted or bare for name, quoted, bare in CHALLENGE.findall(rest)}


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > LARGEST:
            break
    return body
