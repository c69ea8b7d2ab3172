"""A checkpoint of the trainer, read without the ranks that wrote it: settings, fp32 weights, tokenizer."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from deepspeed.utils.zero_to_fp32 import (
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_files,
    get_optim_files,
)
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from peer_scale.corpus.wordpiece import WordPiece, load_wordpiece
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.models.networks import PretrainingModel
from peer_scale.objectives.config import ObjectiveConfig
from peer_scale.parallel.topology import single_process_topology
from peer_scale.training.checkpoint import MANIFEST, TOKENIZER, newest
from peer_scale.training.progress import Progress

# What wrappers add to the names of `PretrainingModel`: the task around it, and activation checkpointing within it.
_TASK = "model."
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """What the manifest says of the training data; `fingerprint` and `tokenizer` are digests."""

    fingerprint: str
    tokenizer: str
    seed: int
    seq_length: int
    global_batch_size: int


@dataclass(frozen=True)
class Layout:
    """How the ranks that wrote the checkpoint shared the model."""

    data_parallel: int
    tensor_parallel: int
    pipeline_parallel: int
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class Provenance:
    """The preset's (or own model's) name and where the text came from."""

    model: str
    data_path: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint.

    Attributes:
        folder: the step folder it came from.
        weights: fp32 (the optimizer's master weights), named as `PretrainingModel` names its parameters.
    """

    folder: Path
    model: ModelConfig
    objective: ObjectiveConfig
    data: Data
    layout: Layout
    provenance: Provenance
    progress: Progress
    weights: dict[str, Tensor]
    tokenizer: WordPiece


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the newest committed checkpoint in `path`, or the one that `path` is; any ZeRO stage and number of ranks.

    Raises:
        UserError: there is none, or it is damaged, or it is split by tensor or pipeline parallelism.
    """
    found = newest(path)
    if found is None:
        raise UserError(
            f"--load {path}: no committed checkpoint there; give the trainer's --save folder or a step in it"
        )
    folder, manifest = found
    where = f"{folder / MANIFEST}: "
    data = _parse(Data, manifest.get("data"), where + "data")
    layout = _parse(Layout, manifest.get("layout"), where + "layout")
    for name in ("tensor_parallel", "pipeline_parallel"):
        if getattr(layout, name) != 1:
            raise UserError(f"{where}layout.{name} is {getattr(layout, name)}; only 1 can be read so far")
    return Checkpoint(
        folder,
        model=model_config_from(manifest.get("model"), where + "model"),
        objective=settings_from(ObjectiveConfig, manifest.get("objective"), where + "objective"),
        data=data,
        layout=layout,
        provenance=_parse(Provenance, manifest.get("provenance"), where + "provenance"),
        progress=settings_from(Progress, manifest.get("progress"), where + "progress"),
        weights=_weights(folder),
        tokenizer=_tokenizer(folder, data.tokenizer),
    )


def model_config_from(values: object, where: str) -> ModelConfig:
    """The ModelConfig that `dataclasses.asdict` made `values` of; UserError as for `settings_from`."""
    return settings_from(ModelConfig, values, where)


def settings_from(cls: type[T], values: object, where: str) -> T:
    """An instance of a settings dataclass from its JSON form.

    Raises:
        UserError: a key is missing, unknown, of another type or out of bounds; it is named after `where`.
    """
    settings = _parse(cls, values, where)
    given, known = _keys(values), _keys(dataclasses.asdict(settings))  # type: ignore[call-overload]
    for key in sorted(given ^ known):
        raise UserError(f"{where}.{key}: {'missing' if key in known else 'unknown to this version'}")
    return settings


def _parse(cls: type[T], values: object, where: str) -> T:
    """Checks types only: keys that `cls` lacks are passed over, and those with a default may be missing."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join([where, *map(str, first['loc'])])}: {first['msg']}") from None


def _keys(values: object, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return set()
    own = {f"{prefix}{key}" for key in values}
    return own.union(*(_keys(value, f"{prefix}{key}.") for key, value in values.items()))


def rebuild_model(checkpoint: Checkpoint) -> PretrainingModel:
    """Our own model with the checkpoint's weights, in evaluation mode, in a group of one process.

    Raises:
        UserError: a parameter is missing, superfluous or of another shape than the manifest's model has; all are named.
    """
    model = PretrainingModel(checkpoint.model, checkpoint.objective.num_levels, single_process_topology())
    _fill(model, checkpoint.weights, checkpoint.folder)
    return model.eval()


def _fill(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    parameters = dict(model.named_parameters())
    problems = [
        *(f"lacks the parameter {name}" for name in parameters if name not in weights),
        *(f"has a parameter {name} that its model has not" for name in weights if name not in parameters),
        *(
            f"has {name} in shape {list(weights[name].shape)} where its model has {list(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in weights and weights[name].shape != parameter.shape
        ),
    ]
    if problems:
        raise UserError(f"{folder}: the checkpoint {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = _bf16_optimizer_weights(folder) or get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name
            )
    except Exception as error:  # DeepSpeed and torch.load raise whatever damaged content leads to
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{folder}: the weights cannot be read ({type(error).__name__}: {reason})") from error
    return {name.replace(_CHECKPOINT_WRAPPER, "").removeprefix(_TASK): tensor for name, tensor in state.items()}


def _bf16_optimizer_weights(folder: Path) -> dict[str, Tensor] | None:
    """The fp32 weights where DeepSpeed's BF16_Optimizer wrote the shards, else None.

    It is what ZeRO-1 is in bf16 with fp32 gradient sums. `zero_to_fp32` takes its files for no ZeRO checkpoint, because
    they do not name their stage. Each rank has an equal part of each flat group; only a group's end is padded.
    """
    files = get_optim_files(str(folder))
    shards = [torch.load(file, mmap=True, weights_only=False)["optimizer_state_dict"] for file in files]
    if "zero_stage" in shards[0]:
        return None
    (model_file,) = get_model_state_files(str(folder))
    groups = torch.load(model_file, mmap=True, weights_only=False)["param_shapes"]
    weights: dict[str, Tensor] = {}
    for index, (shapes, ranks) in enumerate(zip(groups, shards[0]["partition_count"], strict=True)):
        if ranks != len(shards):
            raise ValueError(f"{ranks} ranks wrote group {index}, but there are {len(shards)} files")
        flat = torch.cat([shard["single_partition_of_fp32_groups"][index].detach() for shard in shards])
        sizes = [shape.numel() for shape in shapes.values()]
        parts = flat[: sum(sizes)].split(sizes)
        weights |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return weights


def _tokenizer(folder: Path, digest: str) -> WordPiece:
    tokenizer = load_wordpiece(str(folder / TOKENIZER))
    if tokenizer.digest != digest:
        raise UserError(f"{folder / TOKENIZER}: not the tokenizer that the model was trained with (by {MANIFEST})")
    return tokenizer
