"""The certificates and kubeconfigs of one node's cluster, made at its first start and kept in its folder."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

YEARS = 10
MASTERS = "system:masters"
CLIENTS = {  # file → (who it is, the group that its rights come by)
    "admin": ("modelyard-admin", MASTERS),
    "apiserver-kubelet": ("kube-apiserver", MASTERS),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
}
PROGRAMS = ("admin", "controller-manager", "scheduler", "proxy", "node")
"""Those that have a kubeconfig."""


def write(folder: Path, node: str, address: str, service: str) -> None:
    """``<name>.crt`` and ``<name>.key`` of all; nothing when they are there. ``service``: the API server's own."""
    if (folder / "done").exists():
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    local = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
             "kubernetes.default.svc.cluster.local"]
    _authority(folder, "ca")
    _authority(folder, "front-proxy-ca")
    _issue(folder, "ca", "apiserver", "kube-apiserver", server=[*local, "127.0.0.1", address, service])
    _issue(folder, "ca", "kubelet", node, server=[node, address])
    for name, (who, group) in CLIENTS.items():
        _issue(folder, "ca", name, who, group)
    _issue(folder, "ca", "node", f"system:node:{node}", "system:nodes")
    _issue(folder, "front-proxy-ca", "front-proxy", "front-proxy-client")
    key = _key(folder, "service-accounts")
    (folder / "service-accounts.pub").write_bytes(key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    (folder / "done").touch()


def kubeconfig(path: Path, pki: Path, name: str, server: str, cluster: str) -> None:
    """Names the certificates by their files. JSON is YAML."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": cluster,
        "clusters": [{"name": cluster, "cluster": {"server": server, "certificate-authority": str(pki / "ca.crt")}}],
        "users": [{"name": f"{cluster}-{name}", "user": {"client-certificate": str(pki / f"{name}.crt"),
                                                         "client-key": str(pki / f"{name}.key")}}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": f"{cluster}-{name}"}}],
    }, indent=1) + "\n")
    draft.chmod(0o600)
    draft.replace(path)


def _key(folder: Path, name: str) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                            serialization.NoEncryption())
    with open(os.open(folder / f"{name}.key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(pem)
    return key


def _authority(folder: Path, name: str) -> None:
    key = _key(folder, name)
    subject = _name(f"modelyard {name}")
    built = _about(subject, key, subject).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    uses = x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
                         key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                         decipher_only=False)
    _sign(folder, name, built.add_extension(uses, critical=True), key)


def _issue(folder: Path, authority: str, name: str, who: str, group: str = "", server: Sequence[str] = ()) -> None:
    """A client's, or that of a server with these names and addresses."""
    issuer = x509.load_pem_x509_certificate((folder / f"{authority}.crt").read_bytes())
    signs = serialization.load_pem_private_key((folder / f"{authority}.key").read_bytes(), None)
    assert isinstance(signs, ec.EllipticCurvePrivateKey)
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    built = (_about(_name(who, group), _key(folder, name), issuer.subject)
             .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
             .add_extension(x509.ExtendedKeyUsage([usage]), critical=False))
    if server:
        built = built.add_extension(x509.SubjectAlternativeName([_alternative(one) for one in server]), critical=False)
    _sign(folder, name, built, signs)


def _name(who: str, group: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, who)]
    return x509.Name(([x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []) + parts)


def _alternative(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _about(subject: x509.Name, key: ec.EllipticCurvePrivateKey, issuer: x509.Name) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))  # a clock that was set back
            .not_valid_after(now + datetime.timedelta(days=365 * YEARS)))


def _sign(folder: Path, name: str, built: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> None:
    (folder / f"{name}.crt").write_bytes(built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
