"""Which GPU a rank takes, by what its process sees, and where compilers keep their results."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from peer_scale.errors import UserError
from peer_scale.parallel.devices import Place, choose_gpu, contradiction, exchange_places, keep_caches_on_this_node

CACHES = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"}


@pytest.mark.parametrize(
    ("launcher", "ranks", "visible", "chosen"),
    [
        ("torchrun", 8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # all ranks see all GPUs
        ("deepspeed", 2, 8, [0, 1]),  # fewer ranks than GPUs
        ("none", 1, 4, [0]),
        ("srun", 4, 1, [0, 0, 0, 0]),  # --gpus-per-task 1, --gpu-bind=single:1
        ("srun", 2, 2, [0, 1]),  # --gpus-per-task 2: the second rank takes the second of its own two
        ("srun", 4, 2, [0, 1, 0, 1]),
        ("environment", 4, 1, [0, 0, 0, 0]),  # pods of one GPU whose ranks count as one node
        ("torchrun", 4, 1, [0, 0, 0, 0]),  # a script between torchrun and the rank shows each one GPU
    ],
)
def test_a_rank_takes_a_gpu_by_what_it_sees(launcher, ranks, visible, chosen):
    assert chosen == [
        choose_gpu(local_rank=rank, local_world_size=ranks, num_visible=visible, launcher=launcher)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_fewer_gpus_than_ranks_is_one_line(launcher):
    with pytest.raises(UserError) as error:
        choose_gpu(local_rank=0, local_world_size=8, num_visible=4, launcher=launcher)
    assert str(error.value) == f"{launcher} started 8 ranks on this node, which shows them 4 GPUs: start 4 at most"


def places(**gpus_of_hosts):
    return [Place(host, gpu) for host, gpus in gpus_of_hosts.items() for gpu in gpus]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (places(a=[None, None], b=[None]), None),
        (places(a=["G1", "G2", "G3"], b=["G4"]), None),  # nodes of different sizes
        (places(a=["", ""]), None),  # GPUs without a name are not compared
        (
            places(a=["G1", "G2"], b=["G3", "G3"]),
            "ranks 2 and 3 on b see no GPU but one and the same: start a rank per GPU",
        ),
        (
            places(a=["G1"], b=["G2", None]),
            "rank 2 on b sees no GPU, but rank 0 on a does: let all ranks see one, or hide them from all "
            '(CUDA_VISIBLE_DEVICES="")',
        ),
        (
            places(a=[None], b=["G2"]),
            "rank 0 on a sees no GPU, but rank 1 on b does: let all ranks see one, or hide them from all "
            '(CUDA_VISIBLE_DEVICES="")',
        ),
        ([*places(a=["G1", "G1"]), Place("b", "", "too few"), Place("b", "", "late")], "rank 2 on b: too few"),
        ([Place("a", "", "too few")], "too few"),
    ],
)
def test_all_ranks_say_the_same_of_devices_that_do_not_fit(found, said):
    assert contradiction(found) == said


def test_the_ranks_know_each_others_places():
    store, own = dist.HashStore(), places(a=["G1", "G2"], b=[None])
    with ThreadPoolExecutor() as ranks:
        seen = ranks.map(lambda rank: exchange_places(store, rank, 3, own[rank]), reversed(range(3)))
        assert list(seen) == [own] * 3


def test_caches_lie_in_a_folder_of_the_user_alone(tmp_path):
    environ = {"TRITON_CACHE_DIR": "/chosen", "HOME": "/home/me"}
    for _ in range(2):  # the second rank of a node finds the folder
        keep_caches_on_this_node(environ, tmp_path)
    own = tmp_path / f"peer_scale_{os.getuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert environ == {
        "TRITON_CACHE_DIR": "/chosen",
        "HOME": "/home/me",
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        "TORCH_EXTENSIONS_DIR": str(own / "torch_extensions"),
    }


@pytest.mark.parametrize("kind", ["open to others", "link", "file", "no folder"])
def test_a_folder_that_others_could_write_is_not_taken(tmp_path, kind):
    own, folder = tmp_path / f"peer_scale_{os.getuid()}", tmp_path
    if kind == "open to others":
        own.mkdir()
        own.chmod(0o770)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        own.touch()
    else:
        folder = tmp_path / "missing"
    environ: dict[str, str] = {}
    keep_caches_on_this_node(environ, folder)
    assert not CACHES & environ.keys()
