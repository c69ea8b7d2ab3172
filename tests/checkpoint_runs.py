"""Small runs whose checkpoints tests look at, and an example of what a manifest says of a run."""

from dataclasses import replace
from pathlib import Path

import torch

from peer_scale.checkpoints.initial import write_initial
from peer_scale.checkpoints.parameters import shardings
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import (
    TIES,
    LossScale,
    OptimizerState,
    Provenance,
    RandomStreams,
    Reshaped,
    SavedLayout,
    Sections,
    TokenizerIdentity,
    TrainingData,
)
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.parallel.topology import single_process_topology
from peer_scale.samples.masking import MaskingConfig
from runs import corpus, ds_config

SHAPE = EncoderShape(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
WHOLE = Sections(
    progress=Progress(3, 24, 700),
    optimizer=OptimizerState(2, 1, LossScale(1024.0, 3, -1, 2)),
    model=ModelConfig(SHAPE, SHAPE, num_shared_layers=1),
    objective=TokenQualityRanking(num_levels=4, taus=(1.0, 5.0), gammas=(0.5, 0.25)),
    masking=MaskingConfig(0.2, 0.85),
    tokenizer=TokenizerIdentity("abc"),
    data=TrainingData("def", 1234, 0.01, 64, 8, "tokens"),
    layout=SavedLayout(2, 1, 1, 3, "bf16"),
    provenance=Provenance("peer-tiny", ("a.txt", "b.txt")),
    training={"lr": 0.001, "precision": "bf16"},
    random=RandomStreams(1234),
    ties=TIES,
    reshaped=Reshaped(2, 4),
)
TIMES = (
    *("step_time_s", "data_wait_s", "tokens_per_second", "tflops_per_device", "mfu"),
    *("slowest_rank", "busy_time_s", "rank_data_wait_s", "peak_memory_bytes"),
)


def flags_for(folder: Path, text_file: Path, name: str, *more: object, stage: int = 2, steps: int = 4) -> list[str]:
    flags = [
        *(*corpus(text_file), "--deepspeed_config", ds_config(folder, stage)),
        *("--model", "bert-tiny", "--num-layers", 1, "--train-iters", steps, "--global-batch-size", 4),
        *("--micro-batch-size", 2, "--num-workers", 0, "--log-dir", folder / name, *more),
    ]
    return list(map(str, flags))


def without_times(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


def write_random(folder, model, objective, branch, wordpiece):
    """Write a checkpoint of random numbers, as if the branch had been imported; give the weights by name."""
    imported = {"data": None, "layout": None, "training": None, "reshaped": None, "imported": {branch: "nowhere"}}
    tokenizer = replace(WHOLE.tokenizer, digest=wordpiece.digest)
    sections = replace(WHOLE, model=model, objective=objective, tokenizer=tokenizer, **imported)
    generator = torch.Generator().manual_seed(5)
    ours = shardings(model, objective, single_process_topology().tensor_parallel)
    weights = {
        name: torch.randn(sharding.shape, generator=generator) * 0.2 + ("norm.weight" in name)
        for name, sharding in ours.items()
    }
    write_initial(folder, sections, ours, lambda name: weights[name], wordpiece)
    return weights
