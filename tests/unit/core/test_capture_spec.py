"""The capture part of a deployment: what may be written, and that what an older writer left out has its default."""

from typing import Any

import pytest
from pydantic import ValidationError

from modelyard.core.specs import Capture
from modelyard.scoring.sampling import Sampler
from modelyard.scoring.settings import DEFAULT_CAPTURE

OLD = {"enabled": True, "sampling": 0.5, "on_pressure": "block", "retention_days": 7}


def test_what_an_older_writer_left_out_has_its_default() -> None:
    assert Capture.model_validate(OLD).model_dump() == {**DEFAULT_CAPTURE, **OLD}
    assert Capture().model_dump() == DEFAULT_CAPTURE, "a server without a policy does what one with the default does"


@pytest.mark.parametrize("key", ["prediction_id", "request_id", "trace_id", "input:customer", "input:x: y",
                                 "header:x-customer"])
def test_keys(key: str) -> None:
    assert Capture(sampling_key=key).sampling_key == key
    sampler = Sampler({"sampling": 0.5, "sampling_key": key})
    assert sampler.keyed is (key != "prediction_id")
    assert sampler.header == ("x-customer" if key.startswith("header:") else "")


@pytest.mark.parametrize("wrong", [
    {"sampling_key": "customer"}, {"sampling_key": "input:"}, {"sampling_key": "header:X-Customer"},
    {"sampling_key": "header:a b"}, {"sampling_key": "input:a\nb"}, {"redact": "name"}, {"redact": [""]},
    {"redact": [7]}, {"sync": "sometimes"}, {"spool_bytes": 1000}, {"sampling": 1.1}, {"redacted": []}])
def test_what_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Capture.model_validate(wrong, extra="forbid")  # as what a caller writes is read
