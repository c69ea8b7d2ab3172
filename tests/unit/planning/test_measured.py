"""Measured bandwidths in place of the planner's own."""

import json

import pytest

from peer_scale.commands import plan
from peer_scale.errors import UserError
from peer_scale.planning.layout import Cluster
from peer_scale.planning.measured import Measured

CLUSTER = Cluster(2, 8, 80e9, 1e15, intra_bandwidth=300e9, inter_bandwidth=40e9)
FIGURES = {"intra_bandwidth": 123e9, "inter_bandwidth": None, "latency": 7e-6}
FLAGS = ["--model", "peer-tiny", "--nodes", "1", "--gpus-per-node", "2", "--micro-batch-size", "2"]


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "doctor.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_what_was_measured_takes_the_place_of_what_was_assumed(written):
    cluster = Measured.read(written({"bandwidth": {**FIGURES, "device": "CPU"}})).put_into(CLUSTER)
    assert (cluster.intra_bandwidth, cluster.inter_bandwidth, cluster.latency) == (123e9, 40e9, 7e-6)
    assert (cluster.nodes, cluster.memory, cluster.efficiency) == (2, 80e9, CLUSTER.efficiency)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ([1], "has no bandwidth"),
        ({"checks": []}, "has no bandwidth"),
        ({"bandwidth": None}, "has no bandwidth"),
        ({"bandwidth": {}}, "has none of"),
        ({"bandwidth": {"intra_bandwidth": "fast"}}, "bandwidth.intra_bandwidth is 'fast'"),
        ({"bandwidth": {"intra_bandwidth": -1}}, "bandwidth.intra_bandwidth is -1"),
        ({"bandwidth": {"latency": True}}, "bandwidth.latency is True"),
        ('{"bandwidth": {"latency": NaN}}', "bandwidth.latency is nan"),
        ('{"bandwidth": {"latency": Infinity}}', "bandwidth.latency is inf"),
    ],
)
def test_a_file_that_is_no_report_is_one_line(content, said, written):
    path = written(content)
    with pytest.raises(UserError) as error:
        Measured.read(path)
    assert str(error.value).startswith(f"--measured {path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert plan.main([*FLAGS, "--measured", str(tmp_path / "gone.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: --measured {tmp_path}/gone.json: cannot be read: No such file or directory\n"


def test_the_plan_stands_on_what_was_measured(written, capsys):
    path = str(written({"bandwidth": FIGURES}))
    assert plan.main([*FLAGS, "--measured", path]) == 0
    said = capsys.readouterr().out
    assert "123 GB/s per GPU within a node, 40 GB/s of each GPU's link between nodes, 7 us per message" in said
    # what was not measured may be given
    assert plan.main([*FLAGS, "--measured", path, "--inter-bandwidth", "25"]) == 0
    assert "123 GB/s per GPU within a node, 25 GB/s of each GPU's link between nodes" in capsys.readouterr().out


def test_a_bandwidth_that_would_have_no_effect_is_refused(written, capsys):
    path = str(written({"bandwidth": FIGURES}))
    assert plan.main([*FLAGS, "--measured", path, "--intra-bandwidth", "300"]) == 2
    assert "--intra-bandwidth 300 has no effect" in capsys.readouterr().err


def test_rooflines_are_of_known_machines(written, capsys):
    assert plan.main(["--roofline", "--measured", str(written({"bandwidth": FIGURES}))]) == 2
    assert "--measured has no effect with --roofline" in capsys.readouterr().err
