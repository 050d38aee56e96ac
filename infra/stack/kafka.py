"""Apache Kafka in KRaft mode, one node that is broker and controller, from the jars of its Maven artefact."""

from __future__ import annotations

import shutil
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from .server import Server, StackError, free_port, needs, run

POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>dev.modelyard</groupId><artifactId>kafka-stack</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{version}</version>
    </dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
      <version>2.24.3</version></dependency>
  </dependencies>
</project>
"""
PROPERTIES = """# written at every start by infra/stack/kafka.py
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{control}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{control}
advertised.listeners=PLAINTEXT://127.0.0.1:{advertised}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}/log

# topics are declared by who uses them, with their partition counts
auto.create.topics.enable=false
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=8
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1

# one node on a shared machine: a killed broker is let in again as soon as its own old session is over
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
initial.broker.registration.timeout.ms=20000
controller.quorum.election.timeout.ms=500
controller.quorum.fetch.timeout.ms=1000
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=2
log.cleaner.dedupe.buffer.size=16777216
log.segment.bytes=67108864
log.segment.delete.delay.ms=1000
log.index.size.max.bytes=1048576
"""
LOGGING = """status=error
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{1} %m%n
rootLogger.level=WARN
rootLogger.appenderRef.out.ref=out
logger.start.name=org.apache.kafka.common.utils.AppInfoParser
logger.start.level=INFO
"""
JVM = ("-Xmx512m", "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-XX:-UsePerfData",
       "-Djava.awt.headless=true")
"""A quick start and few compiler threads are worth more here than the last third of throughput."""


class Kafka(Server):
    """One node. Its controller listens beside it on a port of its own, kept in the folder."""

    name = "kafka"
    version = "4.1.1"

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    @classmethod
    def missing(cls) -> str:
        return needs(java="install Java 17 or newer (a JRE is enough)") or (
            "" if cls.installed() else needs(mvn="install Maven, which fetches Kafka's jars"))

    @classmethod
    def installed(cls) -> bool:
        return (cls.home() / "libs").is_dir()

    @classmethod
    def _install(cls) -> None:
        draft = cls.home().with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        (draft / "pom.xml").write_text(POM.format(version=cls.version))
        (draft / "log4j2.properties").write_text(LOGGING)
        run("mvn", "-q", "-B", "dependency:copy-dependencies", f"-DoutputDirectory={draft / 'libs'}", cwd=draft)
        if not list((draft / "libs").glob(f"kafka_*-{cls.version}.jar")):
            raise StackError(f"kafka: Maven fetched no Kafka {cls.version}")
        draft.replace(cls.home())

    def _prepare(self) -> None:
        control = self.folder / "controller.port"
        if not control.exists():
            control.write_text(str(free_port()))
        properties = self._properties
        properties.write_text(PROPERTIES.format(port=self.port, advertised=self.advertised or self.port,
                                                control=control.read_text(), data=self.data))
        if not (self.data / "log" / "meta.properties").exists():
            tool = self._java("kafka.tools.StorageTool", *JVM[2:])
            cluster = run(*tool, "random-uuid").split()[-1]
            run(*tool, "format", "--standalone", "-t", cluster, "-c", str(properties))

    def _command(self) -> Sequence[str]:
        return [*self._java("kafka.Kafka", *JVM), str(self._properties)]

    def _environ(self) -> Mapping[str, str]:
        return {"LOG_DIR": str(self.folder)}

    def answers(self) -> bool:
        return serves(self.port)

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _java(self, program: str, *flags: str) -> list[str]:
        logging = f"-Dlog4j2.configurationFile={self.home() / 'log4j2.properties'}"
        return ["java", *flags, logging, "-cp", f"{self.home() / 'libs'}/*", program]


def serves(port: int) -> bool:
    """Whether a broker answers ApiVersions: its listener opens earlier, its answers begin when it may serve."""
    request = struct.pack(">hhih", 18, 0, 1, -1)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as s:
            s.sendall(struct.pack(">i", len(request)) + request)
            return len(s.recv(8)) > 4
    except OSError:
        return False
