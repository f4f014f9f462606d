"""Where the ranks of a model are: on the machines of a Ray cluster, which this one belongs to."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Any

from trtforge.errors import ConfigError, DeviceError
from trtforge.manifest import Manifest
from trtforge.runtime.parallel.placement import Placement
from trtforge.runtime.parallel.step_exchange import MessageSender

try:
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # ranks may say the same
    import ray
    import ray.util
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise ConfigError("the executor ray needs the package: pip install 'trtforge[ray]'") from error

from trtforge.runtime.parallel.ray_rank import RankHost, RayNode, RayRank, watch_connection

logger = logging.getLogger(__name__)

_ADDRESS_VARIABLE = "RAY_ADDRESS"  # Ray's own
_NAMESPACE = "trtforge"
_WORDS_EVERY_S = 10.0  # while there is no room in the cluster
_START_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Bundle:
    """A reserved place for one rank."""

    index: int  # in the placement group
    node: RayNode


def place_with_ray(manifest: Manifest) -> Placement:
    """A bundle of a placement group for each rank, on as few machines as possible; waits until the cluster
    has room for all. Every rank has a GPU, where the runtime or the cluster has such, or else a CPU.

    Ranks next to each other are on one machine, as far as possible, and the last ones on this machine, if it
    has some: logits come from there. Raises ConfigError if there is no cluster, and DeviceError if it cannot
    start the processes.
    """
    _connect()
    resource = _resource(manifest)
    group = _reserve(len(manifest.ranks), resource)
    bundles = _in_order(group, ray.get_runtime_context().get_node_id())
    try:
        handles = _start(group, bundles, resource)
    except (ray.exceptions.RayError, queue.Empty, OSError) as error:
        raise DeviceError(f"the Ray cluster could not start the ranks: {error}") from error
    nodes = [bundle.node for bundle in bundles]
    logger.info("Ray has placed the ranks on %s", ", ".join(node.address for node in nodes))
    return Placement(
        handles,
        MessageSender(manifest),
        [nodes.index(node) for node in nodes],
        devices=[0] * len(handles),  # Ray shows each rank its own GPU alone
        signals=None,
        host=handles[0].host,
    )


def _connect() -> None:
    address = os.environ.get(_ADDRESS_VARIABLE, "auto")
    if ray.is_initialized():
        return
    _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, namespace=_NAMESPACE, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(_no_cluster(address, error)) from error
    for number, handler in handlers.items():  # Ray has put its own in their place
        signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # it is for Ray to find
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(_no_cluster(address, error)) from error


def _no_cluster(address: str, error: Exception) -> str:
    return (
        f"the executor ray found no Ray cluster at {address!r}: start one on this machine with ray start "
        f"--head, or join one with ray start --address=HOST:PORT ({error})"
    )


def _resource(manifest: Manifest) -> str:
    if manifest.runtime.startswith("tensorrt"):
        return "GPU"
    return "GPU" if manifest.runtime == "reference" and ray.cluster_resources().get("GPU") else "CPU"


def _reserve(num_ranks: int, resource: str) -> Any:
    """The placement group, once all of its bundles are there."""
    group = ray.util.placement_group([{resource: 1}] * num_ranks, strategy="PACK")
    while not group.wait(_WORDS_EVERY_S):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        free = ray.available_resources().get(resource, 0)
        logger.warning(
            "waiting for room in the Ray cluster: %d ranks need a %s each, %g are free on %d nodes",
            num_ranks,
            resource,
            free,
            len(nodes),
        )
    return group


def _in_order(group: Any, own_node_id: str) -> list[_Bundle]:
    """The bundle of each rank."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    table = ray.util.placement_group_table(group)["bundles_to_node_id"]
    bundles = [_Bundle(int(index), RayNode(node_id, addresses[node_id])) for index, node_id in table.items()]
    return sorted(bundles, key=lambda bundle: (bundle.node.id == own_node_id, bundle.node.id, bundle.index))


def _start(group: Any, bundles: Sequence[_Bundle], resource: str) -> list[RayRank]:
    key = secrets.token_bytes(32)
    with Listener((ray.util.get_node_ip_address(), 0), backlog=len(bundles), authkey=key) as listener:
        hosts = [_make_host(group, bundle, resource) for bundle in bundles]
        arrivals: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        thread = threading.Thread(target=_accept, args=(listener, len(bundles), arrivals), daemon=True)
        thread.start()
        starting = [host.start.remote(rank, listener.address, key) for rank, host in enumerate(hosts)]
        pids = ray.get(starting, timeout=_START_TIMEOUT_S)
        connections = {}
        for _ in bundles:
            connection = arrivals.get(timeout=_START_TIMEOUT_S)
            watch_connection(connection)
            connections[int.from_bytes(connection.recv_bytes(), "big")] = connection
    return [
        RayRank(rank, connections[rank], host, bundle.node, pid)
        for rank, (host, bundle, pid) in enumerate(zip(hosts, bundles, pids, strict=True))
    ]


def _make_host(group: Any, bundle: _Bundle, resource: str) -> Any:
    amounts = {"num_gpus": 1, "num_cpus": 0} if resource == "GPU" else {"num_cpus": 1}
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle.index)
    return ray.remote(RankHost).options(scheduling_strategy=place, **amounts).remote()


def _accept(listener: Listener, count: int, arrivals: queue.SimpleQueue[Connection]) -> None:
    while count:
        try:
            arrivals.put(listener.accept())
        except AuthenticationError:
            logger.warning("somebody without the key has connected to the port for ranks")
            continue
        except OSError:
            return  # it was closed
        count -= 1
