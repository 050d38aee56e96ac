"""What each stand-in image is made of, and how it behaves as the one that it stands in for: its folders, owners, users,
ports, entry point, and what it makes of its environment. Only what this project uses of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .azurite import Azurite
from .kafka import JVM, LOGGING

KAFKA_RUN = f"""#!/bin/bash
# Environment to server.properties by the image's own rule, which Kafka's jar holds; storage is formatted once.
set -eu
export CLUSTER_ID="${{CLUSTER_ID:-5L6g3nShT-eMCtK--X86sw}}"
if [ -z "${{KAFKA_LISTENERS:-}}" ] && [ -n "${{KAFKA_ADVERTISED_LISTENERS:-}}" ]; then
  KAFKA_LISTENERS="$(sed 's|://[^:]*:|://0.0.0.0:|g' <<<"$KAFKA_ADVERTISED_LISTENERS")"
  export KAFKA_LISTENERS
fi
class=(-Dlog4j2.configurationFile=/etc/kafka/docker/log4j2.properties -cp '/opt/kafka/libs/*')
told="$(java -Xmx256m {' '.join(JVM[2:])} "${{class[@]}}" kafka.docker.KafkaDockerWrapper setup \\
  --default-configs-dir /etc/kafka/docker --mounted-configs-dir /mnt/shared/config \\
  --final-configs-dir /opt/kafka/config 2>&1)" || grep -q 'already formatted' <<<"$told" || {{
    echo "$told" >&2; exit 1; }}
exec java ${{KAFKA_HEAP_OPTS:--Xmx1G -Xms1G}} ${{KAFKA_JVM_PERFORMANCE_OPTS:-{' '.join(JVM[2:])}}} ${{KAFKA_OPTS:-}} \\
  "${{class[@]}}" kafka.Kafka /opt/kafka/config/server.properties
"""
KAFKA_PROPERTIES = """process.roles=broker,controller
node.id=1
controller.quorum.voters=1@localhost:9093
listeners=PLAINTEXT://:9092,CONTROLLER://:9093
advertised.listeners=PLAINTEXT://localhost:9092
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=/tmp/kraft-combined-logs
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
"""
KAFKA_LOG4J2 = """Configuration:
  Properties: {Property: []}
  Appenders: {Console: {name: STDOUT}}
  Loggers: {Root: {level: INFO, AppenderRef: [{ref: STDOUT}]}}
"""
"""The wrapper wants one, to write what the environment says of logging into; the broker logs by another."""
MONGO_RUN = """#!/bin/bash
# mongod's own arguments, as the user mongodb, on all addresses unless they say which.
set -eu
[ "${1:0:1}" != - ] || set -- mongod "$@"
[ "$1" = mongod ] || exec "$@"
if [ -n "${MONGO_INITDB_ROOT_USERNAME:-}${MONGO_INITDB_ROOT_PASSWORD:-}" ]; then
  echo 'this stand-in for mongo makes no users: unset MONGO_INITDB_ROOT_USERNAME and MONGO_INITDB_ROOT_PASSWORD' >&2
  exit 1
fi
case " $* " in *' --bind_ip'*) ;; *) set -- "$@" --bind_ip_all ;; esac
[ "$(id -u)" != 0 ] || {
  find /data/configdb /data/db ! -user mongodb -exec chown mongodb '{}' +
  exec setpriv --reuid=mongodb --regid=mongodb --clear-groups "$@"
}
exec "$@"
"""
REGISTRY_RUN = """#!/bin/sh
# A configuration file, or registry's own arguments.
set -e
case "$1" in
  *.yaml|*.yml) set -- registry serve "$@" ;;
  serve|garbage-collect|help|-*) set -- registry "$@" ;;
esac
exec "$@"
"""
REGISTRY_CONFIG = """version: 0.1
log:
  fields:
    service: registry
storage:
  cache:
    blobdescriptor: inmemory
  filesystem:
    rootdirectory: /var/lib/registry
http:
  addr: :5000
  headers:
    X-Content-Type-Options: [nosniff]
health:
  storagedriver:
    enabled: true
    interval: 10s
    threshold: 3
"""
AZURITE_RUN = """#!/bin/sh
exec node /usr/local/lib/azurite/node_modules/azurite/dist/src/blob/main.js "$@"
"""
WGET = {"usr/bin/wget": "busybox"}


@dataclass(frozen=True)
class Recipe:
    """``parts``: layers above Debian and its tools. ``config``: as an OCI image says it. ``files``: path → text, a
    program when it begins so. ``folders``: path → who owns it. ``links``: path → where to. ``gone``: paths of lower
    layers that are not to be seen."""

    parts: tuple[str, ...]
    config: Mapping[str, object]
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    users: Mapping[str, int] = field(default_factory=dict)


AZURITE = f"modelyard-azurite:{Azurite.version}"
"""What this project's own Dockerfile makes of Node's image and npm's Azurite."""
RECIPES = {
    "python:3.11-slim": Recipe(
        ("pip",), {"Cmd": ["python3"]}, gone=("usr/lib/python3.11/EXTERNALLY-MANAGED",),
        links={"usr/local/bin/python": "/usr/bin/python3.11", "usr/local/bin/python3": "/usr/bin/python3.11",
               "usr/local/bin/python3.11": "/usr/bin/python3.11", "usr/local/bin/pip": "/usr/bin/pip3",
               "usr/local/bin/pip3": "/usr/bin/pip3"}),
    "apache/kafka:4.1.1": Recipe(
        ("java", "kafka"),
        {"User": "appuser", "Cmd": ["/etc/kafka/docker/run"], "ExposedPorts": {"9092/tcp": {}},
         "Volumes": {path: {} for path in ("/etc/kafka/secrets", "/var/lib/kafka/data", "/mnt/shared/config")}},
        {"etc/kafka/docker/run": KAFKA_RUN, "etc/kafka/docker/server.properties": KAFKA_PROPERTIES,
         "etc/kafka/docker/log4j2.properties": LOGGING, "etc/kafka/docker/log4j2.yaml": KAFKA_LOG4J2,
         "etc/kafka/docker/tools-log4j2.yaml": KAFKA_LOG4J2},
        dict.fromkeys(("home/appuser", "opt/kafka", "opt/kafka/config", "var/lib/kafka", "var/lib/kafka/data",
                       "etc/kafka", "etc/kafka/secrets", "mnt/shared", "mnt/shared/config"), 1000),
        WGET, users={"appuser": 1000}),
    "mongo:6.0": Recipe(
        ("mongod",),
        {"Entrypoint": ["docker-entrypoint.sh"], "Cmd": ["mongod"], "ExposedPorts": {"27017/tcp": {}},
         "Volumes": {"/data/configdb": {}, "/data/db": {}}},
        {"usr/local/bin/docker-entrypoint.sh": MONGO_RUN},
        {"home/mongodb": 999, "data/db": 999, "data/configdb": 999}, users={"mongodb": 999}),
    "registry:2": Recipe(
        ("registry",),
        {"Entrypoint": ["/entrypoint.sh"], "Cmd": ["/etc/docker/registry/config.yml"],
         "ExposedPorts": {"5000/tcp": {}}, "Volumes": {"/var/lib/registry": {}}},
        {"entrypoint.sh": REGISTRY_RUN, "etc/docker/registry/config.yml": REGISTRY_CONFIG},
        {"var/lib/registry": 0}, {"usr/bin/registry": "docker-registry", **WGET}),
    AZURITE: Recipe(
        ("node", "azurite"),
        {"User": "node", "Entrypoint": ["azurite-blob"], "ExposedPorts": {"10000/tcp": {}}},
        {"usr/local/bin/azurite-blob": AZURITE_RUN}, {"home/node": 1000, "data": 1000}, users={"node": 1000}),
    "prom/prometheus:v3.5.0": Recipe(
        ("prometheus",),
        {"User": "nobody", "Entrypoint": ["/bin/prometheus"], "WorkingDir": "/prometheus",
         "Cmd": ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"],
         "ExposedPorts": {"9090/tcp": {}}, "Volumes": {"/prometheus": {}}},
        folders={"prometheus": 65534}, links=WGET),
}
