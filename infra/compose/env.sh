#!/bin/sh
# Writes .env beside docker-compose.yml, readable by you only: tokens made here, and the group that may use the engine.
# One that is there stays as it is.
set -eu
cd "$(dirname "$0")/../.."
[ ! -e .env ] || { echo ".env is there and stays as it is"; exit 0; }
word() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
socket=${YARD_DOCKER_SOCKET:-/var/run/docker.sock}
group=$(stat -Lc %g "$socket") || { echo "no Docker engine at $socket; start it, or name its socket in YARD_DOCKER_SOCKET" >&2; exit 1; }
umask 077
cat > .env.new <<END
MODELYARD_TOKEN=$(word)
MODELYARD_SERVICE_TOKEN=$(word)
YARD_IMAGES_SECRET=$(word)
YARD_DOCKER_GID=$group
YARD_DOCKER_SOCKET=$socket
END
mv .env.new .env
echo "wrote .env; callers need its token: export MODELYARD_TOKEN=\$(sed -n 's/^MODELYARD_TOKEN=//p' .env)"
