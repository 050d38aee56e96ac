"""TLS on both transports: certificates of server and clients, and files that cannot be used."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import json
import re
import ssl
import subprocess
from pathlib import Path

import grpc
import pytest

from modelyard.core.errors import Invalid
from modelyard.scoring.transport import Tls
from tests.contract.transports import INFER, SCORE, ask, failed, outcome, serving
from tests.unit.scoring.roots import command, make_root

pytestmark = pytest.mark.slow  # real programs are started
TRANSPORTS = ("grpc", "h2")


def certificates(folder: Path) -> dict[str, Path]:
    """An authority, a server and a client that it signed, and a client that another one signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now, found = datetime.datetime.now(datetime.UTC), {}

    def make(name: str, issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None) \
            -> tuple[x509.Name, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer[0] if issuer else subject)
                .public_key(key.public_key()).serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
                .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
                .add_extension(x509.SubjectAlternativeName(
                    [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
                .sign(issuer[1] if issuer else key, hashes.SHA256()))
        for suffix, data in (("crt", cert.public_bytes(serialization.Encoding.PEM)),
                             ("key", key.private_bytes(serialization.Encoding.PEM,
                                                       serialization.PrivateFormat.PKCS8,
                                                       serialization.NoEncryption()))):
            found[f"{name}.{suffix}"] = folder / f"{name}.{suffix}"
            found[f"{name}.{suffix}"].write_bytes(data)
        return subject, key

    authority = make("ca", None)
    make("server", authority)
    make("client", authority)
    make("stranger", make("other", None))
    return found


def credentials(files: dict[str, Path], client: str = "") -> grpc.ChannelCredentials:
    pair = (files[f"{client}.key"].read_bytes(), files[f"{client}.crt"].read_bytes()) if client else (None, None)
    return grpc.ssl_channel_credentials(files["ca.crt"].read_bytes(), *pair)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tls_and_a_client_that_must_be_known(tmp_path: Path, transport: str) -> None:
    files = certificates(tmp_path)
    arguments = ("--tls-cert", str(files["server.crt"]), "--tls-key", str(files["server.key"]))
    with serving(tmp_path / "tls", transport, arguments=arguments) as served:
        with grpc.secure_channel(served.address, credentials(files)) as channel:
            assert outcome(channel.unary_unary(INFER)(ask(), timeout=10)).tolist() == [0]
        with grpc.insecure_channel(served.address) as channel:
            assert failed(lambda: channel.unary_unary(INFER)(ask(), timeout=5)).code() == grpc.StatusCode.UNAVAILABLE
        known = ssl.create_default_context(cafile=files["ca.crt"])
        rest = http.client.HTTPSConnection(served.replica.http, context=known, timeout=10)
        for body in (b'{"x": [1]}', iter((b'{"x": ', b"[1]}"))):  # the second one in chunks
            rest.request("POST", "/score", body)
            assert json.load(rest.getresponse()) == {"x": [1]}
        rest.close()
    arguments += ("--tls-client-ca", str(files["ca.crt"]))
    with serving(tmp_path / "mtls", transport, arguments=arguments) as served:
        with grpc.secure_channel(served.address, credentials(files, "client")) as channel:
            assert outcome(channel.unary_unary(INFER)(ask(), timeout=10)).tolist() == [0]
        for client in ("", "stranger"):
            with grpc.secure_channel(served.address, credentials(files, client)) as channel:
                error = failed(lambda c=channel: c.unary_unary(INFER)(ask(), timeout=5))
                assert error.code() == grpc.StatusCode.UNAVAILABLE, client


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    files, root = certificates(tmp_path), make_root(tmp_path / "image", SCORE)
    cert, key, other, text = (str(files.get(name, tmp_path / name)) for name in (
        "server.crt", "server.key", "client.key", "text"))
    (tmp_path / "text").write_text("this is no certificate\n")
    (tmp_path / "locked").write_bytes(serialization.load_pem_private_key(files["server.key"].read_bytes(), None)
                                      .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                                     serialization.BestAvailableEncryption(b"word")))
    for given, why in (((text, key), f"{text} (--tls-cert) is no certificate in PEM"),
                       ((key, key), f"{key} (--tls-cert) is no certificate in PEM"),
                       ((cert, text), f"{text} (--tls-key) is no key in PEM"),
                       ((cert, cert), f"{cert} (--tls-key) is no key in PEM"),
                       ((cert, other), f"{other} (--tls-key) is not the key of {cert} (--tls-cert)"),
                       ((cert, str(tmp_path / "locked")), "(--tls-key) is locked by a passphrase"),
                       ((cert, str(tmp_path)), f"{tmp_path} (--tls-key) cannot be read: Is a directory"),
                       ((cert, key, text), f"{text} (--tls-client-ca) is no certificate in PEM")):
        tls = Tls(*map(Path, given))
        with pytest.raises(Invalid, match=re.escape(why)):
            tls.check()
    for library in TRANSPORTS:
        done = subprocess.run([*command(root), "serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--grpc",
                               "127.0.0.1:0", "--transport", library, "--tls-cert", cert, "--tls-key", other],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "is not the key of" in done.stderr and "Traceback" not in done.stderr, done
