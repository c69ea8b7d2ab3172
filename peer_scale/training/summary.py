"""What a run says of itself when it starts."""

from __future__ import annotations

import math
from typing import Any

import torch

from peer_scale.corpus.manifest import unknown_counts
from peer_scale.kernels.attention import describe_attention
from peer_scale.kernels.availability import fused_kernels
from peer_scale.kernels.optional_parts import optional_parts
from peer_scale.models.config import EncoderShape
from peer_scale.parallel.cpu_binding import CpuShare
from peer_scale.parallel.topology import Topology
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS
from peer_scale.samples.loader import ExampleDataset
from peer_scale.settings.run import RunConfig
from peer_scale.training.data import Corpus


def startup_summary(
    run: RunConfig,
    topology: Topology,
    corpus: Corpus,
    num_parameters: int,
    peak: float | None,
    *,
    cpus: CpuShare | None = None,
    num_workers: int = 1,
) -> str:
    """Give a few aligned lines: model, objective, data, batch, layout, device, kernels; then what is worth a notice.

    `cpus` are those beside the rank's GPU.
    """
    training, model, data_parallel = run.training, run.model, topology.size("dp")
    optimizer_offload = run.deepspeed["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    unknown = unknown_counts(corpus.store.prefixes)
    lines = {
        "model": f"{run.name}, {num_parameters / 1e6:.2f} M parameters: {_networks(run)}",
        "objective": f"{run.objective.describe()}; {run.masking.mask_fraction:.0%} of the tokens are selected",
        "data": f"{corpus.store.num_documents:,} documents, {corpus.store.num_tokens:,} tokens; "
        f"vocabulary {model.vocab_size:,}",
        "trained on": f"{_share(corpus.training, corpus)}, {len(corpus.training):,} samples per epoch",
        "held out": _held_out(run, corpus),
        **({"unknown": unknown.describe(corpus.store.num_tokens)} if unknown else {}),
        "batch": f"{training.global_batch_size} x {training.seq_length} tokens "
        f"({_micro_batches(run, corpus.training, data_parallel)}, {data_parallel} ranks); "
        f"{training.train_iters:,} steps, lr {training.lr:g}",
        "layout": f"data parallel {data_parallel}, tensor parallel {run.tensor_parallel}"
        f"{' with sequence parallelism' if run.sequence_parallel else ''}, "
        f"pipeline parallel {run.pipeline_parallel}, ZeRO-{run.zero_stage}, optimizer offload: {optimizer_offload}",
        "device": f"{_device(topology.device)}, {training.precision}, "
        + ("peak not known (no MFU)" if peak is None else f"peak {peak / 1e12:.3g} TFLOP/s per rank"),
        **({} if cpus is None else {"CPUs": f"{cpus.describe()}; {num_workers} processes prepare batches"}),
        "compiled": "layers around their attention, ranking loss, statistics" if training.compile else "nothing",
        "kernel: attention": _attention(run, topology),
        **{f"kernel: {name}": state for name, state in fused_kernels(topology.device).items()},
        "optional parts": optional_parts(topology.device),
    }
    width = max(map(len, lines))
    aligned = [f"{name:<{width}}  {text}" for name, text in lines.items()]
    notices = list(corpus.tokenizer.notices)
    if unknown and (lost := unknown.notice(corpus.store.num_tokens, corpus.tokenizer.word_chars)):
        notices.append(lost)
    return "\n".join([*aligned, *(f"notice: {text}" for text in notices)])


def _micro_batches(run: RunConfig, samples: ExampleDataset, data_parallel: int) -> str:
    training, budget = run.training, run.training.micro_batch_tokens
    if budget is None:
        return f"{training.micro_batch_size} per micro-batch, {run.num_micro_batches} accumulated"
    share = training.global_batch_size // data_parallel
    mean = samples.windows.num_tokens / len(samples) + NUM_SPECIAL_TOKENS
    most = math.ceil(share / (budget // training.seq_length))
    usual = min(most, math.ceil(share * mean / budget))
    number = f"{most}" if usual == most else f"about {usual} of {most} at most"
    return f"up to {budget:,} tokens per micro-batch, {number} accumulated"


def _held_out(run: RunConfig, corpus: Corpus) -> str:
    if corpus.validation is None:
        return "nothing, so there is no validation"
    held_out = f"{_share(corpus.validation, corpus)}, {len(corpus.validation):,} samples; "
    if run.output.eval_interval is None:
        return held_out + "not looked at without --eval-interval"
    return held_out + f"a validation takes {run.output.eval_iters * run.training.global_batch_size:,}"


def _share(samples: ExampleDataset, corpus: Corpus) -> str:
    windows = samples.windows
    share = windows.num_tokens / corpus.store.num_tokens
    return f"{share:.2%} of the tokens ({windows.num_tokens:,}), of {windows.part.num_documents:,} document(s)"


def _attention(run: RunConfig, topology: Topology) -> str:
    dtype, sizes = run.compute_dtype, {shape.head_size for shape in run.model.networks.values()}
    has_bias = run.model.position_embedding == "t5_bias"
    ways = {describe_attention(topology.device, dtype, size, has_score_bias=has_bias) for size in sorted(sizes)}
    return "; ".join(sorted(ways))


def _networks(run: RunConfig) -> str:
    networks = run.model.networks
    if len(networks) == 1:
        return f"encoder {_shape(run.model.main_network)}"
    shared = f", {run.model.num_shared_layers} layers shared" if run.model.num_shared_layers else ""
    return ", ".join(f"{name} {_shape(shape)}" for name, shape in networks.items()) + shared


def _shape(shape: EncoderShape) -> str:
    return f"{shape.num_layers} x {shape.hidden_size}"


def _device(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads per rank"
