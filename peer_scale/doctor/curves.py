"""The layouts that the doctor tries, the short run by which it does, and when two curves are one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from peer_scale.doctor.outcome import Failed

Steps: TypeAlias = Sequence[dict[str, float]]
"""Of each step the losses and the gradient norm."""

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
_VOCAB_SIZE, _SEQ_LENGTH, _BATCH = 2000, 64, 8


@dataclass(frozen=True)
class Layout:
    """How all ranks share one run.

    Attributes:
        name: in the table.
        tensor: tensor-parallel size.
        pipeline: number of stages.
        zero: ZeRO stage.
        sequence: whether activations are split along the sequence as well.
    """

    name: str
    tensor: int = 1
    pipeline: int = 1
    zero: int = 2
    sequence: bool = False

    def suits(self, ranks: int) -> bool:
        """Say whether so many ranks can be arranged so."""
        return ranks % (self.tensor * self.pipeline) == 0

    @property
    def flags(self) -> tuple[str, ...]:
        """The trainer's flags, but for the ds_config."""
        sizes = ("--tensor-model-parallel-size", str(self.tensor), "--pipeline-model-parallel-size", str(self.pipeline))
        return (*sizes, *(("--sequence-parallel",) if self.sequence else ()))


def layouts(ranks: int) -> list[Layout]:
    """Give one layout for each way of sharing, the plainest first; those of pipelines last, since they may hang."""
    both = [Layout("TP 2, PP 2, SP, ZeRO-1", tensor=2, pipeline=2, zero=1, sequence=True)] if ranks >= 4 else []
    return [
        *(Layout(f"DP {ranks}, ZeRO-{stage}", zero=stage) for stage in (1, 2, 3)),
        Layout("TP 2", tensor=2),
        Layout("TP 2 with SP", tensor=2, sequence=True),
        Layout("PP 2", pipeline=2, zero=1),
        *both,
    ]


class ShortRun:
    """A short run of peer-tiny on a text that every Python carries; nothing is downloaded.

    Without dropout and in fp32, so that all layouts and devices give one curve.
    """

    def __init__(self, folder: Path, *, steps: int, ranks: int) -> None:
        """Write the text; `ranks` are the most that share a step."""
        from pydoc_data.topics import topics  # the language's reference, as help("keywords") shows it

        self.steps = steps
        self._batch = max(_BATCH, 2 * ranks)
        self._ranks, self.folder = ranks, folder
        self._text = folder / "text.txt"
        documents = [" ".join(text.split()) for _, text in sorted(topics.items())]
        self._text.write_text("\n\n".join(documents) + "\n", encoding="utf-8")

    def flags(
        self, layout: Layout | None = None, *, seed: int = 1, precision: str = "fp32", **zero: object
    ) -> list[str]:
        """Give the trainer's flags; without a layout those of one rank. `zero` are keys of the ds_config's block."""
        layout, ranks = (Layout("one", zero=1), 1) if layout is None else (layout, self._ranks)
        share = self._batch * layout.tensor * layout.pipeline // ranks
        words = {
            "model": "peer-tiny",
            "data-path": self._text,
            "cache-dir": self.folder / "cache",
            "vocab-size": _VOCAB_SIZE,
            "seq-length": _SEQ_LENGTH,
            "global-batch-size": self._batch,
            "micro-batch-size": max(1, share // 2),
            "train-iters": self.steps,
            "hidden-dropout": 0,
            "attention-dropout": 0,
            "warmup-epochs": 0.02,  # both parts of the ranking loss within the run
            "seed": seed,
            "deepspeed_config": self._ds_config(layout.zero, zero),
        }
        return [
            *(part for name, value in words.items() for part in (f"--{name}", str(value))),
            f"--{precision}",
            *layout.flags,
        ]

    def _ds_config(self, stage: int, zero: dict[str, object]) -> Path:
        block: dict[str, object] = {"stage": stage, **zero}
        if stage == 3:
            block["stage3_param_persistence_threshold"] = 0  # small parameters are partitioned too
        path = self.folder / f"ds_config_{stage}{''.join(f'_{key}_{value}' for key, value in zero.items())}.json"
        path.write_text(json.dumps({"zero_optimization": block}), encoding="utf-8")
        return path


def compare(found: Steps, expected: Steps, *, norm_tolerance: float = NORM_TOLERANCE) -> str:
    """Say how far a curve is from the expected one.

    Raises:
        Failed: a loss is further off than 1e-4 of its value, or a gradient norm than `norm_tolerance` of its; the line
            names the first step where one is.
    """
    if len(found) != len(expected):
        raise Failed(f"{len(found)} steps instead of {len(expected)}")
    greatest = 0.0
    for number, (step, other) in enumerate(zip(found, expected, strict=True), start=1):
        for name, value in other.items():
            distance = abs(step[name] - value) / max(abs(value), 1e-12)
            tolerance = norm_tolerance if name == "grad_norm" else LOSS_TOLERANCE
            if not distance <= tolerance:  # nan is none
                raise Failed(
                    f"step {number}: {name} is {step[name]:.6g} instead of {value:.6g} (off by {distance:.1e}, allowed "
                    f"{tolerance:.0e})",
                    {"found": list(found), "expected": list(expected)},
                )
            greatest = max(greatest, distance if name != "grad_norm" else 0.0)
    return f"{len(found)} steps, losses within {greatest:.1e}"
