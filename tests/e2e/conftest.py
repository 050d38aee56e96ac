"""One yard per profile and test file; at its end nothing of it may be left running."""

from collections.abc import Iterator

import pytest

from tests.e2e.yard import PROFILES, Yard


@pytest.fixture(scope="module", params=PROFILES)
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    yard = Yard.start(request.param, tmp_path_factory.mktemp(request.param) / "data")
    try:
        yield yard
    finally:
        # Apart, the deployer leaves replicas running by design, for the next deployer to adopt: remove them first.
        for item in yard.call("GET", "/v1/deployments").json["items"] if request.param != "all-in-one" else ():
            yard.call("DELETE", f"/v1/deployments/{item['name']}?wait=30")
        left = yard.stop()
    assert left == [], {name: yard.log(name)[-2000:] for name in yard.processes}
