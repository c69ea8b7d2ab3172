"""Whatever layout saved a checkpoint, any other goes on from it, with the same numbers."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint_runs import without_times
from peer_scale.checkpoints.folder import newest
from peer_scale.checkpoints.manifest import KINDS
from peer_scale.checkpoints.pieces import TensorReader
from runs import corpus, ds_config, train_in_pool

STEPS, SAVED = 14, 4
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {  # ranks, ZeRO stage, flags; fp32
    "one": (1, 1, ("--micro-batch-size", "8")),
    "dp2-zero2": (2, 2, ("--micro-batch-size", "4")),
    "dp2-zero3": (2, 3, ("--micro-batch-size", "2")),
    "tp2": (2, 1, (*TP2, "--micro-batch-size", "8")),
    "pp2-zero2": (2, 2, (*PP2, "--micro-batch-size", "4")),
    "pp2-tp2-zero3": (4, 3, (*PP2, *TP2, "--sequence-parallel", "--micro-batch-size", "4")),
}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
SCALER = {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 2, "loss_scale_window": 3}}
OTHERS = {  # with other precisions and blocks of the ds_config
    "bf16-zero1": (2, 1, ("--bf16", "--micro-batch-size", "2"), {}),  # an optimizer of its own in DeepSpeed
    "bf16-zero3-offload": (2, 3, ("--bf16", "--activation-checkpointing", "--micro-batch-size", "4"), OFFLOAD),
    "fp32-zero2-offload": (2, 2, ("--fp32", "--micro-batch-size", "4"), OFFLOAD),
    "fp16-zero2": (2, 2, ("--fp16", "--micro-batch-size", "4", "--model", "bert-tiny", "--num-layers", "1"), SCALER),
}
PAIRS = list(itertools.permutations(LAYOUTS, 2))
QUICK = {*itertools.pairwise(["one", "dp2-zero3", "tp2", "pp2-zero2", "pp2-tp2-zero3", "dp2-zero2", "one"])}


def train_and_probe(flags: list[str], out: str) -> list[dict]:
    """Metrics; writes what DeepSpeed's own functions gather of each parameter, after loading and at the end."""
    from deepspeed.accelerator import get_accelerator

    from peer_scale.training import job

    if "--fp16" in flags:  # which DeepSpeed refuses on this CPU
        get_accelerator().is_fp16_supported = lambda: True
    build_engine, load_checkpoint, device_peak = job.build_engine, job.load_checkpoint, job.device_peak
    engines: list = []

    def kept(*args, **kwargs):
        engines.append(build_engine(*args, **kwargs))
        return engines[-1]

    def loaded(*args, **kwargs):
        progress = load_checkpoint(*args, **kwargs)
        dump(engines[-1], Path(out) / "loaded")
        return progress

    job.build_engine, job.load_checkpoint = kept, loaded
    job.device_peak = lambda *_: None  # measuring it takes longer than these few steps
    try:
        metrics = train_in_pool(flags)
        dump(engines[-1], Path(out) / "end")
    finally:
        job.build_engine, job.load_checkpoint, job.device_peak = build_engine, load_checkpoint, device_peak
        vars(get_accelerator()).pop("is_fp16_supported", None)
    return metrics


def dump(engine, folder):
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() < 3:
        # DeepSpeed does so after its first update, but of the first parameter group alone
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
        moments = [safe_get_full_optimizer_state(parameter, kind) for kind in KINDS[1:]]
        weight = safe_get_full_fp32_param(parameter)
        assert weight is not None, "this DeepSpeed version does not know the parameter"
        found[name.removeprefix("model.").replace("_checkpoint_wrapped_module.", "")] = (dim, [weight, *moments])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def assert_ranks_have(folder, checkpoint, tensor_parallel):
    """Each rank's numbers are its slice of the checkpoint's; all of the checkpoint is on some rank."""
    _, manifest = newest(checkpoint)
    reader = TensorReader(checkpoint, manifest.tensors)
    unseen = set(manifest.tensors)
    for rank, file in enumerate(sorted(folder.iterdir())):
        for name, (dim, found) in torch.load(file).items():
            unseen.discard(name)
            for kind, number in zip(KINDS, found, strict=True):
                whole = reader.whole(name, kind)
                if dim == 0:
                    missing_rows = number.shape[0] * tensor_parallel - whole.shape[0]
                    whole = F.pad(whole, (0, 0) * (whole.ndim - 1) + (0, missing_rows))
                if dim >= 0:
                    whole = whole.chunk(tensor_parallel, dim)[rank % tensor_parallel]
                assert torch.equal(number.float(), whole), (name, kind, rank)
    assert not unseen


class Runs:
    """Runs of each layout on one corpus; the one from the start, which saves, is made once."""

    def __init__(self, request, folder, text_file):
        self._request, self._folder, self._text_file = request, folder, text_file
        self._saved = {}

    def saved(self, layout):
        if layout not in self._saved:
            save = self._folder / layout
            metrics = self.train(layout, layout, "--save", save, "--save-interval", SAVED, "--keep-last", 9)
            self._saved[layout] = save, metrics
        return self._saved[layout]

    def train(self, layout, name, *more):
        ranks, stage, flags, blocks = OTHERS[layout] if layout in OTHERS else (*LAYOUTS[layout], {})
        pool = self._request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[ranks])
        arguments = [
            *(*corpus(self._text_file), "--log-dir", self._folder / f"{name}-log"),
            *("--deepspeed_config", ds_config(self._folder, stage, **dict(blocks)), "--seq-length", 32),
            *("--train-iters", STEPS, "--global-batch-size", 8),
            *(() if "bert-tiny" in flags else ("--warmup-epochs", 0.02)),
            *("--num-attention-heads", 4, "--generator-num-attention-heads", 4),
            *("--hidden-dropout", 0, "--attention-dropout", 0, *flags, *more),
            *(() if layout in OTHERS else ("--fp32",)),
        ]
        return pool.run(train_and_probe, list(map(str, arguments)), str(self._folder / f"{name}-probe"))[0]

    def probe(self, name):
        return self._folder / f"{name}-probe"


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, text_file):
    return Runs(request, tmp_path_factory.mktemp("layouts"), text_file)


def tensor_parallel_size(layout):
    return 2 if "tp2" in layout else 1


def losses(metrics):
    return [line["loss"] for line in metrics if line["step"] > SAVED]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_what_deepspeed_has(layout, runs):
    save, metrics = runs.saved(layout)
    assert losses(metrics) == pytest.approx(losses(runs.saved("one")[1]), rel=1e-5)
    assert_ranks_have(runs.probe(layout) / "end", save / f"step_{STEPS:08d}", tensor_parallel_size(layout))


@pytest.mark.parametrize(
    ("saving", "loading"), [pytest.param(*p, marks=[] if p in QUICK else pytest.mark.slow) for p in PAIRS]
)
def test_any_layout_loads_any_other(saving, loading, runs):
    checkpoint = runs.saved(saving)[0] / f"step_{SAVED:08d}"
    name = f"{saving}-to-{loading}"
    metrics = runs.train(loading, name, "--load", checkpoint)
    assert_ranks_have(runs.probe(name) / "loaded", checkpoint, tensor_parallel_size(loading))
    assert losses(metrics) == pytest.approx(losses(runs.saved("one")[1]), rel=1e-4)


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=pytest.mark.slow if one.endswith("offload") else []) for one in OTHERS]
)
def test_the_same_layout_goes_on_bit_for_bit(layout, runs):
    """In low precision this holds only if the weights that the model computes with are renewed as well."""
    save, whole = runs.saved(layout)
    checkpoint = save / f"step_{SAVED:08d}"
    name = f"{layout}-again"
    metrics = runs.train(layout, name, "--load", checkpoint)
    assert_ranks_have(runs.probe(name) / "loaded", checkpoint, 1)
    assert without_times(metrics) == without_times(whole)[SAVED:]
    if layout.startswith("fp16"):
        scales = [line["loss_scale"] for line in whole]
        assert len({*scales[SAVED:]}) > 1, "a scale that does not change shows nothing"
        assert scales[0] > scales[SAVED - 1], "nor does one without skipped steps"


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ("bf16-zero1", "bf16-zero3-offload"),
        pytest.param("bf16-zero3-offload", "one", marks=pytest.mark.slow),
        pytest.param("dp2-zero3", "bf16-zero1", marks=pytest.mark.slow),
    ],
)
def test_other_precisions_see_the_same_data(saving, loading, runs):
    save, whole = runs.saved(saving)
    checkpoint = save / f"step_{SAVED:08d}"
    name = f"{saving}-to-{loading}"
    metrics = runs.train(loading, name, "--load", checkpoint)
    assert_ranks_have(runs.probe(name) / "loaded", checkpoint, 1)
    seen = [[(line["step"], line["samples"], line["tokens"]) for line in run] for run in (metrics, whole[SAVED:])]
    assert seen[0] == seen[1]
    assert losses(metrics) == pytest.approx(losses(whole), rel=0.02)
