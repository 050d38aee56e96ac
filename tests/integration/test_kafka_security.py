"""Kafka with passwords, permissions and TLS: what the URL says is used, and what is refused is said in one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modelyard.adapters.urls import open_bus
from modelyard.core.errors import Unavailable
from modelyard.core.events import Envelope
from tests.backends import need
from tests.contract.bus_worker import event
from tests.integration.guarded import Guarded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    need("kafka")
    with Guarded(tmp_path_factory.mktemp("kafka")) as server:
        yield server


async def there_and_back(url: str) -> None:
    bus = await open_bus(url)
    await bus.check()
    await bus.publish(event(7))
    async with bus.subscribe("g", ["model.registered"]) as deliveries:
        assert Envelope.decode((await anext(deliveries)).raw).data["n"] == 7
    assert len((await bus.read([], "beginning"))[0]) == 1
    await bus.close()


async def test_the_urls_credentials_are_used(kafka: Guarded) -> None:
    await there_and_back(f"kafka://yard:p%40ss@127.0.0.1:{kafka.sasl}/open")


async def test_tls_with_an_authority_of_ones_own(kafka: Guarded) -> None:
    await there_and_back(f"kafka://yard:p%40ss@127.0.0.1:{kafka.tls}/tls?security_protocol=SASL_SSL"
                         f"&cafile={kafka.authority}")


async def refused(url: str, words: str) -> None:
    """Each way in says so in one line, shows no password, and a service that hears it goes on trying."""
    bus = await open_bus(url)

    async def subscribed() -> None:
        async with bus.subscribe("g", ["model.registered"]):
            pass

    for doing in (bus.check(), bus.publish(event(1)), subscribed(), bus.read([], "beginning")):
        with pytest.raises(Unavailable, match=words) as caught:
            await doing
        assert "\n" not in caught.value.message and "hunter2" not in caught.value.message
    await bus.close()


async def test_a_wrong_password_is_named(kafka: Guarded) -> None:
    await refused(f"kafka://yard:hunter2@127.0.0.1:{kafka.sasl}", "refuses the credentials; correct user, password")


async def test_a_missing_permission_is_named(kafka: Guarded) -> None:
    await refused(f"kafka://guest:guest@127.0.0.1:{kafka.sasl}", "does not permit it.*grant guest")


async def test_an_unknown_authority_is_named(kafka: Guarded) -> None:
    await refused(f"kafka://yard:p%40ss@127.0.0.1:{kafka.tls}?security_protocol=SASL_SSL",
                  "do not agree on TLS; set cafile=.*certificate verify failed")


async def test_a_password_where_none_is_asked_for_is_named(kafka: Guarded) -> None:
    await refused(f"kafka://yard:hunter2@127.0.0.1:{kafka.port}", "refuses the credentials")


async def test_no_password_where_one_is_asked_for_is_named(kafka: Guarded) -> None:
    await refused(f"kafka://127.0.0.1:{kafka.sasl}", "hangs up; if it asks for a password")
