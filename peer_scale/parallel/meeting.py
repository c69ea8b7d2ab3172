"""Where the ranks of a job meet: an address that this host knows, and a port of the first rank's host."""

from __future__ import annotations

import secrets
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from peer_scale.errors import FoundAlone
from peer_scale.parallel.environment import ANY_PORT, ProcessEnvironment

_SECONDS_TO_BE_KNOWN = 10.0


def open_store(environment: ProcessEnvironment, timeout: timedelta) -> dist.Store:
    """Give the store by which ranks find each other; on rank 0, unless its launcher has done that, in this process.

    Raises:
        FoundAlone: MASTER_ADDR has no address here, or on rank 0 MASTER_PORT is taken.
    """
    if environment.master_port == ANY_PORT:
        return dist.HashStore()  # of this process alone, where a TCPStore would listen on every interface
    host = environment.master_addr.strip("[]")
    require_address(host)
    address = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
    ranks = environment.rank, environment.world_size
    try:
        store, *_ = next(dist.rendezvous(f"{address}:{environment.master_port}", *ranks, timeout=timeout))
    except dist.DistNetworkError as error:
        if environment.rank == 0 and "EADDRINUSE" in str(error):
            raise FoundAlone(port_taken("MASTER_PORT", environment.master_port, "Address already in use")) from None
        raise
    return fresh_part(store, *ranks, timeout) if environment.launcher == "torchrun" else store


def fresh_part(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Give a part of the store in which no earlier start of the job has written anything.

    torchrun keeps one store over its restarts, with the addresses of ranks that have ended, and its count of restarts
    differs between nodes. So every process draws a name of its own, and the first rank tells the part to those names
    that are answered: a rank that has ended does not. Ranks other than the first raise torch's DistStoreError where it
    does not answer in time.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"name of {rank}", own)
        store.wait([f"part for {own}"], timeout)
        part = store.get(f"part for {own}").decode()
        store.set(f"in {part}: {rank}", "")
        return dist.PrefixStore(part, store)
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"name of {other}"]):
                store.set(f"part for {store.get(f'name of {other}').decode()}", own)
            if store.check([f"in {own}: {other}"]):
                missing.discard(other)
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"rank {min(missing)} did not come")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def require_address(name: str, seconds: float = _SECONDS_TO_BE_KNOWN) -> None:
    """Wait until this host knows an address of `name`, so long at most; raise FoundAlone then."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise FoundAlone(no_address("MASTER_ADDR", name, error)) from None
        time.sleep(0.5)


def no_address(what: str, name: str, error: Exception) -> str:
    """Say that a name has no address here."""
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"{what} {name} has no address on {socket.gethostname()} ({reason}): add it to /etc/hosts, or set MASTER_ADDR"
    )


def port_taken(name: str, port: int, reason: str) -> str:
    """Say that a port of this host cannot be had."""
    return (
        f"{name} {port} cannot be had ({reason}): end what listens there (ss -ltnp), or set MASTER_PORT (torchrun, "
        "deepspeed: --master_port) to another"
    )
