"""The trainer on one GPU, with NCCL, against one process on the CPU: the grid's rows of one rank, and precisions.

`pytest -m gpu` on a machine with a GPU (with `-n 8` in five minutes); left out elsewhere.
"""

import json
import shutil

import pytest

from parity.layouts import OFFLOAD, parse
from peer_scale.doctor.curves import compare
from peer_scale.doctor.outcome import Failed
from runs import SMALL, corpus, ds_config, read_metrics, run_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.heavy]

STEPS = 20
ROWS = [
    *("peer", "peer zero1", "peer zero3", "peer offload", "peer recompute", "peer compiled", "peer tok200"),
    *("electra", "electra zero3", "teams", "teams zero3", "teams compiled", "bert", "bert zero1"),
    *("peer modern", "teams modern", "peer t5bias", "electra t5bias compiled"),
]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """The reference of the Python language, which every Python carries."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(topics[name].split()) for name in sorted(topics)) + "\n")
    return path


def train(folder, text_file, flags, *, on_gpu, seed=1):
    """Train as a user does; give the metrics."""
    log_dir = folder / f"{'gpu' if on_gpu else 'cpu'}_{seed}_{abs(hash(tuple(map(str, flags))))}"
    common = ("--train-iters", STEPS, "--seed", seed, "--log-dir", log_dir, "--num-threads", 2)
    environ = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = run_trainer(*SMALL, *corpus(text_file), *common, *flags, **environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return read_metrics(log_dir)


def curve(metrics):
    return [
        {key: value for key, value in line.items() if key.endswith("loss") or key == "grad_norm"} for line in metrics
    ]


def dropout(share):
    return ("--hidden-dropout", share, "--attention-dropout", share)


@pytest.mark.parametrize("row", ROWS)
def test_the_curve_of_one_process_on_the_cpu(row, tmp_path, text_file):
    layout = parse(row)
    config = ("--deepspeed_config", ds_config(tmp_path, layout.zero, **(OFFLOAD if layout.offload else {})))
    reference = ("--deepspeed_config", ds_config(tmp_path, 1))
    parted = None
    for seed in (1, 2):  # one draw of some ten thousand falls on another token by rounding
        flags = ("--fp32", *dropout(0))
        found = train(tmp_path, text_file, (*layout.flags, *flags, *config), on_gpu=True, seed=seed)
        expected = train(tmp_path, text_file, (*layout.reference.flags, *flags, *reference), on_gpu=False, seed=seed)
        try:
            print(row, compare(curve(found), curve(expected)))
            return
        except Failed as failure:
            distances = [abs(one["loss"] / other["loss"] - 1) for one, other in zip(found, expected, strict=True)]
            print(row, seed, failure, [f"{distance:.0e}" for distance in distances])
            parted = parted or failure
    raise parted


@pytest.mark.parametrize("model", ["peer", "electra", "teams", "bert", "peer modern", "peer t5bias"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_follow_32(model, precision, tmp_path, text_file):
    layout = parse(model)
    config = ("--deepspeed_config", ds_config(tmp_path, 2))
    flags = (*layout.flags, *config, *dropout(0))
    half = train(tmp_path, text_file, (*flags, f"--{precision}"), on_gpu=True)
    whole = train(tmp_path, text_file, (*flags, "--fp32"), on_gpu=False)
    skipped = sum(line["loss"] is None or line["grad_norm"] is None for line in half)
    assert skipped == 0 or precision == "fp16"
    if skipped == 0:
        for one, other in zip(half, whole, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, text_file):
    """As near as two runs of one thing are: torch's kernels may add in another order each time."""
    flags = ("--model", "peer-tiny", "--bf16", *dropout(0.1), "--global-batch-size", 8, "--micro-batch-size", 4)
    whole = train(tmp_path, text_file, (*flags, "--save", tmp_path / "save", "--save-interval", 10), on_gpu=True)
    again = train(tmp_path, text_file, flags, on_gpu=True)
    shutil.copytree(tmp_path / "save/step_00000010", tmp_path / "half/step_00000010")
    (tmp_path / "half/latest").write_text("step_00000010")
    resumed = train(tmp_path, text_file, (*flags, "--load", tmp_path / "half"), on_gpu=True)
    print(json.dumps([[line["loss"] for line in each[-10:]] for each in (whole, again, resumed)]))
    assert [line["step"] for line in resumed] == list(range(11, 21))
    for other in (again, resumed):
        for one, expected in zip(other[-10:], whole[-10:], strict=True):
            assert one["loss"] == pytest.approx(expected["loss"], rel=1e-3)
