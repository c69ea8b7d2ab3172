"""Plans as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from peer_scale.pipeline.placement import Placement
from peer_scale.planning.estimate import Plan
from peer_scale.planning.layout import GIB, Cluster, Workload
from peer_scale.planning.stage_works import stage_works


def describe(plan: Plan, workload: Workload, cluster: Cluster) -> str:
    """Give one plan in full: stages, memory, traffic, time, assumptions."""
    networks = [name for name, _ in plan.placement.graph.networks]
    lines = [
        f"{plan.layout}: {plan.num_micro_batches:.4g} micro-batches per step",
        "",
        f"stage  shared{''.join(f'  {name}' for name in networks)}    parameters  gradients  optimizer  activations"
        "   heads  working        GiB",
    ]
    for number, (part, stage) in enumerate(zip(plan.placement.stages, plan.stages, strict=True)):
        layers = "".join(f"{len(part.layers(name)):{len(name) + 2}d}" for name in networks)
        state = stage.state
        lines.append(
            f"{number:5d}{len(part.shared_layers):8d}{layers}"
            f"{_gib(state.parameters):>14}{_gib(state.gradients):>11}{_gib(state.optimizer):>11}"
            f"{_gib(stage.activations):>13}{_gib(stage.heads):>8}{_gib(stage.working):>9}{_gib(stage.total):>11}"
            f"  {', '.join(_ends(plan.placement, number))}".rstrip()
        )
    sent = plan.traffic
    lines += [
        "",
        f"sent per rank and step  tensor-parallel {_gb(sent.tensor)}, pipeline {_gb(sent.pipeline)}, "
        f"gradients {_gb(sent.gradients)}, weights {_gb(sent.parameters)}",
        f"time per step           {plan.step_time * 1e3:,.1f} ms: {_parts(plan)}",
        f"of it                   {_details(plan)}",
        f"bound by                {plan.bound}",
        f"throughput              {plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second * 86400 / 1e9:,.1f} "
        f"billion tokens per day, MFU {plan.mfu:.1%}",
        f"{workload.tokens / 1e9:,.1f} billion tokens   {plan.days:,.1f} days",
        verdict(plan, cluster),
        "",
        *samples(plan, workload),
        assumptions(cluster),
    ]
    return "\n".join(lines)


def _parts(plan: Plan) -> str:
    return ", ".join(f"{name} {seconds * 1e3:,.1f}" for name, seconds in plan.parts.items())


def _details(plan: Plan) -> str:
    """Say what lies within the parts of a step."""
    starved = plan.micro_batches.starved + plan.update.starved
    return (
        f"optimizer and sums of gradients {plan.update.element_wise * 1e3:,.1f}; messages: tensor-parallel "
        f"{plan.micro_batches.messages * 1e3:,.1f}, ZeRO {plan.zero_time * 1e3:,.1f} not hidden; idle: waiting for the "
        f"host {starved * 1e3:,.1f} (its calls take {plan.host_time * 1e3:,.1f}), for the fullest rank "
        f"{plan.waiting_time * 1e3:,.1f}, bubble {plan.bubble_time * 1e3:,.1f} ({plan.bubble:.1%})"
    )


def samples(plan: Plan, workload: Workload) -> list[str]:
    """Say how long samples are taken to be, what of that memory goes by, and what their differences cost."""
    mean = f"{workload.size.tokens:,.1f} of {workload.seq_length} tokens on average, fill {plan.fill:.1%}"
    if workload.lengths is None:
        return [f"samples: all of {workload.seq_length} tokens, fill 100%; memory and time are the most they can be"]
    if not workload.lengths.are_known:
        return [
            f"samples: {mean}, all alike; memory is that of full ones, the most that it can be",
            "balance: what ranks wait for each other is not counted; it follows from the lengths in --data-path",
        ]
    micro = plan.layout.micro_batch_size
    most = workload.fullest_micro_batch(plan.layout).tokens
    bound = f"not one run in a thousand exceeds (full ones would have {micro * workload.seq_length:,.0f})"
    if plan.layout.micro_batch_tokens is not None:
        bound = f"none exceeds; {micro:,.1f} sequences have {micro * workload.size.tokens:,.0f} on average"
    return [
        f"samples: {mean}, by the lengths in the text; memory is that of micro-batches of {most:,.0f} tokens, which "
        f"{bound}",
        f"balance: the fullest of {plan.layout.data_parallel} data-parallel ranks has {plan.waiting_share:.1%} more to "
        f"do than the mean; dealt out in turns it would be {plan.waiting_share_in_turns:.1%}",
    ]


def verdict(plan: Plan, cluster: Cluster) -> str:
    """Say whether the layout fits, and if not, what is in the way."""
    available = cluster.memory - cluster.reserved
    if plan.fits:
        return f"fits: {_gib(plan.peak_memory)} of {_gib(available)} GiB on stage {plan.fullest_stage}"
    stage = plan.stages[plan.fullest_stage]
    parts = {
        "optimizer state (more ranks of any kind)": stage.state.optimizer,
        "parameters and gradients (ZeRO-3, or more tensor or pipeline ranks)": stage.state.parameters
        + stage.state.gradients,
        "activations (smaller micro-batch, --activation-checkpointing, --sequence-parallel)": stage.activations,
        "ZeRO-3's gathered parameters and buffers": stage.working,
        "the heads (smaller micro-batch)": stage.heads,
    }
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"does not fit: stage {plan.fullest_stage} needs {_gib(stage.total)} of {_gib(available)} GiB; most of it, "
        f"{_gib(parts[largest])} GiB, is {largest}"
    )


def table(plans: list[Plan]) -> str:
    """Give one line per plan."""
    lines = [f"{'layout':58} {'m':>4} {'GiB':>6} {'ms/step':>9} {'bubble':>7} {'MFU':>6} {'days':>8}"]
    for plan in plans:
        lines.append(
            f"{plan.layout!s:58} {plan.num_micro_batches:4.4g} {_gib(plan.peak_memory):>6} "
            f"{plan.step_time * 1e3:9,.1f} {plan.bubble:7.1%} {plan.mfu:6.1%} {plan.days:8,.2f}"
            f"{'' if plan.fits else '  does not fit'}"
        )
    return "\n".join(lines)


def assumptions(cluster: Cluster) -> str:
    """Say what the figures stand on."""
    return (
        f"assumed: {cluster.num_ranks} GPUs of {cluster.peak_flops / 1e12:,.0f} TFLOP/s, large products at "
        f"{cluster.efficiency:.0%} of it, attention of long sequences at {cluster.attention:.0%}; "
        f"{cluster.memory_bandwidth / 1e9:,.0f} GB/s of memory; {cluster.intra_bandwidth / 1e9:,.0f} GB/s per GPU "
        f"within a node, {cluster.inter_bandwidth / 1e9:,.0f} GB/s of each GPU's link between nodes, "
        f"{cluster.latency * 1e6:g} us per message, {cluster.launch * 1e6:g} us per kernel; "
        f"{cluster.overlap:.0%} of ZeRO's traffic hidden; {_gib(cluster.reserved)} GiB per GPU for driver, NCCL and "
        "fragmentation; tensor-parallel traffic not hidden"
    )


class Row(NamedTuple):
    """One line of the roofline: the best plan of a model on so many GPUs of a kind."""

    model: str
    gpu: str
    num_gpus: int
    plan: Plan


def roofline(rows: Sequence[Row]) -> str:
    """Give a table in Markdown: milliseconds per step by what they go to, what bounds the step, and the MFU.

    The parts add up to the step. Host calls run beside them; what the GPU waits for them is in idle, with bubbles.
    """
    columns = ("model", "GPU", "GPUs", "layout", "m", *rows[0].plan.parts, "ms/step", "host calls", "bound by", "MFU")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for model, gpu, num_gpus, plan in rows:
        times = (*plan.parts.values(), plan.step_time, plan.host_time)
        cells = [model, gpu, str(num_gpus), str(plan.layout), f"{plan.num_micro_batches:.4g}"]
        cells += [f"{seconds * 1e3:,.1f}" for seconds in times]
        lines.append(f"| {' | '.join([*cells, plan.bound, f'{plan.mfu:.1%}'])} |")
    return "\n".join(lines)


def as_json(plan: Plan) -> str:
    """Give one plan as a line of JSON; layers by their numbers."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return json.dumps(fields | {"placement": _placement(plan.placement)}, default=_plain)


def _placement(placement: Placement) -> dict[str, Any]:
    stages = [
        {
            "shared_layers": part.shared_layers,
            "own_layers": dict(part.own_layers),
            "ends": _ends(placement, number),
        }
        for number, part in enumerate(placement.stages)
    ]
    return {"stages": stages, "costs": dict(placement.costs.works)}


def _ends(placement: Placement, stage: int) -> list[str]:
    """Name what a stage has beside its layers."""
    heads = [head for part in stage_works(placement, stage) if part.ends for head in part.work.heads]
    return ["embeddings"] * placement.stages[stage].has_embeddings + list(dict.fromkeys(heads))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, range) else dataclasses.asdict(value)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3f} GB"
