"""Everything a run is told, typed, frozen and checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from peer_scale.configuration import configuration, option
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.objectives.graph import SampleSize
from peer_scale.objectives.objective import Objective
from peer_scale.samples.masking import MaskingConfig

if TYPE_CHECKING:
    import torch

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_AdamBeta = Annotated[float, Field(ge=0, lt=1)]
SeqLength = Annotated[int, Field(ge=8)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@configuration
class TrainingConfig:
    """The optimizer and its schedule (Table 8): Adam with decoupled weight decay, linear warm-up, linear decay to 0."""

    seq_length: SeqLength = option(help="Tokens per sequence.", metavar="N")
    train_iters: PositiveInt = option(
        help="Optimizer steps of the whole run.", metavar="N", ds_config=("scheduler.params.total_num_steps",)
    )
    micro_batch_size: PositiveInt = option(
        help="Sequences that a rank passes through the model at once. Where neither this flag nor the ds_config gives "
        "it, it is lowered to what divides the rank's share of the global batch.",
        metavar="N",
        ds_config=("train_micro_batch_size_per_gpu",),
    )
    micro_batch_tokens: PositiveInt | None = option(
        default=None,
        kw_only=True,
        help="Tokens that a rank passes through the model at once, at most, in place of --micro-batch-size: each step "
        "is cut into as few micro-batches as the lengths of its sequences allow.",
        metavar="N",
        default_text="--micro-batch-size says how many sequences",
    )
    global_batch_size: PositiveInt = option(
        help="Sequences per optimizer step, of all ranks together.", metavar="N", ds_config=("train_batch_size",)
    )
    lr: PositiveFloat = option(
        help="Learning rate at the end of the warm-up; it falls linearly to 0 from there.",
        metavar="X",
        ds_config=("optimizer.params.lr", "scheduler.params.warmup_max_lr"),
    )
    lr_warmup_iters: NonNegativeInt = option(
        default=10_000,
        help="Steps in which the learning rate rises linearly from 0. Where --train-iters is given alone, the warm-up "
        "takes the same share of the steps as before.",
        metavar="N",
        ds_config=("scheduler.params.warmup_num_steps",),
    )
    adam_beta1: _AdamBeta = option(
        default=0.9, help="Decay of Adam's mean of the gradients.", metavar="X", ds_config=("optimizer.params.betas.0",)
    )
    adam_beta2: _AdamBeta = option(
        default=0.999,
        help="Decay of Adam's mean of the squared gradients.",
        metavar="X",
        ds_config=("optimizer.params.betas.1",),
    )
    adam_eps: PositiveFloat = option(
        default=1e-6,
        help="What Adam adds to the root of the squared gradients' mean.",
        metavar="X",
        ds_config=("optimizer.params.eps",),
    )
    adam_bias_correction: bool = option(
        default=True,
        help="Let Adam correct its means for having begun at 0.",
        ds_config=("optimizer.params.bias_correction",),
    )
    weight_decay: NonNegativeFloat = option(
        default=0.01,
        help="Decoupled weight decay of matrices and tables; biases and LayerNorms have none.",
        metavar="X",
        ds_config=("optimizer.params.weight_decay",),
    )
    clip_grad: NonNegativeFloat = option(
        default=1.0,
        help="Norm that gradients are scaled down to where theirs is greater; 0 for no limit.",
        metavar="X",
        ds_config=("gradient_clipping",),
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        default="bf16",
        help={
            "fp32": "Compute in 32-bit floats.",
            "bf16": "Compute in bfloat16, with fp32 master weights.",
            "fp16": "Compute in 16-bit floats with dynamic loss scaling, with fp32 master weights.",
        },
    )
    activation_checkpointing: bool = option(
        default=False, help="Keep only each layer's input for the backward pass and compute the rest again."
    )
    compile: bool = option(
        default=False,
        help="Let torch.compile fuse what surrounds the attention in each layer, and the statistics.",
    )
    on_nan: Literal["stop", "skip", "rollback"] = option(
        default="stop",
        help="What a loss or gradient that is not finite leads to: stop, the run ends; skip, the step has no update; "
        "rollback, back to the newest checkpoint, and around the step's update. fp16 skips such steps by itself.",
        metavar="ACTION",
    )
    on_spike: Literal["ignore", "warn", "skip"] = option(
        default="warn",
        help="What a loss or gradient norm far above that of the last 128 steps leads to: skip, the step has no update "
        "if it is the norm.",
        metavar="ACTION",
    )
    spike_sigmas: PositiveFloat = option(
        default=6.0, help="Standard deviations above the mean of the last 128 steps that make a spike.", metavar="X"
    )
    max_skipped_steps: PositiveInt = option(
        default=100,
        help="Steps in a row that may overflow in fp16, or be skipped by --on-nan or --on-spike, before the run gives "
        "up.",
        metavar="N",
    )

    @property
    def may_skip_updates(self) -> bool:
        """Whether steps may have no update of which the host learns late."""
        return self.precision != "fp16" and (self.on_nan != "stop" or self.on_spike == "skip")


@configuration
class DataConfig:
    """Where the text comes from and how it is fed."""

    data_path: Annotated[tuple[str, ...], Field(min_length=1)] = option(
        default=("builtin",),
        help="Text, JSONL or parquet files or folders of them, a Hugging Face dataset's id, or prefixes of Megatron's "
        ".bin/.idx files.",
        metavar="P",
        default_text="builtin, the documentation that the installed packages carry",
    )
    tokenizer: str | None = option(
        default=None,
        help="WordPiece tokenizer: a folder, a vocab.txt or a tokenizer.json, or a Hugging Face id.",
        metavar="P",
        default_text="one is trained on the text",
    )
    text_key: str = option(default="text", help="Field with the text in JSONL and parquet files.", metavar="KEY")
    cache_dir: Path = option(
        default=Path.home() / ".cache" / "peer_scale",
        help="Where the tokenised text is kept for later runs.",
        metavar="DIR",
        default_text="~/.cache/peer_scale, or peer_scale in $XDG_CACHE_HOME",
    )
    num_workers: NonNegativeInt | None = option(
        default=None,
        help="Processes per rank that prepare batches; 0 prepares them in the training process.",
        metavar="N",
        default_text="1, or on a GPU one for every 4 of the rank's cores, up to 4",
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = option(
        default=0.01, help="Share of the tokens that is held out for validation.", metavar="SHARE"
    )


@configuration
class OutputConfig:
    """What a run writes, how often, and when it stops early."""

    save: Path | None = option(
        default=None,
        help="Folder for checkpoints; the last step is always saved. Where it holds this run's own, the run goes on "
        "from the one that was saved last.",
        metavar="DIR",
        default_text="none are written",
    )
    save_interval: PositiveInt | None = option(
        default=None, help="Steps between checkpoints.", metavar="N", default_text="only the last step is saved"
    )
    keep_last: PositiveInt = option(default=3, help="Newest checkpoints to keep.", metavar="N")
    keep_every: PositiveInt | None = option(
        default=None,
        help="Keep besides them the checkpoint of every Mth step.",
        metavar="M",
        default_text="none besides them",
    )
    async_save: bool = option(
        default=True,
        help="Write checkpoints while training goes on, from a copy in host memory: 12 bytes per parameter of the "
        "rank's share.",
    )
    save_retry_seconds: NonNegativeFloat = option(
        default=30.0,
        help="A checkpoint that cannot be written, on a full disk or one that does not answer, is tried again so much "
        "later, and a second time.",
        metavar="SECONDS",
    )
    max_failed_saves: PositiveInt = option(
        default=3,
        help="Training goes on without a checkpoint that could not be written; after so many in a row it ends, with "
        "exit code 75 where there is one to go on from, else 1.",
        metavar="N",
    )
    load: Path | None = option(
        default=None,
        help="Go on from the checkpoint in DIR that was saved last, or from the one that DIR is, where --save holds "
        "none of this run yet; a step in --save goes back to that one.",
        metavar="DIR",
        default_text="what --save holds of this run",
    )
    init_from: Path | None = option(
        default=None,
        help="Begin at step 0 with the weights of an imported checkpoint or of another run, where neither --save nor "
        "--load has a checkpoint to go on from.",
        metavar="DIR",
        default_text="initial weights",
    )
    set_aside: bool = option(
        default=False,
        help="Where --save or --log-dir holds another run, move all of it into a folder `earlier_N` there, instead of "
        "refusing to start.",
    )
    strict_load: bool = option(
        default=False,
        help="Refuse to start where the newest checkpoint in --save is damaged, instead of putting it aside and going "
        "on from the one before.",
    )
    log_dir: Path | None = option(
        default=None,
        help="Folder for metrics.jsonl, TensorBoard's events and run.yaml.",
        metavar="DIR",
        default_text="none are written",
    )
    report: bool = option(
        default=True,
        help="Write report.html into --log-dir at the end: one page of about 5 MB with the run's curves.",
    )
    log_interval: PositiveInt = option(default=10, help="Steps between printed lines.", metavar="N")
    eval_interval: PositiveInt | None = option(
        default=None,
        help="Steps between validations on the text held out.",
        metavar="N",
        default_text="no validation",
    )
    eval_iters: PositiveInt = option(default=8, help="Global batches per validation.", metavar="N")
    exit_duration_in_mins: NonNegativeFloat | None = option(
        default=None,
        help="Save and stop once the run has trained for so many minutes; 0 stops after one step.",
        metavar="MINUTES",
        default_text="no limit",
    )
    stall_minutes: NonNegativeFloat | None = option(
        default=None,
        help="End with exit code 75, and with the stacks of all ranks, where a step or what follows it takes so many "
        "minutes; 0: never.",
        metavar="MINUTES",
        default_text="ten times the slowest of the last fifty steps, at least 1; 30 between steps",
    )
    profile_steps: str | None = option(
        default=None,
        help="Steps FIRST:LAST, both included, whose trace torch.profiler writes into the log folder.",
        metavar="FIRST:LAST",
        default_text="none",
    )
    profile_ranks: tuple[NonNegativeInt, ...] = option(
        default=(0,), help="Ranks that --profile-steps is about.", metavar="N", default_text="0"
    )
    exit_signal_handler: bool = option(
        default=True, help="With --save: save and stop on SIGTERM or SIGUSR1, with exit code 75."
    )

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_every"):
            if getattr(self, name) is not None and self.save is None:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} needs --save DIR")
        if self.profiled_steps is not None and self.log_dir is None:
            raise UserError(f"--profile-steps {self.profile_steps} needs --log-dir DIR")

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """Give the first and the last step to profile; UserError where `profile_steps` is not two such numbers."""
        if self.profile_steps is None:
            return None
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise UserError(f"--profile-steps {self.profile_steps}: it must be FIRST:LAST, such as 20:25, from 1 on")
        return int(first), int(last)


@configuration
class LaunchConfig:
    """What a process is told that is no part of the run: where the run's settings stand, how loud libraries may be."""

    config: Path | None = option(
        default=None,
        help="YAML file with settings: the run.yaml of another run, or some of its sections and keys. Flags win over "
        "it, and it wins over the preset.",
        metavar="YAML",
        default_text="none",
    )
    deepspeed_config: Path | None = option(
        default=None,
        help="DeepSpeed's configuration: a file, or the name of one that comes with the package, such as zero2. "
        'A value "auto" in it stands for that of flag, YAML file or preset.',
        metavar="JSON",
        flag="deepspeed_config",
        default_text='the YAML file\'s, or ZeRO stage 2 with everything "auto"',
    )
    verbose: bool = option(default=False, help="Let DeepSpeed, Megatron and torch print what they have to say.")
    deepspeed: bool = option(default=False)
    local_rank: NonNegativeInt | None = option(default=None, flag="local_rank", aliases=("local-rank",))


@configuration
class RunConfig:
    """One training run. `deepspeed` is the resolved ds_config as DeepSpeed will see it."""

    name: str = option(
        default="peer-tiny",
        kw_only=True,
        help="Preset: a model with its objective and the hyper-parameters to train it.",
        metavar="NAME",
        flag="model",
    )
    model: ModelConfig
    objective: Objective
    masking: MaskingConfig
    training: TrainingConfig
    data: DataConfig
    output: OutputConfig
    deepspeed: dict[str, Any] = option(no_flag="--deepspeed_config names the file that it comes from")
    seed: Seed = option(
        default=1234,
        help="What initial weights, order of the data, masking, sampling and dropout follow from.",
        metavar="N",
    )
    tensor_parallel: PositiveInt = option(
        default=1,
        help="Ranks that share the matrices of every layer (tensor parallelism).",
        metavar="N",
        flag="tensor-model-parallel-size",
    )
    pipeline_parallel: PositiveInt = option(
        default=1,
        help="Stages that the layers are divided into (pipeline parallelism); what ranks remain are data parallel.",
        metavar="N",
        flag="pipeline-model-parallel-size",
    )
    sequence_parallel: bool = option(
        default=False,
        help="Split activations along the sequence where tensor-parallel ranks would hold the same ones.",
    )
    num_threads: PositiveInt | None = option(
        default=None,
        help="CPU threads per rank.",
        metavar="N",
        default_text="$OMP_NUM_THREADS, or the rank's share of the node's cores",
    )

    def __post_init__(self) -> None:
        if self.training.seq_length > self.model.max_position_embeddings:
            raise UserError(
                f"--seq-length {self.training.seq_length} is beyond the model's "
                f"{self.model.max_position_embeddings} positions (max_position_embeddings)"
            )
        budget = self.training.micro_batch_tokens
        if budget is not None and budget < self.training.seq_length:
            raise UserError(
                f"--micro-batch-tokens {budget} is less than one sequence may have (--seq-length "
                f"{self.training.seq_length})"
            )
        if self.output.eval_interval is not None and self.data.validation_fraction == 0:
            raise UserError(
                f"--eval-interval {self.output.eval_interval} needs held-out text: --validation-fraction is 0"
            )
        if self.training.compile and self.zero_stage == 3:
            raise UserError(
                "--compile does not go with ZeRO-3, which gathers parameters while the layers run: leave it out, or "
                "take ZeRO-1 or ZeRO-2"
            )
        self.objective.check_model(self.model)
        self._check_tensor_parallel()
        self._check_bad_steps()

    def _check_tensor_parallel(self) -> None:
        size = self.tensor_parallel
        for role, shape in self.model.networks.items():
            for name in ("num_attention_heads", "ffn_hidden_size"):
                value = getattr(shape, name)
                if value % size:
                    raise UserError(f"--tensor-model-parallel-size {size} does not divide the {role}'s {name} {value}")
        if self.sequence_parallel and size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size of 2 or more")

    def _check_bad_steps(self) -> None:
        action = self.training.on_nan
        if action == "rollback" and self.output.save is None:
            raise UserError("--on-nan rollback needs --save DIR: it goes back to the newest checkpoint")
        if action == "rollback" and self.training.precision == "fp16":
            raise UserError("--on-nan rollback does not go with --fp16, which overflows now and then by its nature")
        if self.training.on_spike == "skip" and self.training.precision == "fp16":
            raise UserError("--on-spike skip does not go with --fp16, whose overflows are skipped anyway: use bf16")
        if self.training.may_skip_updates and not self.deepspeed["zero_optimization"].get("compute_grad_norm", True):
            raise UserError("--on-nan and --on-spike skip by the gradient norm, which compute_grad_norm switches off")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of the matrix products."""
        import torch

        return getattr(torch, _DTYPES[self.training.precision])

    @property
    def sample_size(self) -> SampleSize:
        """Size of a full sequence: what stages and schedules are made for, whatever the text."""
        seq_length = self.training.seq_length
        return SampleSize.of_sequence(seq_length, self.masking.num_predictions(seq_length))

    @property
    def num_micro_batches(self) -> int | None:
        """Micro-batches per rank and step; None where --micro-batch-tokens lets each step have a number of its own."""
        return None if self.training.micro_batch_tokens is not None else self.deepspeed["gradient_accumulation_steps"]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage 1, 2 or 3."""
        return self.deepspeed["zero_optimization"]["stage"]
