"""A checkpoint of the trainer, read without the ranks that wrote it: settings, fp32 weights, tokenizer."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from peer_scale.checkpoints.folder import require_found
from peer_scale.checkpoints.manifest import IMPORTED, MANIFEST, TOKENIZER, VOCABULARY_PARAMETERS, Manifest
from peer_scale.checkpoints.pieces import TensorReader, check_file
from peer_scale.checkpoints.progress import Progress
from peer_scale.corpus.wordpiece import WordPiece, load_wordpiece
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig, padded_vocab_size
from peer_scale.models.networks import PretrainingModel
from peer_scale.objectives.config import ObjectiveConfig
from peer_scale.parallel.topology import single_process_topology

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """What the manifest says of the training data; `fingerprint` is a digest."""

    fingerprint: str
    seed: int
    seq_length: int
    global_batch_size: int


@dataclass(frozen=True)
class _TokenizerDigest:
    tokenizer: str


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


class Weights(Mapping[str, Tensor]):
    """The fp32 master weights, named as `PretrainingModel` names its parameters, unpadded; read when asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._tensors, self._reader = manifest.tensors, TensorReader(folder, manifest)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(name)
        return self._reader.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, without reading it."""
        return self._tensors[name].shape


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint; `folder` is the step folder it came from.

    One that was imported (`imported` says from where, by network) has seen no data here and has no layout.
    """

    folder: Path
    model: ModelConfig
    objective: ObjectiveConfig
    imported: dict[str, str] | None
    data: Data | None
    layout: Layout | None
    provenance: Provenance
    progress: Progress
    weights: Weights
    tokenizer: WordPiece


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the newest committed checkpoint in `path`, or the one that `path` is, whatever layout saved it.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder, manifest = require_found(path)
    for name, entry in manifest.files.items():
        check_file(folder / name, entry)
    return read_sections(folder, manifest)


def read_sections(folder: Path, manifest: Manifest) -> Checkpoint:
    """As `read_checkpoint`, of files that need not be checked."""
    where, sections = f"{folder / MANIFEST}: ", manifest.sections
    imported = _parse(dict[str, str] | None, sections.get(IMPORTED), where + IMPORTED)  # type: ignore[arg-type]
    data = sections.get("data")
    tokenizer = _parse(_TokenizerDigest, data, where + "data")
    return Checkpoint(
        folder,
        model=model_config_from(sections.get("model"), where + "model"),
        objective=settings_from(ObjectiveConfig, sections.get("objective"), where + "objective"),
        imported=imported,
        data=_parse(Data, data, where + "data") if imported is None else None,
        layout=_parse(Layout, sections.get("layout"), where + "layout") if imported is None else None,
        provenance=_parse(Provenance, sections.get("provenance"), where + "provenance"),
        progress=settings_from(Progress, sections.get("progress"), where + "progress"),
        weights=Weights(folder, manifest),
        tokenizer=_tokenizer(folder, tokenizer.tokenizer),
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


def empty_model(checkpoint: Checkpoint) -> PretrainingModel:
    """Our own model on the meta device, in evaluation mode, for `our_weights`.

    Raises:
        UserError: a parameter is missing, superfluous or of another shape than the manifest's model has; all are named.
    """
    model = model_without_weights(checkpoint.model, checkpoint.objective.num_levels)
    weights = checkpoint.weights
    shapes = {name: _logical_shape(name, parameter, model) for name, parameter in model.named_parameters()}
    problems = [
        *(f"lacks the parameter {name}" for name in shapes if name not in weights),
        *(f"has a parameter {name} that its model has not" for name in weights if name not in shapes),
        *(
            f"has {name} in shape {list(weights.shape(name))} where its model has {list(shape)}"
            for name, shape in shapes.items()
            if name in weights and weights.shape(name) != shape
        ),
    ]
    if problems:
        raise UserError(f"{checkpoint.folder}: the checkpoint {'; '.join(problems)}")
    return model


def model_without_weights(config: ModelConfig, num_levels: int) -> PretrainingModel:
    """Our own model on the meta device, in evaluation mode, in a group of one process."""
    topology = single_process_topology()
    with torch.device("meta"):
        model = PretrainingModel(config, num_levels, topology).eval()
    # nothing is padding where the reader of the logits leaves out what is
    model.mlm_head.register_buffer("is_padding", torch.zeros(len(model.mlm_head.bias), dtype=torch.bool))
    return model


def our_weights(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight as the model has it: with rows that pad the vocabulary."""
    weight = checkpoint.weights[name]
    if name not in VOCABULARY_PARAMETERS:
        return weight
    padding = padded_vocab_size(len(weight), tensor_parallel=1) - len(weight)
    return torch.cat([weight, weight.new_zeros(padding, *weight.shape[1:])])


def _logical_shape(name: str, parameter: nn.Parameter, model: PretrainingModel) -> tuple[int, ...]:
    rows = model.config.vocab_size if name in VOCABULARY_PARAMETERS else parameter.shape[0]
    return (rows, *parameter.shape[1:])


def _tokenizer(folder: Path, digest: str) -> WordPiece:
    tokenizer = load_wordpiece(str(folder / TOKENIZER))
    if tokenizer.digest != digest:
        raise UserError(f"{folder / TOKENIZER}: not the tokenizer that the model was trained with (by {MANIFEST})")
    return tokenizer
