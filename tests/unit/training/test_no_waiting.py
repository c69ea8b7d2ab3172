"""A training step leaves nothing for the host to wait for, were its tensors on a GPU."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from peer_scale.kernels.availability import gpu_branches
from peer_scale.objectives.task import PretrainingTask
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import single_process_topology
from peer_scale.samples.examples import Example, collate
from peer_scale.training.late_numbers import LateNumbers
from peer_scale.training.trainer import Trainer
from runs import corpus, ds_config, train_in_pool
from small_runs import small_run
from sync_detector import DeviceWait, no_device_wait

VOCAB = 700


def batch_of(objective, lengths=(32, 9, 20)):
    """Sequences of unequal length, a sixth of their tokens selected."""
    random, examples = np.random.default_rng(0), []
    for length in lengths:
        ids = random.integers(5, VOCAB, length)
        positions = np.sort(random.choice(length, max(1, length // 6), replace=False))
        masked = ids.copy()
        masked[positions] = 4
        uniforms = random.random(len(positions), np.float32)
        extra = random.random((len(positions), objective.num_extra_uniforms), np.float32)
        examples.append(Example(ids, masked, np.zeros_like(ids), positions, uniforms, extra))
    return collate(examples)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("preset", ["peer-tiny", "electra-tiny", "teams-tiny", "bert-tiny"])
def test_from_the_hosts_batch_to_the_steps_sums(preset, dropout):
    run, topology = small_run(preset), single_process_topology()
    model = replace(run.model, vocab_size=VOCAB, hidden_dropout=dropout, attention_dropout=dropout)
    run = replace(run, model=model)
    task = PretrainingTask(model, run.objective, topology.tensor_parallel)
    initialize_weights(task, seed=0, std=0.02, vocab_size=VOCAB, tensor_parallel=topology.tensor_parallel)
    trainer = Trainer(run, topology, None, None, None, None, (), progress=None, warmup_steps=0)
    works = tuple(work.name for work in task.graph.works)
    with gpu_branches(triton=False), no_device_wait():
        batch = batch_of(run.objective).to(topology.device)
        loss, sums, _ = task(works, batch, trainer.step_info(1, [batch]))
        loss.backward()
        late = LateNumbers(trainer.global_sums(sums, 0.0, 1.0))
    *_, votes, faults = late.tolist()
    assert (votes, faults) == (0, 1)
    assert math.isfinite(loss.item())
    assert all(parameter.grad is not None for parameter in task.parameters())


def found_in_a_step(flags, planted=False):
    """Run by a rank: train three steps, the last of them watched; gives what is found."""
    from deepspeed.accelerator import get_accelerator

    plain_step, accelerator = Trainer.train_step, get_accelerator()
    found = []

    def train_step(trainer, step, *batches):
        if step < 3:
            return plain_step(trainer, step, *batches)
        with gpu_branches(triton=False), no_device_wait():
            record = plain_step(trainer, step, *batches)
            if planted:
                record.sums.tolist()
        return record

    # a device as the detector knows it, where DeepSpeed on a CPU says "cpu"
    stand_ins = {name: lambda *_: torch.device("cpu") for name in ("device_name", "current_device_name")}
    stand_ins["synchronize"] = lambda *_: found.append("synchronize")
    Trainer.train_step = train_step
    vars(accelerator).update(stand_ins)
    try:
        train_in_pool(flags)
    except DeviceWait as wait:
        found.append(str(wait))
    finally:
        Trainer.train_step = plain_step
        for name in stand_ins:
            del vars(accelerator)[name]
    return found


@pytest.mark.parametrize(("stage", "planted"), [(1, False), (2, False), (2, True)])
def test_a_whole_step_with_deepspeed(stage, planted, one_rank, text_file, tmp_path):
    flags = ["--model", "peer-tiny", "--bf16", "--train-iters", "3", "--micro-batch-size", "2"]
    flags += ["--global-batch-size", "4", "--deepspeed_config", str(ds_config(tmp_path, stage)), *corpus(text_file)]
    found = one_rank.run(found_in_a_step, [*flags, "--log-dir", str(tmp_path / "log")], planted)[0]
    assert found == (["tolist() of a tensor of the device"] if planted else [])
