"""A checkpoint of the trainer, read without the ranks that wrote it: settings, fp32 weights, tokenizer."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
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
class Checkpoint:
    """One committed checkpoint.

    Attributes:
        folder: the step folder it came from.
        manifest: as committed; `data`, `layout` and `provenance` tell of the run.
        weights: fp32 (the optimizer's master weights), named as `PretrainingModel` names its parameters.
    """

    folder: Path
    manifest: dict[str, Any]
    model: ModelConfig
    objective: ObjectiveConfig
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
        raise UserError(f"--load {path}: no committed checkpoint there; give the trainer's --save folder or a step in it")
    folder, manifest = found
    where = str(folder / MANIFEST)
    for section in ("data", "layout", "provenance"):
        if not isinstance(manifest.get(section), dict):
            raise UserError(f"{where}: the section {section} is missing")
    for name in ("tensor_parallel", "pipeline_parallel"):
        if manifest["layout"].get(name) != 1:
            raise UserError(f"{where}: layout.{name} is {manifest['layout'].get(name)}; only 1 can be read so far")
    return Checkpoint(
        folder,
        manifest,
        model=model_config_from(manifest.get("model"), f"{where}: model"),
        objective=settings_from(ObjectiveConfig, manifest.get("objective"), f"{where}: objective"),
        progress=settings_from(Progress, manifest.get("progress"), f"{where}: progress"),
        weights=_weights(folder),
        tokenizer=_tokenizer(folder, manifest["data"].get("tokenizer")),
    )


def model_config_from(values: object, where: str) -> ModelConfig:
    """The ModelConfig that `dataclasses.asdict` made `values` of; UserError as for `settings_from`."""
    return settings_from(ModelConfig, values, where)


def settings_from(cls: type[T], values: object, where: str) -> T:
    """An instance of a settings dataclass from its JSON form.

    Raises:
        UserError: a key is missing, unknown, of another type or out of bounds; it is named after `where`.
    """
    try:
        settings = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join([where, *map(str, first['loc'])])}: {first['msg']}") from None
    given, known = _keys(values), _keys(dataclasses.asdict(settings))  # type: ignore[call-overload]
    for key in sorted(given ^ known):
        raise UserError(f"{where}.{key}: {'missing' if key in known else 'unknown to this version'}")
    return settings


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
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    except Exception as error:  # DeepSpeed and torch.load raise whatever damaged content leads to
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{folder}: the weights cannot be read ({type(error).__name__}: {reason})") from error
    return {name.replace(_CHECKPOINT_WRAPPER, "").removeprefix(_TASK): tensor for name, tensor in state.items()}


def _tokenizer(folder: Path, digest: object) -> WordPiece:
    tokenizer = load_wordpiece(str(folder / TOKENIZER))
    if tokenizer.digest != digest:
        raise UserError(f"{folder / TOKENIZER}: not the tokenizer that the model was trained with (by {MANIFEST})")
    return tokenizer
