"""Usage, help and start-up: what needs no yard."""

import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from modelyard.cli.main import app

pytestmark = pytest.mark.slow  # real programs are started and stopped


@pytest.mark.parametrize("args", [
    ["frob"], ["models", "frob"], ["models", "register"], ["models", "register", "x", "/nowhere"],
    ["models", "list", "--output", "xml"], ["models", "list", "--limit", "0"], ["models", "tag", "x:1", "novalue"],
    ["deployments", "create", "x"], ["deployments", "update", "x"], ["deployments", "scale", "x", "0"],
    ["deployments", "scale", "x", "two"], ["score", "x", "--data", "{"], ["score", "x", "--data", "@/nowhere"],
    ["score", "x"], ["score", "x", "--data", "1", "--lines", "-"],
    ["apply", "-f", "/nowhere"], ["capture", "export", "x", "--to", "x.txt"], ["serve", "nonsense"],
    ["serve", "--port", "70000"],
])
def test_wrong_usage_ends_with_2(args: list[str]) -> None:
    done = CliRunner().invoke(app, args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Error" in done.stderr and "Try '" in done.stderr


@pytest.mark.parametrize("args", [
    [], ["models"], ["images"], ["deployments"], ["capture"], ["events"], ["dead"], ["serve"], ["deploy"], ["score"],
    ["apply"], ["doctor"], ["config"], ["telemetry"], ["models", "register"], ["deployments", "update"],
    ["images", "base"], ["images", "verify"], ["images", "key"], ["images", "export"], ["images", "sbom"], ["gc"],
])
def test_help_is_everywhere(args: list[str]) -> None:
    done = CliRunner().invoke(app, [*args, "--help"])
    assert done.exit_code == 0 and done.stdout.startswith("Usage: ") and "Options:" in done.stdout
    assert "Example:\n    modelyard " in done.stdout or "Commands:" in done.stdout


def test_start_is_light() -> None:
    """Help, usage errors and completion of words wait for no heavy import; processor time, as machines are busy."""
    heavy = "aiohttp", "pydantic", "pyarrow", "grpc", "numpy", "yaml"
    code = f"import sys, modelyard.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "modelyard", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(5)) < 0.4
