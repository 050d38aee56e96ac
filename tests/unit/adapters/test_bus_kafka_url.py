"""What a Kafka URL says, and what is said of one that is wrong; no broker is asked."""

from __future__ import annotations

import ssl

import pytest

from modelyard.adapters.bus_kafka_link import Link
from modelyard.adapters.bus_kafka_read import Place
from modelyard.adapters.urls import open_bus
from modelyard.core.errors import Invalid


async def test_hosts_prefix_and_credentials() -> None:
    link = await Link.of("kafka://me:p%40ss@one:9093,two,[::1]:9094/yard")
    assert link.hosts == ("one:9093", "two:9092", "[::1]:9094")
    assert (link.prefix, link.user, link.password) == ("yard", "me", "p@ss")
    assert (link.protocol, link.mechanism) == ("SASL_PLAINTEXT", "PLAIN")
    assert link.name("model.registered") == "yard.model.registered"
    assert "p@ss" not in repr(link)


async def test_without_a_path_topics_are_called_as_their_events() -> None:
    assert (await Link.of("kafka://one:9092")).name("model.registered") == "model.registered"


async def test_tls_uses_the_systems_authorities() -> None:
    link = await Link.of("kafka://one", "ssl")
    assert isinstance(link.tls, ssl.SSLContext)
    assert link.tls.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(("url", "word"), [
    ("kafka:///yard", "host"),
    ("kafka://:9092", "host"),
    ("kafka://one:abc", "HOST:PORT"),
    ("kafka://one,,two", "host"),
    ("kafka://one/a_b", "prefix"),
    ("kafka://one/a/b", "prefix"),
    ("kafka://one?partitions=x", "number"),
    ("kafka://one?partition=3", "partition"),
    ("kafka://one?security_protocol=TLS", "SASL_SSL"),
    ("kafka://one?sasl_mechanism=MD5", "SCRAM-SHA-512"),
    ("kafka://one?security_protocol=SASL_SSL", "USER:PASSWORD"),
    ("kafka://one?cafile=/does/not/exist", "cafile"),
    ("kafka://one?instance=a_b", "a_b"),
])
async def test_a_wrong_url_is_invalid_and_says_what_to_write(url: str, word: str) -> None:
    with pytest.raises(Invalid, match=word):
        await open_bus(url)


@pytest.mark.parametrize("url", ["kafka://me:hunter2@one:abc", "kafka://me:hunter2@one/a_b",
                                 "kafka://me:hunter2@one?nothing=1"])
async def test_no_message_shows_a_password(url: str) -> None:
    with pytest.raises(Invalid) as caught:
        await open_bus(url)
    assert "hunter2" not in caught.value.message


def test_a_cursor_is_text_that_a_url_leaves_as_it_is_and_reads_back() -> None:
    place = Place.parse("k1~image.built_0_12_3~model.registered_7")
    assert place.of("image.built", 3) == [0, 12, 3]
    assert place.of("model.registered", 3) == [7, 0, 0]
    assert place.of("model.deleted", 3) == [0, 0, 0]


@pytest.mark.parametrize("text", ["", "k2", "k1~", "k1~image.built", "k1~image.built_-1", "k1~image.built_1_",
                                  "k1~image.built_" + "9" * 40, "12"])
def test_other_text_is_no_cursor(text: str) -> None:
    with pytest.raises(Invalid):
        Place.parse(text)
