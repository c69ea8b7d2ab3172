"""Everything a run is told, typed, frozen and checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.objectives.graph import SampleSize
from peer_scale.objectives.objective import Objective
from peer_scale.samples.masking import MaskingConfig

if TYPE_CHECKING:
    import torch

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PRECISIONS = tuple(_DTYPES)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer and its schedule (Table 8): Adam with decoupled weight decay, linear warm-up, linear decay to 0."""

    seq_length: int
    train_iters: int
    micro_batch_size: int
    global_batch_size: int
    lr: float
    lr_warmup_iters: int = 10_000
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-6
    adam_bias_correction: bool = True
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    precision: str = "bf16"
    activation_checkpointing: bool = False
    max_skipped_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("train_iters", "micro_batch_size", "global_batch_size", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "adam_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("lr_warmup_iters", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")
        if self.seq_length < 8:
            raise UserError(f"seq_length is {self.seq_length}; it must be at least 8")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is fed."""

    data_path: tuple[str, ...] = ("builtin",)
    tokenizer: str | None = None
    text_key: str = "text"
    cache_dir: Path = Path.home() / ".cache" / "peer_scale"
    num_workers: int = 1
    validation_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(f"--num-workers is {self.num_workers}; it must not be negative")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"--validation-fraction is {self.validation_fraction}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, how often, and when it stops early."""

    save: Path | None = None
    save_interval: int | None = None
    keep_last: int = 3
    keep_every: int | None = None
    async_save: bool = True
    load: Path | None = None
    log_dir: Path | None = None
    log_interval: int = 10
    eval_interval: int | None = None
    eval_iters: int = 8
    exit_duration_in_mins: float | None = None
    exit_signal_handler: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_last", "keep_every", "log_interval", "eval_interval", "eval_iters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.save_interval is not None and self.save is None:
            raise UserError(f"--save-interval {self.save_interval} needs --save DIR")


@dataclass(frozen=True)
class RunConfig:
    """One training run. `deepspeed` is the resolved ds_config as DeepSpeed will see it."""

    name: str
    model: ModelConfig
    objective: Objective
    masking: MaskingConfig
    training: TrainingConfig
    data: DataConfig
    output: OutputConfig
    deepspeed: dict[str, Any]
    seed: int = 1234
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.training.seq_length > self.model.max_position_embeddings:
            raise UserError(
                f"--seq-length {self.training.seq_length} is beyond the model's "
                f"{self.model.max_position_embeddings} positions (max_position_embeddings)"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must be between 0 and 2^32 - 1")
        self.objective.check_model(self.model)
        self._check_tensor_parallel()

    def _check_tensor_parallel(self) -> None:
        size = self.tensor_parallel
        for role, shape in self.model.networks.items():
            for name in ("num_attention_heads", "ffn_hidden_size"):
                value = getattr(shape, name)
                if value % size:
                    raise UserError(f"--tensor-model-parallel-size {size} does not divide the {role}'s {name} {value}")
        if self.sequence_parallel and size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size of 2 or more")
        if self.sequence_parallel and self.training.seq_length % size:
            raise UserError(
                f"--tensor-model-parallel-size {size} does not divide --seq-length {self.training.seq_length}, "
                "as --sequence-parallel needs"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of the matrix products."""
        import torch

        return getattr(torch, _DTYPES[self.training.precision])

    @property
    def sample_size(self) -> SampleSize:
        """Tokens of a full sequence and how many of them are selected."""
        seq_length = self.training.seq_length
        return SampleSize(seq_length, self.masking.num_predictions(seq_length))

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a rank in one step."""
        return self.deepspeed["gradient_accumulation_steps"]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage 1, 2 or 3."""
        return self.deepspeed["zero_optimization"]["stage"]
