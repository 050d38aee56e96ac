#!/bin/sh
# Generated files: gRPC stubs from proto/, JSON Schemas of the events from core/events.py.
# `write` makes them again; `check` fails when what is committed differs from what would be made.
set -eu
cd "$(dirname "$0")/.."
py=.venv/bin/python
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir -p "$out/services" "$out/events"
"$py" -m grpc_tools.protoc -I proto --python_out="$out/services" --pyi_out="$out/services" \
  --grpc_python_out="$out/services" proto/modelyard/wire/inference.proto
"$py" infra/export_schemas.py "$out/events"
case "${1:-check}" in
  write)
    cp "$out"/services/modelyard/wire/* services/modelyard/wire/
    rm -f proto/events/*.schema.json
    cp "$out"/events/*.schema.json proto/events/ ;;
  check)
    for f in "$out"/services/modelyard/wire/*; do
      cmp -s "$f" "services/modelyard/wire/$(basename "$f")" || { echo "$f differs: run make proto and commit"; exit 1; }
    done
    diff -r "$out/events" proto/events >/dev/null || { echo "proto/events differs: run make proto and commit"; exit 1; }
    echo "generated files are up to date" ;;
  *) echo "usage: generated.sh write|check"; exit 2 ;;
esac
