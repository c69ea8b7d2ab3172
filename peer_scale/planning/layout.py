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

    def fullest(self, micro_batch_size: int) -> SampleSize:
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
        inter_bandwidth: likewise, between nodes.
        efficiency: share of `peak_flops` that matrix products of this size get.
        overlap: share of ZeRO's traffic that is hidden behind computation.
        latency: seconds per message.
        launch: seconds in which the CPU starts one kernel; below that a small micro-batch gets no faster.
        reserved: bytes per GPU that the driver, NCCL and fragmentation take.

    Raises:
        UserError: One of them cannot be.
    """

    nodes: int
    gpus_per_node: int
    memory: float
    peak_flops: float
    intra_bandwidth: float
    inter_bandwidth: float
    efficiency: float = 0.5
    overlap: float = 0.5
    latency: float = 20e-6
    launch: float = 5e-6
    reserved: float = 4 * GIB

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "memory", "peak_flops", "intra_bandwidth", "inter_bandwidth"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")
        for name, lowest in (("efficiency", 0.01), ("overlap", 0.0)):
            if not lowest <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must lie between {lowest:g} and 1")

    @property
    def num_ranks(self) -> int:
        """One per GPU."""
        return self.nodes * self.gpus_per_node

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Give that of a ring over `ranks` ranks that are `stride` apart: the slower link once it leaves a node."""
        return self.intra_bandwidth if ranks * stride <= self.gpus_per_node else self.inter_bandwidth


@dataclass(frozen=True)
class ParallelLayout:
    """How ranks share the work; tensor-parallel ranks are neighbours, then data-parallel ones, then stages."""

    data_parallel: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    zero_stage: int = 2
    micro_batch_size: int = 1
    sequence_parallel: bool = False
    activation_checkpointing: bool = False

    def __str__(self) -> str:
        extras = ("SP",) * self.sequence_parallel + ("checkpointing",) * self.activation_checkpointing
        return " ".join(
            (
                f"TP {self.tensor_parallel} x PP {self.pipeline_parallel} x DP {self.data_parallel}",
                f"ZeRO-{self.zero_stage}",
                f"micro-batch {self.micro_batch_size}",
                *extras,
            )
        )

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Count the micro-batches per step of each data-parallel rank; UserError where they do not come out whole."""
        at_once = self.data_parallel * self.micro_batch_size
        if global_batch_size % at_once:
            raise UserError(
                f"--global-batch-size {global_batch_size} is no multiple of data-parallel size {self.data_parallel} x "
                f"--micro-batch-size {self.micro_batch_size}"
            )
        return global_batch_size // at_once


def check_layout(layout: ParallelLayout, workload: Workload) -> None:
    """Raise UserError where the model cannot be cut so."""
    size = layout.tensor_parallel
    for network, shape in workload.graph.networks:
        for name in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(shape, name) % size:
                raise UserError(
                    f"--tensor-model-parallel-size {size} does not divide the {network}'s {name} {getattr(shape, name)}"
                )
