"""From URL to adapter: what opens, what is refused, and that no credential is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.adapters import urls
from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.bus_sqlite import SqliteBus
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.core.errors import Invalid, Unavailable


async def test_each_scheme_opens_its_adapter(tmp_path: Path) -> None:
    store = await urls.open_store(f"sqlite://{tmp_path}/yard.db?sync=full&busy_s=2", "registry")
    bus = await urls.open_bus(f"sqlite://{tmp_path}/yard.db?retention_days=0.5")
    assert isinstance(store, SqliteStore) and isinstance(bus, SqliteBus)
    assert isinstance(await urls.open_blobs(f"file://{tmp_path}/blobs"), DirBlobs)
    assert isinstance(await urls.open_grants(f"file://{tmp_path}/blobs"), DirGrants)
    assert isinstance(await urls.open_images(f"oci-layout://{tmp_path}/images"), LayoutImages)
    await store.close()
    await bus.close()
    assert (tmp_path / "yard.db").exists()


async def test_a_path_may_be_quoted_and_have_four_slashes(tmp_path: Path) -> None:
    for url in (f"sqlite://{tmp_path}/my%20yard.db", f"sqlite:///{tmp_path}/my%20yard.db"):
        await (await urls.open_store(url, "registry")).close()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".db"] == ["my yard.db"]


@pytest.mark.parametrize(("url", "words"), [
    ("mysql://host/db", "known here: mongodb://, sqlite://"),
    ("yard.db", "unknown scheme"),
    ("", "unknown scheme"),
    ("sqlite://relative/yard.db", "three slashes"),
    ("sqlite://", "names no path"),
    ("sqlite:///", "names no path"),
    ("sqlite:///x.db?sync=sometimes", "sync=normal or sync=full"),
    ("sqlite:///x.db?sink=full", "unknown option 'sink'; known: busy_s, sync"),
    ("sqlite:///x.db?sync=full&sync=full", "given twice"),
    ("sqlite:///x.db?busy_s=soon", "must be a number"),
    ("sqlite:///x.db?busy_s=nan", "must be above 0"),
    ("sqlite:///x.db?busy_s=-1", "must be above 0"),
    ("sqlite:///x.db?sync", "is not a URL"),
    ("sqlite:///x.db?" + "&".join(f"a{n}=1" for n in range(50)), "is not a URL"),
    ("sqlite:///" + "x" * 5000, "at most 4096"),
    ("sqlite:///x\n.db", "control characters"),
    ("sqlite://[::1/x.db", "is not a URL"),
])
async def test_a_url_that_says_nothing_sensible_is_refused(url: str, words: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Invalid) as caught:
        await urls.open_store(url.replace("/x.db", f"{tmp_path}/x.db"), "registry")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", [
    pytest.param("mongodb://user:hunter2@host/db", marks=pytest.mark.slow),  # it is waited for
    "sqlite://user:hunter2@host/x.db", "sqlite:///x.db?password=hunter2",
    "kafka://host?sasl_password=hunter2&x=1", "azure://account/c?sig=hunter2", "sqlite:///x.db?token=hunter2&token=hunter2",
    "http://hunter2@[::1", "sqlite:///x.db?Secret=hunter2\n",
])
async def test_no_error_shows_a_credential(url: str) -> None:
    for opening in (urls.open_store(url, "registry"), urls.open_bus(url), urls.open_blobs(url), urls.open_images(url)):
        with pytest.raises((Invalid, Unavailable)) as caught:
            await opening
        assert "hunter2" not in str(caught.value) and "hunter2" not in repr(caught.value.detail)
    assert "hunter2" not in urls.mask(url)


@pytest.mark.parametrize(("url", "shown"), [
    ("sqlite:///a/b.db?sync=full", "sqlite:///a/b.db?sync=full"), ("process://", "process://"),
    ("kafka://host:9092", "kafka://host:9092"), ("mongodb://u:p@h:1/x?z=1", "mongodb://***@h:1/x?z=1"),
    ("kubernetes://?context=kind&token=t", "kubernetes://?context=kind&token=***"),
])
def test_what_is_no_secret_is_shown(url: str, shown: str) -> None:
    assert urls.mask(url) == shown


async def test_a_missing_extra_is_answered_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(urls.BUSES, "amqp", urls.Adapter("bus_amqp", "AmqpBus", extra="amqp"))
    with pytest.raises(Invalid, match=r"pip install 'modelyard\[amqp\]'"):
        await urls.open_bus("amqp:///x")


@pytest.mark.parametrize(("url", "told"), [
    ("docker://?dockerfiles=", "dockerfiles is none"), ("docker://?dockerfiles=a+b", "dockerfiles is none"),
    ("docker://?dockerfiles=none&build_s=0", "above 0"), ("docker://?dockerfiles=none&build_cpus=many", "number"),
    ("docker://?dockerfiles=none&colour=red", "unknown option"),
    ("docker://10.0.0.1:2375?dockerfiles=none", "another machine"),
])
async def test_a_builder_that_cannot_be_meant(url: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid) as caught:
        await urls.open_builder({"docker": url}, tmp_path)
    assert told in caught.value.message


async def test_a_docker_target_builds_dockerfiles_only_where_its_url_says_so(tmp_path: Path) -> None:
    assert await urls.open_builder({"local": "process://", "docker": "docker://?network=none"}, tmp_path) is None
    builder = await urls.open_builder({"a": "docker://", "b": f"docker://{tmp_path}/x.sock?dockerfiles=none"}, tmp_path)
    assert builder is not None
    await builder.close()
