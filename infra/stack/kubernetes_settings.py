"""What the programs of a node are told: their arguments, and the files that they read."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kubernetes_build import HOME, PAUSE, PLUGINS
from .kubernetes_node import CONTAINERD

NAME = "node"
ETCD = "http://127.0.0.1:2379"
"""In the node's network nobody else has a port: each program takes the one that it always has."""
CONTAINERD_TOML = """version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = {socket}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = {pause}
  # a machine that may not lower it for its own processes could start no pod
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_address = {ours}
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = {plugins}
    conf_dir = {networks}
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = {registries}
"""


@dataclass(frozen=True)
class Place:
    """Where one node lies: its folder, its networks (10.N.M.0/24 each: the wire, pods, services), and its names."""

    folder: Path
    word: str
    port: int

    @property
    def _block(self) -> tuple[str, int]:
        # 10.64 to 10.127: above are the networks of this stack's Docker engines
        n = int(self.word, 16) % 4096
        return f"10.{64 + n // 64}", n % 64 * 4

    def network(self, n: int) -> str:
        head, third = self._block
        return f"{head}.{third + n}"

    @property
    def ours(self) -> str:
        """This machine's end of the wire."""
        return f"{self.network(0)}.1"

    @property
    def node(self) -> str:
        return f"{self.network(0)}.2"

    @property
    def pods(self) -> str:
        return f"{self.network(1)}.0/24"

    @property
    def services(self) -> str:
        return f"{self.network(2)}.0/24"

    @property
    def api(self) -> str:
        """The API server's address as a service: the first of them."""
        return f"{self.network(2)}.1"

    @property
    def server(self) -> str:
        return f"https://{self.node}:{self.port}"

    @property
    def link(self) -> str:
        return f"mykb-{self.word}"

    @property
    def cgroup(self) -> str:
        return f"modelyard-{self.word}"

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    def pem(self, name: str) -> str:
        return str(self.pki / name)

    def kubeconfig(self, name: str) -> Path:
        return self.folder / f"{name}.kubeconfig"


def plan(place: Place) -> dict[str, Any]:
    """What the node's first process reads."""
    return {"data": str(place.folder / "data"), "home": str(HOME), "logs": str(place.folder), "cgroup": place.cgroup,
            "keep": [str(place.folder), str(HOME)], "link": place.link, "ours": place.ours, "node": place.node,
            "networks": [place.pods, place.services], "ca": place.pem("ca.crt"), "server": place.server,
            "env": {"ETCD_UNSUPPORTED_ARCH": "arm64"} if platform.machine() == "aarch64" else {},
            "programs": programs(place)}


def programs(place: Place) -> dict[str, list[str]]:
    """Name → its command."""
    def flags(name: str, **values: object) -> list[str]:
        return [str(HOME / name), *(f"--{key.replace('_', '-')}={value}" for key, value in values.items())]

    pem, config = place.pem, place.kubeconfig
    peer = ETCD.replace("2379", "2380")
    return {
        "containerd": ["containerd", "--config", str(place.folder / "containerd.toml"), "--log-level", "warn"],
        "etcd": flags("etcd", data_dir=place.folder / "data/etcd", listen_client_urls=ETCD, advertise_client_urls=ETCD,
                      listen_peer_urls=peer, initial_advertise_peer_urls=peer, initial_cluster=f"default={peer}",
                      logger="zap", log_level="warn"),
        "kube-apiserver": flags(
            "kube-apiserver", bind_address=place.node, advertise_address=place.node, secure_port=place.port,
            etcd_servers=ETCD, service_cluster_ip_range=place.services, authorization_mode="Node,RBAC",
            enable_admission_plugins="NodeRestriction", allow_privileged="true", client_ca_file=pem("ca.crt"),
            tls_cert_file=pem("apiserver.crt"), tls_private_key_file=pem("apiserver.key"),
            kubelet_certificate_authority=pem("ca.crt"), kubelet_client_certificate=pem("apiserver-kubelet.crt"),
            kubelet_client_key=pem("apiserver-kubelet.key"), kubelet_preferred_address_types="InternalIP",
            service_account_issuer="https://kubernetes.default.svc.cluster.local",
            service_account_key_file=pem("service-accounts.pub"),
            service_account_signing_key_file=pem("service-accounts.key"),
            requestheader_client_ca_file=pem("front-proxy-ca.crt"), requestheader_allowed_names="front-proxy-client",
            requestheader_extra_headers_prefix="X-Remote-Extra-", requestheader_group_headers="X-Remote-Group",
            requestheader_username_headers="X-Remote-User", proxy_client_cert_file=pem("front-proxy.crt"),
            proxy_client_key_file=pem("front-proxy.key"), enable_aggregator_routing="true"),
        "kube-controller-manager": flags(
            "kube-controller-manager", kubeconfig=config("controller-manager"), leader_elect="false", secure_port=0,
            root_ca_file=pem("ca.crt"), use_service_account_credentials="true",
            service_account_private_key_file=pem("service-accounts.key"), cluster_signing_cert_file=pem("ca.crt"),
            cluster_signing_key_file=pem("ca.key")),
        "kube-scheduler": flags("kube-scheduler", kubeconfig=config("scheduler"), leader_elect="false", secure_port=0),
        "kubelet": flags("kubelet", config=place.folder / "kubelet.json", kubeconfig=config("node"),
                         hostname_override=NAME, node_ip=place.node),
        "kube-proxy": flags("kube-proxy", config=place.folder / "kube-proxy.json"),
    }


def write(place: Place) -> None:
    """The files that the programs read."""
    folder = place.folder
    (folder / "plan.json").write_text(json.dumps(plan(place), indent=1))
    (folder / "kubelet.json").write_text(json.dumps(_kubelet(place), indent=1))
    (folder / "kube-proxy.json").write_text(json.dumps(_proxy(place), indent=1))
    (folder / "resolv.conf").write_text("# pods know this machine by its address, and no names\n")
    for name in ("cni/plugins", "cni/networks", "registries"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for plugin in PLUGINS:  # containerd is in this machine's network, its pods belong in the node's
        script = folder / "cni/plugins" / plugin
        script.write_text(f'#!/bin/sh\nexec nsenter --net=/run/netns/node "{HOME}/cni/{plugin}" "$@"\n')
        script.chmod(0o755)
    (folder / "cni/networks/pods.conflist").write_text(json.dumps(_network(place), indent=1))
    paths = {"socket": CONTAINERD, "pause": PAUSE, "ours": place.ours, "plugins": f"{folder}/cni/plugins",
             "networks": f"{folder}/cni/networks", "registries": f"{folder}/registries"}
    (folder / "containerd.toml").write_text(CONTAINERD_TOML.format(
        **{name: json.dumps(value) for name, value in paths.items()}))


def _network(place: Place) -> dict[str, Any]:
    ranges = [[{"subnet": place.pods}]]
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "pods0", "isGateway": True, "hairpinMode": True,
         "ipam": {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": True}}]}


def _kubelet(place: Place) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "address": place.node, "readOnlyPort": 0, "clusterDomain": "cluster.local",
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                           "x509": {"clientCAFile": place.pem("ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": place.pem("kubelet.crt"), "tlsPrivateKeyFile": place.pem("kubelet.key"),
        "containerRuntimeEndpoint": f"unix://{CONTAINERD}", "resolvConf": str(place.folder / "resolv.conf"),
        "cgroupDriver": "cgroupfs", "cgroupRoot": f"/{place.cgroup}", "failCgroupV1": False, "failSwapOn": False,
        "oomScoreAdj": 0, "serializeImagePulls": False,
        # a developer's disk may be nearly full, and it is not the node's to clear
        "evictionHard": {"memory.available": "100Mi"}, "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
    }


def _proxy(place: Place) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "iptables",
        "clientConnection": {"kubeconfig": str(place.kubeconfig("proxy"))}, "hostnameOverride": NAME,
        "bindAddress": place.node, "clusterCIDR": place.pods, "oomScoreAdj": 0,
        "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
        # an answer from one pod to another would go straight over their bridge, past the translation of its address
        "iptables": {"masqueradeAll": True, "localhostNodePorts": False},
        # the machine's, not the node's to set
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
