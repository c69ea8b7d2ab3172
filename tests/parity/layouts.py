"""Rows of the parity tests: a line of text names a model and how ranks share its training."""

from __future__ import annotations

from dataclasses import dataclass

# every model's networks get as many attention heads as the widest row has tensor-parallel ranks
FOUR_HEADS = ("--num-attention-heads", "4", "--generator-num-attention-heads", "4")
# rows with other blocks than the paper's, in small models of two kinds
BLOCKS = {
    "modern": (
        *("--position-embedding-type", "rotary", "--local-rotary-base", "1000", "--attention-window", "8"),
        *("--global-attention-every-n", "2", "--norm-position", "pre", "--no-norm-bias", "--activation", "geglu"),
        *("--no-linear-bias", "--num-token-types", "0"),
    ),
    "t5bias": (
        *("--position-embedding-type", "t5_bias", "--relative-attention-num-buckets", "8"),
        *("--relative-attention-max-distance", "20", "--normalization", "rms_norm", "--activation", "swiglu"),
    ),
}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@dataclass(frozen=True)
class Layout:
    """How one run is shared out.

    Attributes:
        model: family of the preset, e.g. "teams".
        dp: data-parallel size.
        tp: tensor-parallel size.
        pp: number of pipeline stages.
        zero: ZeRO stage.
        mb: sequences per micro-batch.
        tok: tokens that a micro-batch may have, instead of a number of sequences.
        batch: sequences per step.
        sp: whether activations are split along the sequence as well.
        offload: whether the optimizer is on the host.
        recompute: whether activations are recomputed in backward.
        compiled: whether layers and statistics are compiled.
        modern: whether the blocks are ModernBERT's.
        t5bias: whether scores have T5's bias, and the other blocks are not BERT's either.
    """

    model: str
    dp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 2
    mb: int = 2
    tok: int = 0
    batch: int = 8
    sp: bool = False
    offload: bool = False
    recompute: bool = False
    compiled: bool = False
    modern: bool = False
    t5bias: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def flags(self) -> tuple[str, ...]:
        """The trainer's flags, but for the ds_config."""
        sizes = {
            "model": f"{self.model}-tiny",
            "tensor-model-parallel-size": self.tp,
            "pipeline-model-parallel-size": self.pp,
            **({"micro-batch-tokens": self.tok} if self.tok else {"micro-batch-size": self.mb}),
            "global-batch-size": self.batch,
        }
        switches = {
            "--sequence-parallel": self.sp,
            "--activation-checkpointing": self.recompute,
            "--compile": self.compiled,
        }
        return (
            *(text for name, value in sizes.items() for text in (f"--{name}", str(value))),
            *FOUR_HEADS,
            # both parts of the ranking loss within a run, where the objective has them
            *(("--warmup-epochs", "0.02") if self.model in ("peer", "electra") else ()),
            *(flag for flag, is_on in switches.items() if is_on),
            *(flag for name, flags in BLOCKS.items() if getattr(self, name) for flag in flags),
        )

    @property
    def reference(self) -> Layout:
        """The run that this one must equal: one rank, one micro-batch per step."""
        return Layout(self.model, zero=1, mb=self.batch, batch=self.batch, modern=self.modern, t5bias=self.t5bias)


def parse(row: str) -> Layout:
    """Read a row such as "peer tp2 pp2 sp zero3 mb4": what is not named is 1 or off, ZeRO-2, micro-batches of 2."""
    model, *words = row.split()
    values: dict[str, int | bool] = {}
    for word in words:
        name = word if word in BLOCKS else word.rstrip("0123456789")
        values[name] = int(word[len(name) :]) if name != word else True
    return Layout(model, **values)  # type: ignore[arg-type]
