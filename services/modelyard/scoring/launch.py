"""Starts the scoring server inside an image: ``python3 -I -S <root>/opt/modelyard/launch.py serve …``.

Finds the image's root from its own place, so the same tree runs as a container and as plain processes:
``<root>/opt/env`` holds the dependencies, ``<root>/opt/modelyard/lib`` this package. Standard library only.
"""

import os
import site
import sys


def prepare(here: str) -> None:
    """Puts the image's libraries on ``sys.path`` and says where the image's files are."""
    os.environ["MODELYARD_ROOT"] = here
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = os.path.join(os.path.dirname(here), "env", "lib", python, "site-packages")
    if not os.path.isdir(packages):
        sys.exit(f"modelyard: this image has no packages for {python}: {packages} is missing")
    sys.path.insert(0, os.path.join(here, "lib"))
    site.addsitedir(packages)


if __name__ == "__main__":
    prepare(os.path.dirname(os.path.abspath(__file__)))
    from modelyard.scoring.__main__ import main

    sys.exit(main())
