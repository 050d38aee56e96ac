#!/bin/sh
# Fetches every wheel that the Dockerfile installs into infra/docker/wheels, for builds that have no network.
# PYTHON: one of the version that the image has. Wheels are of this machine's kind.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
rm -f infra/docker/wheels/*.whl
"$python" - <<'END' > infra/docker/wheels/wanted
import re, tomllib
about = tomllib.load(open("pyproject.toml", "rb"))
extras = about["project"]["optional-dependencies"]
wanted, left = [], [*about["build-system"]["requires"], *about["project"]["dependencies"], "modelyard[distributed]"]
for one in left:
    ours = re.fullmatch(r"modelyard\[(.*)\]", one)
    left += [part for name in ours[1].split(",") for part in extras[name]] if ours else []
    wanted += [] if ours else [one]
print("\n".join(wanted))
END
"$python" -m pip download --quiet --disable-pip-version-check --only-binary :all: --constraint constraints.txt \
  --dest infra/docker/wheels --requirement infra/docker/wheels/wanted
rm infra/docker/wheels/wanted
