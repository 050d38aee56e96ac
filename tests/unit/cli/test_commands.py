"""The command line against a real yard: what it prints, how it ends, where its errors go."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow  # real programs are started and stopped

SCORE = "def run(data):\n    return data\n"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.json"
    path.write_text("[1, 2, 3]")
    return path


def fails(yard: Yard, *args: str, code: int = 1) -> str:
    """Runs a command that must fail so; stdout stays empty, stderr is for people."""
    done = yard.cli(*args, check=False)
    assert (done.returncode, done.stdout) == (code, ""), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_models_from_register_to_delete(live: Yard, weights: Path) -> None:
    done = live.cli("models", "register", "walk", str(weights), "--tag", "team=flora", "--property", "p=1",
                    "-o", "json")
    model = json.loads(done.stdout)
    assert (model["id"], model["tags"], model["properties"]) == ("walk:1", {"team": "flora"}, {"p": "1"})
    assert "registered walk:1" in done.stderr and "\x1b" not in done.stderr, "plain lines in a pipe"
    assert "x=y" in live.cli("models", "tag", "walk:1", "x=y", "team-").stdout
    assert json.loads(live.cli("models", "list", "--tag", "x=y", "-o", "json").stdout)[0]["tags"] == {"x": "y"}
    table = live.cli("models", "list", "--name", "walk").stdout.splitlines()
    assert table[0].split()[:2] == ["ID", "FRAMEWORK"] and table[1].startswith("walk:1 ")
    assert live.cli("models", "alias", "walk:1", "champion").stdout == "walk@champion is walk:1\n"
    assert yaml.safe_load(live.cli("models", "show", "walk@champion", "-o", "yaml").stdout)["kind"] == "Model"
    told = fails(live, "models", "delete", "walk:1")
    assert told.startswith("error: ") and "alias" in told
    live.cli("models", "unalias", "walk", "champion")
    to = weights.parent / "home"
    assert live.cli("models", "download", "walk:1", "--to", str(to)).stdout == f"{to / 'weights.json'}\n"
    assert "is there already" in fails(live, "models", "download", "walk:1", "--to", str(to))
    assert live.cli("models", "delete", "walk:1").stdout == "walk:1 is gone\n"
    assert fails(live, "models", "show", "walk:1").startswith("error: ")


def test_any_field_of_a_deployment_by_its_path(live: Yard, tmp_path: Path) -> None:
    """Set when it is made and changed later, the rest kept; what cannot be is told before or by the yard."""
    (tmp_path / "score.py").write_text(SCORE)
    live.cli("images", "build", "fields", "--score", str(tmp_path / "score.py"))
    made = json.loads(live.cli("deployments", "create", "fields", "-i", "fields:1", "--sampling", "0.5", "--set",
                               "capture.redact=[name, card]", "--set", "limits.max_queue=9", "-o", "json").stdout)
    assert (made["capture"]["redact"], made["capture"]["sampling"], made["limits"]["max_queue"]) == (
        ["name", "card"], 0.5, 9)
    try:
        changed = json.loads(live.cli("deployments", "update", "fields", "--set", "capture.on_pressure=block", "--set",
                                      "limits.max_batch_rows=8", "-o", "json").stdout)
        assert changed["capture"] == {**made["capture"], "on_pressure": "block"}
        assert changed["limits"] == {**made["limits"], "max_batch_rows": 8}
        small = fails(live, "deployments", "update", "fields", "--set", "limits.max_queue=0")
        assert "greater than or equal to 1" in small
        for wrong, told in (("max_queue=9", "no field 'max_queue'"), ("limits.max_queue", "needs FIELD=VALUE"),
                            ("limits.max_queue=[", "no value in YAML")):
            assert told in fails(live, "deployments", "update", "fields", "--set", wrong, code=2)
        assert "given already" in fails(live, "deployments", "update", "fields", "--timeout-ms", "9", "--set",
                                        "limits.timeout_ms=8", code=2)
    finally:
        live.cli("deployments", "delete", "fields")


def test_every_problem_and_what_to_do(live: Yard, weights: Path) -> None:
    told = fails(live, "models", "register", "bad name", str(weights))
    assert "a model name is 1-255 letters" in told
    told = fails(live, "deploy", str(weights), "--name", "x1x")
    assert "cannot be served alone" in told and ".onnx" in told
    pickle = weights.with_name("model.joblib")
    pickle.write_bytes(b"\x80\x04.")
    assert "--trust" in fails(live, "deploy", str(pickle), "--name", "x1x")
    assert "there is no score.py" in fails(live, "deploy", str(weights.parent), "--name", "x1x")


def test_a_yard_that_is_not_there(live: Yard) -> None:
    env = {**live.env, "MODELYARD_URL": "http://127.0.0.1:1"}
    for args in (["models", "list"], ["events", "tail"], ["doctor"], ["deployments", "log", "x"]):
        done = subprocess.run([sys.executable, "-m", "modelyard", *args], env=env, capture_output=True, text=True)
        assert done.returncode == 1 and "modelyard serve" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_doctor_and_config(live: Yard) -> None:
    rows = json.loads(live.cli("doctor", "-o", "json").stdout)
    assert {r["check"]: r["ok"] for r in rows}.items() >= {
        "yard": True, "registry": True, "image-builder": True, "deployer": True, "telemetry": True, "events": True,
    }.items()
    shown = json.loads(live.cli("config", "--port", "9000", "-o", "json").stdout)
    assert shown["port"] == 9000 and shown["data"] == str(live.data)
    env = {**live.env, "MODELYARD_TOKEN": "hush-hush"}
    done = subprocess.run([sys.executable, "-m", "modelyard", "config"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "hush-hush" not in done.stdout and "token" in done.stdout


def test_apply_diff_and_dry_run(live: Yard, weights: Path) -> None:
    (weights.parent / "score.py").write_text(SCORE)
    (weights.parent / "lock.txt").write_text("")
    file = weights.parent / "yard.yaml"
    file.write_text("""
kind: Model
name: applied
path: weights.json
tags: {team: flora}
---
kind: Image
name: applied-image
models: [applied]
score: score.py
lock: lock.txt
""")
    dry = json.loads(live.cli("apply", "-f", str(file), "--dry-run", "-o", "json").stdout)
    assert [d["action"] for d in dry] == ["would be created", "would be created"]
    assert "+name: applied\n" in live.cli("diff", "-f", str(file)).stdout
    done = json.loads(live.cli("apply", "-f", str(file), "--wait", "-o", "json").stdout)
    assert [(d["id"], d["action"]) for d in done] == [("applied:1", "created"), ("applied-image:1", "created")]
    assert live.cli("diff", "-f", str(file)).stdout == ""
    again = live.cli("models", "show", "applied", "-o", "yaml").stdout + "---\n" + live.cli(
        "images", "show", "applied-image", "-o", "yaml").stdout
    file.write_text(again)
    done = json.loads(live.cli("apply", "-f", str(file), "-o", "json").stdout)
    assert [d["action"] for d in done] == ["unchanged", "unchanged"], "what show prints can be applied"
    file.write_text("kind: [")
    assert "is not YAML" in fails(live, "apply", "-f", str(file), code=2)


def test_events(live: Yard, weights: Path) -> None:
    live.cli("models", "register", "told", str(weights))
    events = json.loads(live.cli("events", "list", "--subject", "told:1", "-o", "json").stdout)
    assert [e["topic"] for e in events] == ["model.registered"]
    assert fails(live, "events", "list", "--type", "nonsense").startswith("error: no event has the type")
    tail = subprocess.Popen(
        [sys.executable, "-m", "modelyard", "events", "tail", "--after", events[0]["cursor"], "-o", "json"],
        env={**live.env, "MODELYARD_URL": live.url()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    assert tail.stdout is not None
    live.cli("models", "tag", "told:1", "a=b")
    assert json.loads(tail.stdout.readline())["topic"] == "model.updated"
    tail.send_signal(signal.SIGINT)
    _, err = tail.communicate(timeout=20)
    assert (tail.returncode, err) == (130, ""), "an interrupt ends it without a word"


def test_a_reader_that_goes_away_is_no_traceback(live: Yard) -> None:
    line = f"{sys.executable} -m modelyard models list -o json | true; {sys.executable} -m modelyard --help | true"
    done = subprocess.run(["bash", "-c", line], env={**live.env, "MODELYARD_URL": live.url()}, capture_output=True,
                          text=True)
    assert done.stderr == ""


def test_completion_knows_what_is_in_the_yard(live: Yard, weights: Path) -> None:
    live.cli("models", "register", "completed", str(weights))
    env = {**live.env, "MODELYARD_URL": live.url(), "_MODELYARD_COMPLETE": "complete_bash",
           "COMP_WORDS": "modelyard models show compl", "COMP_CWORD": "3"}
    program = str(Path(sys.executable).with_name("modelyard"))
    done = subprocess.run([program], env=env, capture_output=True, text=True)
    assert "completed:1" in done.stdout.split()


def test_serve_says_what_is_wrong_with_its_folder(live: Yard, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modelyard", "serve", "--data", str(live.data), "--port", "0"], env=os.environ,
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "already runs" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "modelyard", "serve", "--data", str(tmp_path), "--host", "0.0.0.0"], env=os.environ,
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "--insecure" in done.stderr


@pytest.mark.slow
def test_deploy_score_capture(live: Yard, tmp_path: Path) -> None:
    folder = tmp_path / "doubler"
    folder.mkdir()
    (folder / "score.py").write_text(
        "import json\nfrom pathlib import Path\nimport modelyard\nfrom factor import times\n\n"
        "def init():\n    global by\n    by = json.loads(Path(modelyard.model_path('doubler')).read_text())['by']\n\n"
        "def run(data):\n    return [times(x, by) for x in data['data']]\n")
    (folder / "factor.py").write_text("def times(x, by):\n    return x * by\n")
    (folder / "model.json").write_text('{"by": 2}')
    (folder / "README.md").write_text("not a part of it")
    done = live.cli("deploy", str(folder), "--name", "doubler")
    assert "modelyard score doubler" in done.stdout and "model doubler:1" in done.stderr
    assert live.cli("score", "doubler", "--data", '{"data": [1, 2.5]}').stdout == "[2, 5.0]\n"
    assert "error: " in fails(live, "score", "doubler", "--data", '{"data": 7}')
    again = live.cli("deploy", str(folder), "--name", "doubler")
    assert "model doubler:1 (as it was)" in again.stderr and "image doubler:1 (as it was)" in again.stderr

    def captured() -> Any:
        rows = json.loads(live.cli("capture", "show", "doubler", "-o", "json").stdout)
        return rows if len(rows) == 2 else None

    rows = until(captured, 30, every=0.5, why="both calls are captured")
    assert [r["status"] for r in rows] == ["OK", "INTERNAL"]
    file = tmp_path / "calls.csv"
    live.cli("capture", "export", "doubler", "--to", str(file))
    assert len(list(csv.DictReader(io.StringIO(file.read_text())))) == 2
    assert "complete: yes" in live.cli("capture", "verify", "doubler").stdout
    live.cli("deployments", "scale", "doubler", "2", "--wait")
    live.cli("deployments", "restart", "doubler", "--wait")
    history = json.loads(live.cli("deployments", "history", "doubler", "-o", "json").stdout)
    assert [h["generation"] for h in history] == [3, 2, 1]
    assert live.cli("deployments", "log", "doubler", "--tail", "5").stdout
    windows = json.loads(live.cli("telemetry", "doubler", "-o", "json").stdout)
    assert sum(w["requests"] for w in windows) == 2
    lines = tmp_path / "calls.jsonl"
    lines.write_text('{"data": [1]}\n\n[2, 2.5]\n')
    done = live.cli("score", "doubler", "--lines", str(lines))
    assert done.stdout == '{"output-0": [[2]]}\n{"output-0": [[4.0, 5.0]]}\n'
    lines.write_text('{"data": [1]}\n{"data": 7}\n[3]\n')
    partly = live.cli("score", "doubler", "--lines", str(lines), check=False)
    assert partly.returncode == 1 and "1 of 3 lines" in partly.stderr
    answers = [json.loads(line) for line in partly.stdout.splitlines()]
    assert [set(answer) for answer in answers] == [{"output-0"}, {"error"}, {"output-0"}]
    lines.write_text("[1]\nno json\n")
    broken = live.cli("score", "doubler", "--lines", str(lines), check=False)
    assert broken.returncode == 1 and "line 2 is not JSON" in broken.stderr and len(broken.stdout.splitlines()) == 1
    assert live.cli("deployments", "delete", "doubler").stdout == "doubler is gone\n"
    live.cli("images", "delete", "doubler:1")
    live.cli("models", "delete", "doubler:1")
