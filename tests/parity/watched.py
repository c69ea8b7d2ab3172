"""Training that is watched: what was drawn for each sample, and how close the draws were."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from runs import train_in_pool


class Watched(NamedTuple):
    """What one rank has seen of a run.

    Attributes:
        metrics: the lines of metrics.jsonl.
        drawn: a digest of each sample with all that was drawn for it: the values without a gradient that works give to
            others, such as sampled tokens, labels and candidates. Empty on later pipeline stages.
        replicated: digests of the weights that tensor-parallel ranks have in common, by name.
        margin: the least distance of a random number from the end of a token's share of the distribution.
    """

    metrics: list[dict]
    drawn: set[str]
    replicated: dict[str, str]
    margin: float


def train_watched(flags: list[str], *, measure_margin: bool = False) -> Watched:
    """Run by every rank of a pool; the margin is measured where the rank has the whole vocabulary."""
    from peer_scale.models import generator_head as head
    from peer_scale.objectives.task import PretrainingTask
    from peer_scale.training import job

    drawn: set[str] = set()
    margins = [1.0]
    engines: list = []
    forward, build_engine, generator_head = PretrainingTask.forward, job.build_engine, head.generator_head

    def watched(self, works, batch, *more):
        loss, sums, given = forward(self, works, batch, *more)
        values = [value.name for name in works for value in self.graph.work(name).gives if not value.has_gradient]
        if values:
            of_tokens = batch.input_ids.double().split(batch.sequences.lengths)
            of_draws = [given[name].double().split(batch.selected.lengths) for name in values]
            drawn.update(
                digest(torch.cat([part.flatten() for part in row])) for row in zip(of_tokens, *of_draws, strict=True)
            )
        return loss, sums, given

    def kept(*args, **kwargs):
        engines.append(build_engine(*args, **kwargs))
        return engines[-1]

    def measured(*args, **kwargs):
        output = generator_head(*args, **kwargs)
        margins.append(least_margin(*args, kwargs["negative_uniforms"], output.negatives))
        return output

    PretrainingTask.forward, job.build_engine = watched, kept
    if measure_margin:
        head.generator_head = measured
    try:
        metrics = train_in_pool(flags)
    finally:
        PretrainingTask.forward, job.build_engine, head.generator_head = forward, build_engine, generator_head
    parameters = engines[0].module.named_parameters()
    replicated = {name: digest(one) for name, one in parameters if not getattr(one, "tensor_model_parallel", False)}
    return Watched(metrics, drawn, replicated, min(margins))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def least_margin(hidden, weight, bias, targets, uniforms, negative_uniforms, negatives) -> float:
    """How near a number came to picking another token than it did, in fp64: arguments of `generator_head`, and more."""
    logits = hidden.double() @ weight.double().t() + bias.double()
    margin = distance(logits, uniforms)
    if negatives is not None:
        taken = targets
        for numbers, ids in zip(negative_uniforms.unbind(1), negatives.unbind(1), strict=True):
            logits = logits.scatter(1, taken[:, None], -torch.inf)
            margin = min(margin, distance(logits, numbers))
            taken = ids
    return margin


def distance(logits: torch.Tensor, uniforms: torch.Tensor) -> float:
    return float((logits.softmax(-1).cumsum(-1) - uniforms[:, None]).abs().min())
