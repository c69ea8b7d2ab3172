"""Where ranks meet: what is wrong with the address or the port is one line, and at once."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from peer_scale.commands import train
from peer_scale.errors import FoundAlone
from peer_scale.parallel import meeting
from peer_scale.parallel.environment import ProcessEnvironment
from peer_scale.parallel.meeting import fresh_part, open_store, require_address
from rank_pool import free_port
from runs import outside_of_ranks

SOON = timedelta(seconds=10)


def test_a_port_in_use_is_one_line():
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(
            FoundAlone, match=rf"^MASTER_PORT {port} cannot be had \(Address already in use\): "
        ) as told:
            open_store(ProcessEnvironment(0, 2, 0, 2, "127.0.0.1", port, "environment"), SOON)
    assert "\n" not in str(told.value)


def test_a_store_that_outlives_its_ranks_is_used_afresh():
    """As torchrun's: what ranks have written that are no more is not read, and the first rank waits for the living."""
    store = dist.HashStore()
    for rank in (1, 2):  # they have ended before they read their part
        store.set(f"name of {rank}", f"dead {rank}")
    for start in ("first", "second"):
        with ThreadPoolExecutor(3) as threads:
            ranks = [threads.submit(fresh_part, store, rank, 3, SOON) for rank in (0, 1, 2)]
            parts = [rank.result(timeout=20) for rank in ranks]
        assert not parts[1].check(["address"])
        parts[0].set("address", start)
        assert [part.get("address") for part in parts] == [start.encode()] * 3


@pytest.mark.parametrize("address", ["::1", "[::1]", "127.0.0.1", "localhost"])
def test_addresses_of_both_kinds(address):
    if ":" in address and not _has_ipv6():
        pytest.skip("no IPv6 here")
    store = open_store(ProcessEnvironment(0, 1, 0, 1, address, free_port(), "environment"), SOON)
    store.set("key", "value")
    assert store.get("key") == b"value"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 70 + ".invalid"])
def test_a_name_without_an_address_is_one_line(name):
    with pytest.raises(FoundAlone, match=rf"^MASTER_ADDR {name} has no address on {socket.gethostname()} \(.+\): "):
        require_address(name, seconds=0)


def test_each_node_says_what_its_first_rank_finds(monkeypatch, capsys):
    monkeypatch.setattr(meeting.require_address, "__defaults__", (0.0,))
    monkeypatch.setattr(os, "environ", outside_of_ranks())
    place = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update({**place, "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29512"})
    assert train.main([]) == 2
    assert capsys.readouterr().err.startswith("error: MASTER_ADDR no-such-host.invalid has no address on ")
