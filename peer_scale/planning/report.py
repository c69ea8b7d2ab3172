"""Plans as text."""

from __future__ import annotations

from peer_scale.planning.estimate import Plan
from peer_scale.planning.layout import GIB, Cluster, Workload


def describe(plan: Plan, workload: Workload, cluster: Cluster) -> str:
    """One plan in full: stages, memory, traffic, time, assumptions."""
    lines = [
        f"{plan.layout}: {plan.num_micro_batches} micro-batches a step",
        "",
        "stage  shared  generator  ranker    parameters  gradients  optimizer  activations    head  working        GiB",
    ]
    for number, (part, stage) in enumerate(zip(plan.placement.stages, plan.stages, strict=True)):
        ends = "".join(
            f" {name}"
            for name, has in (
                ("embeddings", part.has_embeddings),
                ("MLM head", part.has_mlm_head),
                ("ranking head", part.has_ranking_head),
            )
            if has
        )
        state = stage.state
        lines.append(
            f"{number:5d}{len(part.shared_layers):8d}{len(part.generator_layers):11d}{len(part.ranker_layers):8d}"
            f"{_gib(state.parameters):>14}{_gib(state.gradients):>11}{_gib(state.optimizer):>11}"
            f"{_gib(stage.activations):>13}{_gib(stage.head):>8}{_gib(stage.working):>9}{_gib(stage.total):>11} {ends}"
        )
    sent = plan.traffic
    lines += [
        "",
        f"a rank sends a step   tensor-parallel {_gb(sent.tensor)}, pipeline {_gb(sent.pipeline)}, "
        f"gradients {_gb(sent.gradients)}, weights {_gb(sent.parameters)}",
        f"time of a step        {plan.step_time * 1e3:,.0f} ms: products {plan.compute_time * 1e3:,.0f}, "
        f"tensor-parallel traffic {plan.tensor_time * 1e3:,.0f}, ZeRO {plan.zero_time * 1e3:,.0f} not hidden; "
        f"bubble {plan.bubble:.1%}",
        f"throughput            {plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second * 86400 / 1e9:,.1f} "
        f"billion tokens a day, MFU {plan.mfu:.1%}",
        f"{workload.tokens / 1e9:,.1f} billion tokens   {plan.days:,.1f} days",
        verdict(plan, cluster),
        "",
        assumptions(cluster),
    ]
    return "\n".join(lines)


def verdict(plan: Plan, cluster: Cluster) -> str:
    """Whether the layout fits, and if not, what is in the way."""
    room = cluster.memory - cluster.reserved
    if plan.fits:
        return f"fits: {_gib(plan.peak_memory)} of {_gib(room)} GiB on stage {plan.fullest_stage}"
    stage = plan.stages[plan.fullest_stage]
    parts = {
        "optimizer state (more ranks of any kind)": stage.state.optimizer,
        "parameters and gradients (ZeRO-3, or more tensor or pipeline ranks)": stage.state.parameters
        + stage.state.gradients,
        "activations (smaller micro-batch, --activation-checkpointing, --sequence-parallel)": stage.activations,
        "ZeRO-3's gathered parameters and buffers": stage.working,
        "the MLM head (smaller micro-batch)": stage.head,
    }
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"does not fit: stage {plan.fullest_stage} needs {_gib(stage.total)} of {_gib(room)} GiB; most of it, "
        f"{_gib(parts[largest])} GiB, is {largest}"
    )


def table(plans: list[Plan]) -> str:
    """One line a plan."""
    lines = [f"{'layout':58} {'m':>4} {'GiB':>6} {'ms/step':>9} {'bubble':>7} {'MFU':>6} {'days':>8}"]
    for plan in plans:
        lines.append(
            f"{plan.layout!s:58} {plan.num_micro_batches:4d} {_gib(plan.peak_memory):>6} {plan.step_time * 1e3:9,.1f} "
            f"{plan.bubble:7.1%} {plan.mfu:6.1%} {plan.days:8,.2f}{'' if plan.fits else '  does not fit'}"
        )
    return "\n".join(lines)


def assumptions(cluster: Cluster) -> str:
    """What the figures stand on."""
    return (
        f"assumed: {cluster.num_ranks} GPUs of {cluster.peak_flops / 1e12:,.0f} TFLOP/s, products at "
        f"{cluster.efficiency:.0%} of it; {cluster.intra_bandwidth / 1e9:,.0f} GB/s a GPU within a node, "
        f"{cluster.inter_bandwidth / 1e9:,.0f} GB/s between nodes, {cluster.latency * 1e6:g} us a message, "
        f"{cluster.launch * 1e6:g} us a kernel; "
        f"{cluster.overlap:.0%} of ZeRO's traffic hidden; {_gib(cluster.reserved)} GiB a GPU for driver, NCCL and "
        "fragmentation; tensor-parallel traffic not hidden; element-wise work within the products' share"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3f} GB"
