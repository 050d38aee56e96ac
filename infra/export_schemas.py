"""Writes the JSON Schema of every event version into a folder: ``python infra/export_schemas.py proto/events``."""

import json
import sys
from pathlib import Path

from modelyard.core.events import TOPICS
from modelyard.core.schemas import event_schema

if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for topic in TOPICS:
        (out / f"{topic}.v1.schema.json").write_text(json.dumps(event_schema(topic), indent=2, sort_keys=True) + "\n")
