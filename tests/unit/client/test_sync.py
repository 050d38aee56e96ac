"""The blocking side: the same methods, one thread, no loop left behind."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelyard import AsyncClient, AsyncScoringClient, Client, ScoringClient
from modelyard.client import faces, sync
from modelyard.client.capture import AsyncCapture, moment
from modelyard.client.dead import AsyncDeadLetters
from modelyard.client.deployments import AsyncDeployment, AsyncDeployments
from modelyard.client.faces import Portal
from modelyard.client.images import AsyncImage, AsyncImages
from modelyard.client.models import AsyncModel, AsyncModels
from modelyard.core.errors import Invalid, Unavailable

PAIRS = [
    (sync.Client, AsyncClient, {"http"}), (sync.Models, AsyncModels, set()), (sync.Model, AsyncModel, set()),
    (sync.Images, AsyncImages, {"settled"}), (sync.Image, AsyncImage, set()),
    (sync.Deployments, AsyncDeployments, {"settled", "close"}), (sync.Deployment, AsyncDeployment, set()),
    (ScoringClient, AsyncScoringClient, {"declared", "encoder", "headers", "many", "open"}),
    (sync.Capture, AsyncCapture, set()), (sync.DeadLetters, AsyncDeadLetters, set()),
]


@pytest.mark.parametrize(("face", "inner", "own"), PAIRS)
def test_every_method_has_its_blocking_side(face: type, inner: type, own: set[str]) -> None:
    wanted = {name for name, _ in inspect.getmembers(inner) if not name.startswith("_")} - own
    assert wanted <= {name for name, _ in inspect.getmembers(face)}
    undocumented = [name for name in wanted if not (getattr(face, name).__doc__ or "").strip()]
    assert undocumented == []


def test_close_leaves_no_thread_and_may_be_repeated() -> None:
    before = set(threading.enumerate())
    client = Client("http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="modelyard serve"):
        client.models.list()
    client.close()
    client.close()
    assert not set(threading.enumerate()) - before  # one of before may have ended
    with pytest.raises(RuntimeError, match="closed"):
        client.models.list()


def test_a_bad_url_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with pytest.raises(Invalid):
        Client("nonsense")
    assert not set(threading.enumerate()) - before  # one of before may have ended


def test_an_interrupt_that_was_swallowed_ends_the_wait() -> None:
    """Python drops a KeyboardInterrupt that falls into a weak reference's callback; the handler has noted it."""
    portal, ended = Portal(), threading.Event()

    async def endless() -> None:
        try:
            faces.INTERRUPTED.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    try:
        with pytest.raises(KeyboardInterrupt):
            portal.run(endless())
        assert ended.wait(5) and not faces.INTERRUPTED.is_set(), "cancelled over there, and told once"
    finally:
        portal.close()


def test_an_interrupt_before_the_wait_began_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may fall between handing a step over and holding what would cancel it."""
    hand_over, seen, portal = asyncio.run_coroutine_threadsafe, list[str](), Portal()

    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            seen.append("closed")

    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        hand_over(*args)
        raise KeyboardInterrupt

    def follow() -> None:
        items = portal.iterate(endless())
        next(items)
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        try:
            next(items)
        except KeyboardInterrupt:
            seen.append("interrupted")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    thread.join(10)
    assert seen == ["closed", "interrupted"]
    portal.close()


def test_moments() -> None:
    assert moment("2026-11-23T15:00:00+01:00") == "2026-11-23T14:00:00.000000Z"
    assert moment(None) is None
    with pytest.raises(Invalid, match="is not a time"):
        moment("yesterday")
