"""What doctor makes of the figures of a service."""

from __future__ import annotations

from modelyard.cli.doctor import _unreadable
from modelyard.kernel.observe import UNREADABLE, metrics_text


def test_documents_that_cannot_be_read_are_told_of() -> None:
    UNREADABLE.labels("doctors-own", "plant").set(2)
    UNREADABLE.labels("doctors-own", "tree").set(0)
    rows = [row for row in _unreadable(lambda: metrics_text().decode()) if row["check"] == "documents of doctors-own"]
    assert [(row["ok"], row["found"]) for row in rows] == [(False, "2 of kind plant cannot be read")]
    assert "log" in rows[0]["fix"]
