"""What is to be planned: a model's training, the machines, and how ranks share the work."""

from __future__ import annotations

from dataclasses import dataclass

from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.objectives.config import ObjectiveConfig

GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """One optimizer step and how many of them."""

    model: ModelConfig
    objective: ObjectiveConfig
    seq_length: int
    global_batch_size: int
    tokens: float
    precision: str = "bf16"

    @property
    def num_predictions(self) -> int:
        """Selected positions of a full sequence."""
        return self.objective.num_predictions(self.seq_length)

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight or an activation in the format of the matrix products."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs. Bandwidths are of one GPU, one direction, in bytes/s; `latency` is a message's, in seconds.

    `efficiency` is the share of `peak_flops` that matrix products of this size get; `overlap` the share of ZeRO's
    traffic that is hidden behind computation; `reserved` what the driver, NCCL and fragmentation take of the memory;
    `launch` the seconds in which the CPU starts one kernel: below that a small micro-batch gets no faster.
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
        """One a GPU."""
        return self.nodes * self.gpus_per_node

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Of a ring over `ranks` ranks that are `stride` apart: the slower link as soon as it leaves a node."""
        return self.intra_bandwidth if ranks * stride <= self.gpus_per_node else self.inter_bandwidth


@dataclass(frozen=True)
class Layout:
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
        """A data-parallel rank's in one step; UserError where they do not come out whole."""
        a_round = self.data_parallel * self.micro_batch_size
        if global_batch_size % a_round:
            raise UserError(
                f"--global-batch-size {global_batch_size} is no multiple of data-parallel size {self.data_parallel} x "
                f"--micro-batch-size {self.micro_batch_size}"
            )
        return global_batch_size // a_round


def check_layout(layout: Layout, workload: Workload) -> None:
    """Raise UserError where the model or the sequence cannot be cut so."""
    size = layout.tensor_parallel
    for role, shape in (("generator", workload.model.generator), ("ranker", workload.model.ranker)):
        for name in ("num_attention_heads", "ffn_hidden_size"):
            if shape is not None and getattr(shape, name) % size:
                raise UserError(
                    f"--tensor-model-parallel-size {size} does not divide the {role}'s {name} {getattr(shape, name)}"
                )
    if layout.sequence_parallel and workload.seq_length % size:
        raise UserError(f"--tensor-model-parallel-size {size} does not divide --seq-length {workload.seq_length}")
