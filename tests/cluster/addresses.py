"""Addresses of the full cluster. They exist on this machine only, so one full cluster runs at a time."""

from __future__ import annotations

from .apiserver import SERVICE_RANGE

HOST = "10.250.0.1"
"""This machine, as nodes and pods see it: API server, DNS and whatever a test serves to pods."""
PREFIX = 24
POD_RANGE = "10.244.0.0/16"
API_PORT = 6443
ETCD_PORT, ETCD_PEER_PORT = 12379, 12380
CLUSTER_DOMAIN = "cluster.local"
MOST_NODES = 20

__all__ = ["SERVICE_RANGE"]


def node_address(number: int) -> str:
    """Of node `number`, counted from 1."""
    return f"10.250.0.{10 + number}"


def pod_subnet(number: int) -> str:
    """The addresses of that node's pods."""
    return f"10.244.{number}.0/24"
