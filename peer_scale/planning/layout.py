"""What is to be planned: a model's training, the machines, and how ranks share the work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.objectives.graph import Graph, SampleSize
from peer_scale.objectives.objective import Objective
from peer_scale.planning.lengths import Lengths
from peer_scale.samples.masking import MaskingConfig

GIB = 2**30
_CHANCE = 1e-3  # that any micro-batch of a whole run needs more memory than is said


@dataclass(frozen=True)
class Workload:
    """One optimizer step, how many tokens to train on, and how long the samples are.

    Attributes:
        tokens: of the whole run, non-pad ones.
        lengths: of the samples; None where all are full.
        compiled: whether layers run under torch.compile.

    Raises:
        UserError: The objective does not train such a model, or the model has fewer positions than a sequence.
    """

    model: ModelConfig
    objective: Objective
    masking: MaskingConfig
    seq_length: int
    global_batch_size: int
    tokens: float
    precision: str = "bf16"
    lengths: Lengths | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        self.objective.check_model(self.model)
        if self.seq_length > self.model.max_position_embeddings:
            raise UserError(
                f"--seq-length {self.seq_length} is beyond max_position_embeddings {self.model.max_position_embeddings}"
            )

    @cached_property
    def graph(self) -> Graph:
        """Give the works of one micro-batch."""
        return self.objective.graph(self.model)

    @cached_property
    def full(self) -> SampleSize:
        """Give the size of a full sequence, which stages and schedules are made for."""
        return SampleSize.of_sequence(self.seq_length, self.masking.num_predictions(self.seq_length))

    @cached_property
    def size(self) -> SampleSize:
        """Give the mean size of a sample, by which times and traffic go."""
        return self.full if self.lengths is None else self.lengths.mean_size(self.masking)

    @property
    def fill(self) -> float:
        """Tokens over the positions that there would be with padding."""
        return self.size.tokens / self.seq_length

    def fullest(self, micro_batch_size: float) -> SampleSize:
        """Give the size of a sample in the fullest micro-batch of the run, by which memory goes; an upper estimate.

        Samples are full unless it is known how long they are. Then it is what not one run in a thousand exceeds, if
        samples are dealt out at random: equal shares only come out lower. As many tokens as there are, they are taken
        to be in sequences as long as can be.
        """
        if self.lengths is None or not self.lengths.are_known:
            return self.full
        num_micro_batches = max(1.0, self.tokens / self.size.tokens / micro_batch_size)
        tokens = self.lengths.most_tokens(micro_batch_size, _CHANCE / num_micro_batches)
        share, full = tokens / (micro_batch_size * self.seq_length), self.full
        return SampleSize(share * full.tokens, share * full.selected, share * full.token_pairs)

    def fullest_micro_batch(self, layout: ParallelLayout) -> SampleSize:
        """Give the size of the run's fullest micro-batch, all of its sequences together.

        A budget of tokens may be used up, by sequences as long as can be, if a rank has so many.
        """
        if layout.micro_batch_tokens is None:
            return self.fullest(layout.micro_batch_size).times(layout.micro_batch_size)
        share = self.global_batch_size / layout.data_parallel
        return self.full.times(min(share, layout.micro_batch_tokens / self.seq_length))

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight or an activation in the format of the matrix products."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        nodes: how many.
        gpus_per_node: and thus ranks per node.
        memory: bytes per GPU.
        peak_flops: FLOP/s per GPU in the format of the matrix products.
        intra_bandwidth: bytes/s per GPU in one direction, within a node.
        inter_bandwidth: likewise, between nodes: of the GPU's own network link.
        efficiency: share of `peak_flops` that large matrix products get; see `roofline.product_seconds` for others.
        overlap: share of ZeRO's traffic that is hidden behind computation.
        latency: seconds per message.
        launch: seconds in which the CPU starts one kernel; below that a small micro-batch gets no faster.
        reserved: bytes per GPU that the driver, NCCL and fragmentation take.
        memory_bandwidth: bytes/s that kernels get of the GPU's memory.
        attention: share of `peak_flops` that attention gets on long sequences; see `roofline.attention_seconds`.

    Raises:
        UserError: One of them cannot be.
    """

    nodes: int
    gpus_per_node: int
    memory: float
    peak_flops: float
    intra_bandwidth: float
    inter_bandwidth: float
    efficiency: float = 0.8
    overlap: float = 0.5
    latency: float = 20e-6
    launch: float = 5e-6
    reserved: float = 4 * GIB
    memory_bandwidth: float = 2.8475e12  # of an H100, as `gpus` has it
    attention: float = 0.3

    def __post_init__(self) -> None:
        positive = ("nodes", "gpus_per_node", "memory", "peak_flops", "intra_bandwidth", "inter_bandwidth")
        for name in (*positive, "memory_bandwidth"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")
        for name, lowest in (("efficiency", 0.01), ("attention", 0.01), ("overlap", 0.0)):
            if not lowest <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must lie between {lowest:g} and 1")

    @property
    def num_ranks(self) -> int:
        """One per GPU."""
        return self.nodes * self.gpus_per_node

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Give that of a ring over `ranks` ranks that are `stride` apart, for each of them.

        A ring that leaves the nodes passes all of its ranks on a node between two network links. NCCL lays as many such
        rings as a node has links of its ranks, each for a share of the bytes: together they get all of these links.
        """
        if ranks * stride <= self.gpus_per_node:
            return self.intra_bandwidth
        of_a_node = max(1, self.gpus_per_node // stride)
        return min(self.intra_bandwidth, of_a_node * self.inter_bandwidth)


@dataclass(frozen=True)
class ParallelLayout:
    """How ranks share the work; tensor-parallel ranks are neighbours, then data-parallel ones, then stages.

    With a budget of `micro_batch_tokens` the sequences of a micro-batch are a mean, see `balance.within_budget`.
    """

    data_parallel: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    zero_stage: int = 2
    micro_batch_size: float = 1
    sequence_parallel: bool = False
    activation_checkpointing: bool = False
    micro_batch_tokens: int | None = None

    def __str__(self) -> str:
        tokens = self.micro_batch_tokens
        extras = ("SP",) * self.sequence_parallel + ("checkpointing",) * self.activation_checkpointing
        return " ".join(
            (
                f"TP {self.tensor_parallel} x PP {self.pipeline_parallel} x DP {self.data_parallel}",
                f"ZeRO-{self.zero_stage}",
                f"micro-batch {self.micro_batch_size}" if tokens is None else f"micro-batch of {tokens} tokens",
                *extras,
            )
        )

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Count the micro-batches per step of each data-parallel rank; UserError where they do not come out whole."""
        size = int(self.micro_batch_size)
        if global_batch_size % (self.data_parallel * size):
            raise UserError(
                f"--global-batch-size {global_batch_size} is no multiple of data-parallel size {self.data_parallel} x "
                f"--micro-batch-size {size}"
            )
        return global_batch_size // (self.data_parallel * size)


def check_layout(layout: ParallelLayout, workload: Workload) -> None:
    """Raise UserError where the model cannot be cut so, or does not go with torch.compile."""
    if workload.compiled and layout.zero_stage == 3:
        raise UserError("--compile does not go with ZeRO-3, which gathers parameters while the layers run")
    size = layout.tensor_parallel
    for network, shape in workload.graph.networks:
        for name in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(shape, name) % size:
                raise UserError(
                    f"--tensor-model-parallel-size {size} does not divide the {network}'s {name} {getattr(shape, name)}"
                )
