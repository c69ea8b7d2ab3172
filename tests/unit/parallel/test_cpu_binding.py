"""Ranks share the CPUs near their GPUs: on a made-up node, as its kernel would describe it."""

import os
from pathlib import Path

import pytest

from peer_scale.parallel.cpu_binding import CpuShare, Whereabouts, cpu_list, near_cpus, parse_cpu_list, share_cpus

# Two sockets of 16 cores with two threads each: CPU n and n + 32 are one core.
FIRST_SOCKET, SECOND_SOCKET, ALL = "0-15,32-47", "16-31,48-63", "0-63"
GPUS = {
    "0000:1b:00.0": FIRST_SOCKET,
    "0000:dc:00.0": SECOND_SOCKET,
    "0000:00:1e.0": ALL,  # of a virtual machine that does not know
    "0000:99:00.0": "",
}


@pytest.fixture(scope="module")
def sysfs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sys")
    for cpu in range(64):
        topology = root / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 32},{cpu % 32 + 32}\n")
    (root / "devices/system/cpu/online").write_text(f"{ALL}\n")
    for address, near in GPUS.items():
        (root / "bus/pci/devices" / address).mkdir(parents=True)
        (root / "bus/pci/devices" / address / "local_cpulist").write_text(f"{near}\n")
    return root


@pytest.mark.parametrize(("text", "cpus"), [("0-2,8,10-11\n", (0, 1, 2, 8, 10, 11)), ("", ()), ("7", (7,))])
def test_lists_of_cpus(text, cpus):
    assert parse_cpu_list(text) == cpus
    assert cpu_list(cpus) == text.strip()


@pytest.mark.parametrize("text", ["a", "1-", "1;2", "-1"])
def test_what_is_no_list_of_cpus(text):
    with pytest.raises(ValueError, match="not a list"):
        parse_cpu_list(text)


@pytest.mark.parametrize(
    ("address", "allowed", "near"),
    [
        ("0000:1b:00.0", ALL, FIRST_SOCKET),
        ("0000:dc:00.0", ALL, SECOND_SOCKET),
        ("0000:dc:00.0", "0-7", ""),  # bound by a launcher
        ("0000:1b:00.0", "0-62", ""),
        ("0000:00:1e.0", ALL, ""),  # all CPUs are near: nothing is known
        ("0000:99:00.0", ALL, ""),
        ("0000:aa:00.0", ALL, ""),  # no such device here
        (None, ALL, ""),
    ],
)
def test_an_unbound_process_goes_near_its_gpu(sysfs, address, allowed, near):
    assert cpu_list(near_cpus(address, parse_cpu_list(allowed), sysfs)) == near


def test_nothing_is_near_where_the_kernel_says_nothing(tmp_path):
    assert near_cpus("0000:1b:00.0", range(64), tmp_path) == ()


def told(*near, host="a", allowed=ALL):
    return [Whereabouts(host, allowed, cpus) for cpus in near]


def test_ranks_share_what_is_near_in_whole_cores(sysfs):
    """Eight GPUs whose order does not follow the sockets, and another node with the same numbers."""
    order = [FIRST_SOCKET, SECOND_SOCKET] * 4
    everyone = told(*order) + told(FIRST_SOCKET, FIRST_SOCKET, FIRST_SOCKET, host="b")
    shares = [share_cpus(everyone, rank, sysfs) for rank in range(len(everyone))]
    assert all(share.is_near for share in shares)
    assert [cpu_list(share.cpus) for share in shares[:4]] == ["0-3,32-35", "16-19,48-51", "4-7,36-39", "20-23,52-55"]
    assert sorted(cpu for share in shares[:8] for cpu in share.cpus) == list(range(64))
    assert [share.num_cores for share in shares] == [4] * 8 + [5, 5, 6]
    assert sorted(cpu for share in shares[8:] for cpu in share.cpus) == list(parse_cpu_list(FIRST_SOCKET))


def test_ranks_that_stay_where_they_are_share_what_they_have(sysfs):
    everyone = [*told("", "", ""), *told("", allowed="0-7"), *told("", host="b")]
    found = [share_cpus(everyone, rank, sysfs) for rank in range(5)]
    assert not any(share.is_near for share in found)
    assert [len(share.cpus) for share in found] == [64, 64, 64, 8, 64]
    assert [share.num_cores for share in found] == [10, 11, 11, 8, 32]


def test_more_ranks_than_cores_are_not_left_without_any(tmp_path):
    found = [share_cpus(told(*["0-1"] * 3), rank, tmp_path) for rank in range(3)]  # each CPU is a core: nothing is said
    assert [share.cpus for share in found] == [(0, 1), (0,), (1,)]
    assert [share.num_cores for share in found] == [1, 1, 1]


def test_this_machines_cpus_are_read():
    own = tuple(sorted(os.sched_getaffinity(0)))
    found = share_cpus([Whereabouts("here", cpu_list(own), "")], 0, Path("/sys"))
    assert found.cpus == own
    assert 1 <= found.num_cores <= len(own)
    assert CpuShare((0, 1, 2, 3), 2, is_near=True).describe() == "0-3, near the GPU; 2 cores of its own"
