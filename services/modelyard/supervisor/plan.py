"""How a child of ours is started: its command line and its environment."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .desired import Desired

PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
             "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
             "no_proxy", "CUDA_VISIBLE_DEVICES")
"""All that scoring code sees of the environment that Modelyard itself runs in: no tokens, nobody else's secrets."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class CannotStart(Exception):
    """A reason for a person: a secret that is not there."""


def program(template: Mapping[str, Any]) -> list[str]:
    """The image's entry on this machine: its own Python, isolated from ours. Of an image that is not unpacked here,
    our own one."""
    if template.get("engine"):
        return [template["python"], "-P", "-m", f"{__package__.partition('.')[0]}.scoring"]
    return [template["python"], "-I", "-S", "-u", os.path.join(template["root"], "opt/modelyard/launch.py")]


def workdir(template: Mapping[str, Any]) -> str:
    """Where scoring code finds the files that it was given, by relative names."""
    score = os.path.join(template["root"], "opt/modelyard/score")
    return score if os.path.isdir(score) else os.path.join(template["root"], "opt/modelyard")


def secret(name: str, source: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """Read at each start, kept nowhere. Raises CannotStart."""
    if source.get("env"):
        value = environ.get(source["env"])
        if value is None:
            raise CannotStart(f"secret {name}: the environment variable {source['env']} is not set for the deployer")
        return value
    try:
        return Path(source["file"]).expanduser().read_text().rstrip("\r\n")
    except (OSError, ValueError) as exc:
        raise CannotStart(f"secret {name}: {source['file']} cannot be read: {exc}") from exc


def environment(want: Desired, template: Mapping[str, Any], ordinal: int,
                environ: Mapping[str, str], passed_on: Sequence[str] = PASSED_ON) -> dict[str, str]:
    """A replica's environment: a little of ours, the image's, the deployment's, its secrets, and who it is."""
    env = {k: environ[k] for k in passed_on if k in environ}
    if cpu := template["resources"].get("cpu"):
        env |= dict.fromkeys(THREADS, str(max(1, math.ceil(cpu))))
    env |= template["image_env"] | template["env"]
    env |= {name: secret(name, source, environ) for name, source in template["secrets"].items()}
    return env | {
        "MODELYARD_WORKSPACE": want.workspace, "MODELYARD_DEPLOYMENT": want.name,
        "MODELYARD_IMAGE": template["image"], "MODELYARD_REPLICA": str(ordinal),
        "MODELYARD_CAPTURE": json.dumps(template["capture"]), "MODELYARD_LIMITS": json.dumps(template["limits"]),
    }
