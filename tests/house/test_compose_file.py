"""docker-compose.yml names what the rest of the tree has, opens nothing beyond loopback, and lets nobody be more than
it must."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.stack import compose, standins
from infra.stack.azurite import Azurite
from modelyard import __version__
from modelyard.node import ROOMS
from modelyard.settings import DEFAULT_SERVICES, Settings

ROOT = Path(__file__).parents[2]
FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = {*ROOMS, "stream"}


def test_every_service_is_in_it_on_its_own_port() -> None:
    assert set(SERVICES) >= OURS
    for name in OURS:
        port = DEFAULT_SERVICES[name].rpartition(":")[2]
        assert SERVICES[name]["command"] == ["serve", name]
        assert SERVICES[name]["environment"]["MODELYARD_PORT"].endswith(f":-{port}}}")
        assert f"{name}=http://127.0.0.1:${{" in SERVICES[name]["environment"]["MODELYARD_SERVICES"]


def test_versions_are_those_of_the_tree() -> None:
    assert SERVICES["registry"]["image"] == f"modelyard:${{YARD_VERSION:-{__version__}}}"
    assert SERVICES["azurite"]["image"].endswith(f":{Azurite.version}")
    assert SERVICES["azurite"]["build"]["args"]["AZURITE"] == Azurite.version
    assert f"ARG AZURITE={Azurite.version}" in (ROOT / "infra/compose/azurite/Dockerfile").read_text()
    published = {about["image"] for name, about in SERVICES.items() if "modelyard" not in about["image"]}
    assert published < set(standins.ALL), "what others publish can be stood in for"
    assert compose.VERSION.rpartition(".")[0] in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_listens_beyond_loopback_or_rises(name: str) -> None:
    about = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in about.get("ports", ()))
    assert "no-new-privileges:true" in about["security_opt"] and "privileged" not in about
    assert about["logging"]["options"]["max-size"]
    if name in OURS:
        assert about["cap_drop"] == ["ALL"] and about["read_only"] and "user" not in about and "cap_add" not in about


def test_its_settings_are_settings() -> None:
    for name in OURS:
        given = {key.removeprefix("MODELYARD_").lower() for key in SERVICES[name]["environment"] if "MODELYARD" in key}
        assert given <= set(Settings.model_fields)
    assert "USER 10001:10001" in (ROOT / "infra/docker/Dockerfile").read_text()
