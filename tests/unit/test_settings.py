"""Settings: who beats whom, what is refused, what is never shown."""

import json
from pathlib import Path

import pytest

from modelyard.core.errors import Invalid
from modelyard.settings import DEFAULT_SERVICES, Settings, load, loopback


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [n for n in os.environ if n.startswith("MODELYARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def refused(**flags: object) -> Invalid:
    with pytest.raises(Invalid) as caught:
        load(**flags)  # type: ignore[arg-type]
    return caught.value


def test_embedded_defaults(tmp_path: Path) -> None:
    settings = load()
    data = tmp_path / "home" / ".modelyard"
    assert settings.data == data and not data.exists()
    assert settings.store == settings.bus == f"sqlite://{data}/yard.db"
    assert (settings.blobs, settings.images) == (f"file://{data}/blobs", f"oci-layout://{data}/images")
    assert (settings.host, settings.port, settings.targets) == ("127.0.0.1", None, {"local": "process://"})
    assert settings.services == DEFAULT_SERVICES and settings.services["telemetry"] == "http://127.0.0.1:8705"
    assert len(Settings.model_fields) <= 15
    assert all(field.description for field in Settings.model_fields.values())


def test_flags_beat_the_environment_beats_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "modelyard.toml").write_text('port = 1\nhost = "127.0.0.2"\nlog_level = "error"\n')
    monkeypatch.setenv("MODELYARD_PORT", "2")
    monkeypatch.setenv("MODELYARD_LOG_LEVEL", "WARNING")
    settings = load(port=3, host=None)
    assert (settings.port, settings.log_level, settings.host) == (3, "warning", "127.0.0.2")
    assert load().port == 2
    monkeypatch.setenv("MODELYARD_PORT", "")  # empty is not given
    assert load().port == 1


def test_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("port = 11\n[targets]\nedge = \"process://\"\n")
    (tmp_path / "b.toml").write_text("port = 12\n")
    monkeypatch.setenv("MODELYARD_CONFIG", str(tmp_path / "a.toml"))
    assert load().port == 11 and load().targets == {"edge": "process://"}
    assert load(tmp_path / "b.toml").port == 12
    assert "c.toml is not there" in refused(config="c.toml").message


def test_the_data_folder_moves_everything(tmp_path: Path) -> None:
    settings = load(data=Path("rel/a b"), blobs="file:///elsewhere")
    assert settings.data == tmp_path / "rel" / "a b"
    assert settings.store == f"sqlite://{tmp_path}/rel/a%20b/yard.db" and settings.blobs == "file:///elsewhere"


@pytest.mark.parametrize("text", ['{"registry": "http://a:1"}', "registry=http://a:1", " registry = http://a:1 , "])
def test_maps_as_json_or_pairs(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MODELYARD_SERVICES", text)
    monkeypatch.setenv("MODELYARD_ALLOWED_HOSTS", "yard.example, localhost")
    settings = load()
    assert settings.services == {**DEFAULT_SERVICES, "registry": "http://a:1"}
    assert settings.allowed_hosts == ("yard.example", "localhost")


def test_unknown_keys_are_refused_wherever_they_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "modelyard.toml").write_text("prot = 1\n")
    error = refused()
    assert [e["field"] for e in error.detail["errors"]] == ["prot"] and "port" in error.message
    (tmp_path / "modelyard.toml").unlink()
    monkeypatch.setenv("MODELYARD_PROT", "1")
    assert [e["field"] for e in refused().detail["errors"]] == ["MODELYARD_PROT"]
    monkeypatch.delenv("MODELYARD_PROT")
    assert refused(prot=1).detail["errors"][0]["field"] == "prot"


def test_names_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our other programs read, and what Kubernetes sets beside a service called ``modelyard``."""
    for name, value in {"URL": "http://x", "REQUIRE": "kafka", "PORT": "tcp://10.0.0.1:80", "SERVICE_HOST": "10.0.0.1",
                        "SERVICE_PORT_HTTP": "80", "PORT_80_TCP_ADDR": "10.0.0.1",
                        "REGISTRY_SERVICE_HOST": "10.0.0.2", "REGISTRY_PORT": "tcp://10.0.0.2:80"}.items():
        monkeypatch.setenv(f"MODELYARD_{name}", value)
    assert load().port is None


@pytest.mark.parametrize(("name", "value", "field"), [
    ("PORT", "ninety", "port"), ("PORT", "70000", "port"), ("PORT", "-1", "port"), ("STORE", "yard.db", "store"),
    ("BUS", "C:\\yard", "bus"), ("SERVICES", "registry", "services"), ("SERVICES", "cellar=http://a", "services"),
    ("SERVICES", "registry=ftp://a", "services"), ("SERVICES", "{", "services"), ("LOG_LEVEL", "loud", "log_level"),
    ("INSECURE", "perhaps", "insecure"),
])
def test_bad_values_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, field: str) -> None:
    monkeypatch.setenv(f"MODELYARD_{name}", value)
    assert [e["field"] for e in refused().detail["errors"]] == [field]


def test_every_problem_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_PORT", "x")
    monkeypatch.setenv("MODELYARD_LOG_LEVEL", "x")
    assert {e["field"] for e in refused(store="x").detail["errors"]} == {"port", "log_level", "store"}


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "modelyard.toml").write_text("port = \n")
    assert "modelyard.toml cannot be read" in refused().message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "yard.example", ""])
def test_beyond_loopback_only_with_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    assert "token" in refused(host=host).message and "--insecure" in refused(host=host).message
    assert load(host=host, insecure=True).insecure
    assert load(host=host, token_file=tmp_path / "t").host == host
    monkeypatch.setenv("MODELYARD_TOKEN", "sesame")
    assert load(host=host).secret() == "sesame"


def test_loopback() -> None:
    assert [loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost")] == [True] * 6


def test_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    assert load().secret() is None
    assert "cannot be read" in _no_secret(load(token_file=file))
    file.write_text("\n")
    assert "is empty" in _no_secret(load(token_file=file))
    file.write_text("sesame\n")
    assert load(token_file=file).secret() == "sesame"
    monkeypatch.setenv("MODELYARD_TOKEN", "sesame")
    assert "not both" in refused(token_file=file).message
    assert "flag" in refused(token="x").message


def _no_secret(settings: Settings) -> str:
    with pytest.raises(Invalid) as caught:
        settings.secret()
    return caught.value.message


def test_nothing_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_TOKEN", "s3same")
    monkeypatch.setenv("MODELYARD_SERVICE_TOKEN", "s3same")
    settings = load(store="mongodb://me:s3same@db:27017/yard?authToken=s3same&w=1", targets={
        "k8s": "kubernetes://?token=s3same&context=c"})
    shown = json.dumps(settings.masked())
    assert "s3same" not in shown and "s3same" not in repr(settings) and "********" in shown
    assert "db:27017" in shown and "w=1" in shown and "context=c" in shown
    monkeypatch.setenv("MODELYARD_PORT", "s3same")
    assert "s3same" not in str(refused()) + json.dumps(refused().detail)


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError):
        load().port = 1  # type: ignore[misc]
