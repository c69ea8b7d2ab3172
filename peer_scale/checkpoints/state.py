"""Where DeepSpeed keeps a rank's share of the fp32 weights and of Adam's moments: known here and nowhere else.

ZeRO-1, ZeRO-2 and the bf16 optimizer of ZeRO-1 lay each parameter group out flat and give each data-parallel rank an
equal range of it; a parameter's `_hp_mapping` says what of it lies there. ZeRO-3 gives each rank an equal range of
every parameter. Both are seen here as one flat range per parameter, whatever the device.

`check_internals` names what a DeepSpeed version lacks; tests/test_checkpoint_layouts.py compares the numbers with those
that DeepSpeed's own functions put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from peer_scale.checkpoints.manifest import EXP_AVG, EXP_AVG_SQ, KINDS, WEIGHT, Sharding, key_of
from peer_scale.checkpoints.parameters import sharding_of
from peer_scale.checkpoints.pieces import TensorReader
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import LossScale, OptimizerState
from peer_scale.errors import UserError
from peer_scale.parallel.topology import Topology

# What wrappers add to the names of `PretrainingModel`: the task around it, and activation checkpointing within it.
_TASK = "model."
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."

_SCALER_FIELDS = tuple(field.name for field in dataclasses.fields(LossScale))


@dataclass(frozen=True)
class Fragment:
    """The flat range of a parameter's shard that this rank keeps; `length` is 0 where it has nothing of it."""

    name: str
    parameter: Any  # as DeepSpeed has extended it
    sharding: Sharding
    shard: int
    start: int
    length: int


@dataclass(frozen=True)
class OwnedPiece:
    """What this rank is to save of one kind of number of one parameter; `read` gives the live numbers, flat."""

    kind: str
    fragment: Fragment
    length: int
    read: Callable[[], Tensor]

    @property
    def key(self) -> str:
        """Its name in a file."""
        return key_of(self.kind, self.fragment.name)


class TrainingState:
    """The weights and the optimizer's state that a rank has under a DeepSpeed engine."""

    def __init__(self, engine: Any, topology: Topology, vocab_size: int) -> None:
        check_internals(engine)
        self._engine, self._topology, self._vocab_size = engine, topology, vocab_size
        is_zero3 = engine.zero_optimization_stage() == 3
        self._store: _Store = _Zero3(engine, topology) if is_zero3 else _FlatGroups(engine)

    def owned(self) -> list[OwnedPiece]:
        """List what this rank saves: no padding, and what tensor-parallel ranks have in common on the first only."""
        self._store.create_missing()
        return [
            OwnedPiece(kind, fragment, length, self._reader(fragment, kind, length))
            for fragment in self.fragments()
            if (length := self._saved_length(fragment))
            for kind in KINDS
        ]

    def scalars(self) -> OptimizerState:
        """Read Adam's count of updates, the steps that fp16 skipped, and the loss scaler's state."""
        self._store.create_missing()
        updates = {float(self._engine.optimizer.state[master]["step"]) for master in self._store.masters()}
        assert len(updates) == 1, f"Adam has counted {updates} updates"
        scaler = self._dynamic_scaler()
        loss_scale = None if scaler is None else LossScale(*(getattr(scaler, name) for name in _SCALER_FIELDS))
        return OptimizerState(int(updates.pop()), self._engine.skipped_steps, loss_scale)

    def fill(
        self, reader: TensorReader, optimizer: OptimizerState, progress: Progress, kinds: Sequence[str] = KINDS
    ) -> None:
        """Put a checkpoint's numbers of some `kinds` in place; afterwards all ranks call `publish`.

        Raises:
            UserError: a parameter is missing or of another shape there, or a file cannot be read.
        """
        self._store.create_missing()
        for fragment in self.fragments():
            saved = reader.tensors.get(fragment.name)
            if saved is None:
                raise UserError(f"--load {reader.folder}: lacks the parameter {fragment.name}")
            if saved.shape != fragment.sharding.shape:
                shapes = f"{list(saved.shape)} where the model has {list(fragment.sharding.shape)}"
                raise UserError(f"--load {reader.folder}: has {fragment.name} in shape {shapes}")
            for kind in kinds if fragment.length else ():
                where = (fragment.sharding, fragment.shard, fragment.start, fragment.length)
                self._store.put(fragment, kind, reader.flat(fragment.name, kind, *where))
        self._restore_scalars(optimizer, progress)

    def publish(self) -> None:
        """Renew the low-precision weights of all ranks from the fp32 ones."""
        self._store.publish()

    def fragments(self) -> Iterator[Fragment]:
        """Give one for each parameter of the model that this rank has a part of, in the model's order."""
        for wrapped_name, parameter in self._engine.module.named_parameters():
            name = wrapped_name.replace(_CHECKPOINT_WRAPPER, "").removeprefix(_TASK)
            sharding = sharding_of(name, parameter, self._topology.size("tp"), self._vocab_size)
            shard = self._topology.rank("tp") if sharding.dim is not None else 0
            start, length = self._store.span(parameter)
            yield Fragment(name, parameter, sharding, shard, start, length)

    def _saved_length(self, fragment: Fragment) -> int:
        if fragment.sharding.dim is None and self._topology.rank("tp"):
            return 0
        end = min(fragment.start + fragment.length, fragment.sharding.stored(fragment.shard))
        return max(end - fragment.start, 0)

    def _reader(self, fragment: Fragment, kind: str, length: int) -> Callable[[], Tensor]:
        return lambda: self._store.get(fragment, kind).detach()[:length]

    def _restore_scalars(self, optimizer: OptimizerState, progress: Progress) -> None:
        for master in self._store.masters():
            self._engine.optimizer.state[master]["step"].fill_(optimizer.updates)
        self._engine.global_steps = progress.step
        self._engine.global_samples = progress.samples
        self._engine.skipped_steps = optimizer.skipped_steps
        scaler = self._dynamic_scaler()
        if scaler is not None and optimizer.loss_scale is not None:
            for name in _SCALER_FIELDS:
                setattr(scaler, name, getattr(optimizer.loss_scale, name))

    def _dynamic_scaler(self) -> Any:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None


class _Store(Protocol):
    """A kind of DeepSpeed optimizer: which flat range of a parameter's shard a rank has, and the numbers there."""

    def span(self, parameter: Any) -> tuple[int, int]:
        """Give start and length of the range."""

    def get(self, fragment: Fragment, kind: str) -> Tensor:
        """Give at least `fragment.length` numbers."""

    def put(self, fragment: Fragment, kind: str, value: Tensor) -> None:
        """Replace the fragment's numbers."""

    def masters(self) -> list[Tensor]:
        """List the flat fp32 tensors that Adam updates."""

    def create_missing(self) -> None:
        """Give Adam the state that it would make itself at its first update."""

    def publish(self) -> None:
        """Renew the low-precision weights of all ranks from the fp32 ones."""


def _create_adam_state(optimizer: Any, masters: list[Tensor]) -> None:
    for master in masters:
        if not optimizer.state[master]:
            optimizer.state[master].update(
                {
                    "step": torch.zeros((), device=master.device),  # a fused AdamW keeps it beside the parameter
                    EXP_AVG: torch.zeros_like(master, requires_grad=False),
                    EXP_AVG_SQ: torch.zeros_like(master, requires_grad=False),
                }
            )


class _FlatGroups:
    """ZeRO-1, ZeRO-2 and BF16_Optimizer."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer

    def span(self, parameter: Any) -> tuple[int, int]:
        mapping = parameter._hp_mapping
        return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    def get(self, fragment: Fragment, kind: str) -> Tensor:
        mapping = fragment.parameter._hp_mapping
        (master,) = self._optimizer.param_groups[mapping.param_group_index]["params"]
        flat = master if kind == WEIGHT else self._optimizer.state[master][kind]
        address = mapping.get_hp_fragment_address()
        return flat.narrow(0, address.start, address.numel)

    @torch.no_grad()
    def put(self, fragment: Fragment, kind: str, value: Tensor) -> None:
        self.get(fragment, kind).copy_(value)

    def masters(self) -> list[Tensor]:
        return [master for group in self._optimizer.param_groups for master in group["params"]]

    def create_missing(self) -> None:
        _create_adam_state(self._optimizer, self.masters())

    def publish(self) -> None:
        self._optimizer.update_lp_params()


class _Zero3:
    """ZeRO-3: the last rank's range of a parameter may be padded."""

    def __init__(self, engine: Any, topology: Topology) -> None:
        self._optimizer, self._rank = engine.optimizer, topology.rank("dp")

    def span(self, parameter: Any) -> tuple[int, int]:
        size = parameter.ds_tensor.ds_numel
        start = min(self._rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def get(self, fragment: Fragment, kind: str) -> Tensor:
        if kind == WEIGHT:
            return safe_get_local_fp32_param(fragment.parameter)
        return safe_get_local_optimizer_state(fragment.parameter, kind)

    @torch.no_grad()
    def put(self, fragment: Fragment, kind: str, value: Tensor) -> None:
        partition = fragment.parameter.ds_tensor
        padded = torch.zeros(partition.ds_numel)
        padded[: fragment.length] = value
        if kind == WEIGHT:
            safe_set_local_fp32_param(fragment.parameter, padded)
            partition.copy_(padded)  # what the ranks gather from in the forward pass
        else:
            safe_set_local_optimizer_state(fragment.parameter, padded, kind)

    def masters(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def create_missing(self) -> None:
        _create_adam_state(self._optimizer, self.masters())

    def publish(self) -> None:
        # let go of the small parameters that stay gathered, and gather them again
        self._optimizer.checkpoint_event_prologue()
        self._optimizer.checkpoint_event_epilogue()


def check_internals(engine: Any) -> None:
    """Raise RuntimeError naming what this DeepSpeed version does not have where it is expected."""
    if engine.zero_optimization_stage() == 3:
        hooks = ["checkpoint_event_prologue", "checkpoint_event_epilogue"]
        of_optimizer = ["state", "fp32_partitioned_groups_flat", *hooks]
        of_parameters = ["ds_id", "ds_shape", "ds_numel", "ds_tensor"]
    else:
        of_optimizer = ["state", "param_groups", "update_lp_params"]
        of_parameters = ["_hp_mapping"]
    missing = [f"optimizer.{name}" for name in of_optimizer if not hasattr(engine.optimizer, name)]
    parameters = list(engine.module.parameters())
    missing += [f"parameter.{name}" for name in of_parameters if not all(hasattr(p, name) for p in parameters)]
    if missing:
        raise RuntimeError(f"checkpoints: this DeepSpeed version lacks {', '.join(missing)}")


def require_supported_offload(ds_config: dict[str, Any]) -> None:
    """Raise UserError for what ZeRO keeps where a checkpoint cannot take it from."""
    for block in ("offload_optimizer", "offload_param"):
        offload = ds_config["zero_optimization"].get(block) or {}
        for key, usual in (("device", "cpu"), ("ratio", 1.0)):
            value = offload.get(key, usual)
            if value not in (usual, "none"):
                raise UserError(
                    f"the ds_config's zero_optimization.{block}.{key} is {value}, of which no checkpoints can be made "
                    f"or loaded: use {usual}"
                )
