"""A spool that cannot be written: calls are counted, the policy holds, and the deployment's log says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.scoring import notices
from tests.unit.test_capture_log import call, counted, frames, opened, until


@pytest.mark.parametrize("on_pressure", ["drop", "reject", "block"])
def test_a_spool_that_takes_nothing_is_pressure_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_pressure: str,
) -> None:
    monkeypatch.setattr(notices, "CALM_S", 0.1)
    (tmp_path / "file").write_text("in the way")
    with opened(tmp_path / "file" / "spool", on_pressure=on_pressure) as log:
        assert log.pressed == (on_pressure != "drop")
        log.append([call(1)])
        assert log.totals["write-failed"] == 1
        (tmp_path / "file").unlink()
        (tmp_path / "file" / "spool").mkdir(parents=True)
        told: list[str] = []
        until(lambda: (told.append(capsys.readouterr().err), "recorded again" in told[-1])[1])
        said = "".join(told)
        assert said.count("cannot be recorded") == said.count("recorded again") == 1 and "Not a directory" in said
        assert not log.pressed
        log.append([call(2)])
        assert log.totals["recorded"] == 1
    assert not capsys.readouterr().err
    assert counted(frames(tmp_path / "file" / "spool"))["iris:4", "OK", "write-failed"] == 1


def test_a_record_that_cannot_be_made_is_counted_whatever_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = call(1)
    wrong.latency_ns = 2**63  # more than a frame has room for
    with opened(tmp_path) as log:
        log.append([wrong, call(2)])
        log.append([call(3)])
        assert log.totals == {"recorded": 1, "collected": 0, "write-failed": 2}
    assert "cannot be recorded" in capsys.readouterr().err
    assert counted(frames(tmp_path))["iris:4", "OK", "write-failed"] == 2
