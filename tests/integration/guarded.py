"""A broker with passwords and permissions, for whoever asks what is said when one is wrong or missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest

from infra.stack.kafka import Kafka
from infra.stack.server import free_port, run

T = TypeVar("T")
KINDS = {"topic": 2, "group": 3}
OPERATIONS = {"read": 3, "write": 4, "create": 5, "describe": 8, "describe-configs": 10}
LITERAL, PREFIXED, ALLOWED = 3, 4, 3
MORE = """
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{control},\
SASL_PLAINTEXT://127.0.0.1:{sasl},SASL_SSL://127.0.0.1:{tls}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL_PLAINTEXT://127.0.0.1:{sasl},SASL_SSL://127.0.0.1:{tls}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config={login}
listener.name.sasl_ssl.plain.sasl.jaas.config={login}
ssl.keystore.location={store}
ssl.keystore.password=changeit
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:yard
"""
LOGIN = ('org.apache.kafka.common.security.plain.PlainLoginModule required '
         'user_yard="{password}" user_guest="guest" user_stranger="stranger";')


class Guarded(Kafka):
    """Two more listeners, with passwords: ``sasl`` in the open, ``tls`` encrypted. ``yard`` may do
    everything, ``guest`` and ``stranger`` nothing but what ``allow`` gives them."""

    sasl = tls = 0
    password = "p@ss"
    """Of ``yard``, from the next start on."""

    def _prepare(self) -> None:
        super()._prepare()
        self.sasl, self.tls = self.sasl or free_port(), self.tls or free_port()
        store = self.folder / "key.p12"
        if not store.exists():
            about = ("-keystore", str(store), "-storepass", "changeit", "-alias", "kafka")
            run("keytool", "-genkeypair", *about, "-storetype", "PKCS12", "-keyalg", "RSA", "-dname", "CN=localhost",
                "-ext", "SAN=IP:127.0.0.1", "-ext", "BC=ca:true")
            run("keytool", "-exportcert", "-rfc", *about, "-file", str(self.authority))
        with self._properties.open("a") as properties:
            properties.write(MORE.format(port=self.port, sasl=self.sasl, tls=self.tls, store=store,
                                         login=LOGIN.format(password=self.password),
                                         control=(self.folder / "controller.port").read_text()))

    @property
    def authority(self) -> Path:
        return self.folder / "authority.pem"

    def allow(self, user: str, kind: str, name: str, *operations: str) -> None:
        """``allow("guest", "topic", "*", "read", "write")``; ``yard.*`` are names that begin with ``yard.``."""
        begins = name != "*" and name.endswith("*")
        pattern = PREFIXED if begins else LITERAL

        async def ask(admin: AIOKafkaAdminClient) -> None:
            for operation in operations:
                answer = await admin._send_request(CreateAclsRequest(
                    KINDS[kind], name.rstrip("*") if begins else name, pattern, f"User:{user}", "*",
                    OPERATIONS[operation], ALLOWED))
                assert answer.creation_responses[0][0] == 0, answer

        asyncio.run(self._as_admin(ask))

    def topics(self, prefix: str) -> list[str]:
        """Those that there are."""
        async def ask(admin: AIOKafkaAdminClient) -> list[str]:
            return sorted(name for name in await admin.list_topics() if name.startswith(prefix))

        return asyncio.run(self._as_admin(ask))

    def delete(self, *topics: str) -> None:
        """As somebody would who tidies up."""
        async def ask(admin: AIOKafkaAdminClient) -> None:
            await admin.delete_topics(list(topics))

        asyncio.run(self._as_admin(ask))

    async def _as_admin(self, ask: Callable[[AIOKafkaAdminClient], Awaitable[T]]) -> T:
        admin = AIOKafkaAdminClient(bootstrap_servers=f"127.0.0.1:{self.port}")
        await admin.start()
        try:
            return await ask(admin)
        finally:
            await admin.close()
