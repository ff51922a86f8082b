"""Which rank of the trainer's groups every rank of a gang is. Trainers come first; nobody shares a rank."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DEFAULT_RANKS_PER_NODE = 8
_BRACKETS = re.compile(r"\[([^\]]*)\]")


class LayoutError(ValueError):
    """The ranks cannot be told; the message says what to give."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The gang's ranks are first, first + 1 and so on, of group_size."""

    first: int
    group_size: int


def one_node(*, trainer_ranks: int, world_size: int, gang_index: int = 0, gangs: int = 1) -> Layout:
    """Trainers, then one gang after the other, all of one size.

    Args:
        trainer_ranks: members that the trainer has.
        world_size: ranks of a gang.
        gang_index: of this gang, from 0.
        gangs: how many there are.

    Raises:
        LayoutError: there is no such gang.
    """
    _check_trainers(trainer_ranks)
    if not 0 <= gang_index < gangs:
        raise LayoutError(f"gang index {gang_index}: {gangs} gangs are 0 to {gangs - 1}")
    return Layout(trainer_ranks + gang_index * world_size, trainer_ranks + gangs * world_size)


def many_nodes(
    *,
    trainer_ranks: int,
    world_size: int,
    nodes: Sequence[str],
    node: str,
    ranks_per_node: int = DEFAULT_RANKS_PER_NODE,
    first_on_node: int = 0,
) -> Layout:
    """Trainers, then ranks_per_node ranks of each node, in the nodes' order.

    Args:
        trainer_ranks: members that the trainer has.
        world_size: ranks of this gang: on one node, or from this one on all of the ranks of the next ones.
        nodes: that serve, in order, as the trainer counts them.
        node: the one where the gang's rank 0 is.
        ranks_per_node: on every node.
        first_on_node: the gang's rank 0, among the ranks of its node.

    Raises:
        LayoutError: the node is none of them, or the gang does not fit.
    """
    _check_trainers(trainer_ranks)
    if len(set(nodes)) != len(nodes):
        raise LayoutError(f"nodes {', '.join(nodes)}: one is named twice")
    if node not in nodes:
        raise LayoutError(f"node {node} is none of {', '.join(nodes) or 'no nodes'}: name this one with --node")
    first = nodes.index(node) * ranks_per_node + first_on_node
    ranks = len(nodes) * ranks_per_node
    if not 0 <= first_on_node < ranks_per_node:
        raise LayoutError(
            f"first rank {first_on_node} on the node: {ranks_per_node} ranks are 0 to {ranks_per_node - 1}"
        )
    if first_on_node + world_size > ranks_per_node and (first_on_node or world_size % ranks_per_node):
        raise LayoutError(
            f"{world_size} ranks from rank {first_on_node} of a node with {ranks_per_node}: a gang is on one node, or "
            "has all ranks of several"
        )
    if first + world_size > ranks:
        raise LayoutError(f"{world_size} ranks from node {node} on: {len(nodes)} nodes have {ranks} ranks in all")
    return Layout(trainer_ranks + first, trainer_ranks + ranks)


def _check_trainers(trainer_ranks: int) -> None:
    if trainer_ranks < 1:
        raise LayoutError(f"{trainer_ranks} trainer ranks: rank 0 is the trainer that sends")


def serving_nodes(nodelist: str, count: int) -> list[str]:
    """The last `count` nodes of a Slurm node list (node[01-03,7],other): the trainer has those before.

    Raises:
        LayoutError: the list cannot be read, or has fewer.
    """
    nodes = list(_expand(nodelist))
    if len(nodes) <= count:
        raise LayoutError(f"SLURM_JOB_NODELIST {nodelist!r} has {len(nodes)} nodes: one for the trainer and {count}")
    return nodes[-count:]


def first_node(nodelist: str) -> str:
    """Of a Slurm node list: where the trainer keeps its store. Raises LayoutError."""
    nodes = list(_expand(nodelist))
    if not nodes:
        raise LayoutError(f"SLURM_JOB_NODELIST {nodelist!r} has no nodes")
    return nodes[0]


def this_node(nodes: Sequence[str]) -> str:
    """The one of the nodes that this machine is, by its host name with or without domain. Raises LayoutError."""
    own = socket.gethostname()
    names = {own, own.partition(".")[0], socket.getfqdn()}
    for node in nodes:
        if node in names:
            return node
    raise LayoutError(f"this host, {own}, is none of {', '.join(nodes)}: name its node with --node")


def _expand(nodelist: str) -> Iterator[str]:
    for part in re.split(r",(?![^\[]*\])", nodelist.strip()):
        if part:
            yield from _expand_one(part)


def _expand_one(part: str) -> Iterator[str]:
    match = _BRACKETS.search(part)
    if match is None:
        yield part
        return
    for piece in match.group(1).split(","):
        low, dash, high = piece.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise LayoutError(f"{part!r} is no list of Slurm nodes")
        for number in range(int(low), int(high or low) + 1):
            yield from _expand_one(f"{part[: match.start()]}{number:0{len(low)}d}{part[match.end() :]}")
