"""Who holds what in a testnet: a model's layers and experts dealt to so many nodes.

Pure: numbers in, holdings as `shoal run --hold` takes them out.  Law: every expert, and every trunk layer unless
`trunks` says otherwise, is held by at least `replicas` nodes, or the topology is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from protos.errors import InvalidRequest

NODES_MAX: Final = 64
"""Processes on one machine; each takes some 350 MiB beside its weights."""

Experts = Literal["spread", "own"]


@dataclass(frozen=True, slots=True)
class Topology:
    """`spans` 0: every node holds the trunk of all layers."""

    nodes: int
    spans: int = 0
    experts: Experts = "spread"  # "own": each node holds the experts of its span's layers
    replicas: int = 1
    zones: int = 1
    trunks: int | None = None  # only so many of the first nodes hold a trunk, the others are expert leaves; None: all


@dataclass(frozen=True, slots=True)
class Place:
    """What one node is told."""

    hold: tuple[str, ...]
    zone: str


def choose(nodes: int, experts: Experts | None, spans: int, replicas: int | None, zones: int) -> Topology:
    """The topology that the options mean: two replicas where there is room for them."""
    kind: Experts = experts or ("own" if spans else "spread")
    rooms = nodes if kind == "spread" else nodes // max(spans, 1)
    return Topology(nodes, spans, kind, min(2, max(rooms, 1)) if replicas is None else replicas, zones)


def places(topology: Topology, layers: int, grain: int) -> list[Place]:
    """A place for each node, in order.  Raises InvalidRequest for what does not fit the model or the nodes."""
    _check(topology, layers, grain)
    return [
        Place(_hold(topology, number, layers, grain), f"zone-{number % topology.zones + 1}")
        for number in range(topology.nodes)
    ]


def _check(topology: Topology, layers: int, grain: int) -> None:
    nodes, spans, replicas = topology.nodes, topology.spans, topology.replicas
    cells = -(-layers // grain)
    if not 1 <= nodes <= NODES_MAX:
        raise InvalidRequest(f"-n is {nodes}; it must be 1 to {NODES_MAX}")
    if topology.trunks is not None and not max(spans, 1) <= topology.trunks <= nodes:
        raise InvalidRequest(f"{topology.trunks} of {nodes} nodes hold a trunk; it must be {max(spans, 1)} to {nodes}")
    if not 1 <= topology.zones <= nodes:
        raise InvalidRequest(f"--zones is {topology.zones}; it must be 1 to {nodes}, the number of nodes")
    if not 0 <= spans <= min(nodes, cells):
        raise InvalidRequest(
            f"--spans is {spans}; {nodes} nodes and a model of {layers} layers with a grain of {grain} allow 1 to "
            f"{min(nodes, cells)}"
        )
    if not 1 <= replicas <= nodes:
        raise InvalidRequest(f"--replicas is {replicas}; it must be 1 to {nodes}, the number of nodes")
    if topology.experts == "own" and spans * replicas > nodes:
        raise InvalidRequest(
            f"{spans} spans with {replicas} replicas each need {spans * replicas} nodes; -n is {nodes}: "
            "give more nodes, or fewer of the others"
        )
    if topology.experts == "own" and not spans and replicas < nodes:
        raise InvalidRequest("--experts own is for --spans; without it every node would hold the whole model")


def _hold(topology: Topology, number: int, layers: int, grain: int) -> tuple[str, ...]:
    span = _span(number % topology.spans, topology.spans, layers, grain) if topology.spans else "*"
    if topology.experts == "own":
        return (f"span:{span}",)
    nodes = topology.nodes
    trunk = (f"trunk:{span}",) if topology.trunks is None or number < topology.trunks else ()
    if topology.replicas == nodes:
        return (*trunk, "experts:*/*")
    classes = ((number + 1 + copy) % nodes for copy in range(topology.replicas))
    return (*trunk, *(f"experts:*/{residue}%{nodes}" for residue in classes))


def _span(index: int, spans: int, layers: int, grain: int) -> str:
    """Its first and last layer.  Boundaries lie on the grid, and spans differ by at most one cell of it."""
    cells = -(-layers // grain)
    first, stop = (index * cells // spans * grain, min((index + 1) * cells // spans * grain, layers))
    return f"{first}-{stop - 1}"
