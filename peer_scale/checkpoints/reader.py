"""A checkpoint of the trainer, read without the ranks that wrote it: settings, fp32 weights, tokenizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peer_scale.checkpoints.folder import require_found
from peer_scale.checkpoints.manifest import MANIFEST, TOKENIZER, VOCABULARY_PARAMETERS, Manifest, TensorEntry
from peer_scale.checkpoints.parameters import model_without_weights, sharding_of
from peer_scale.checkpoints.pieces import TensorReader, check_file
from peer_scale.checkpoints.sections import Sections
from peer_scale.corpus.wordpiece import WordPiece, load_wordpiece
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig, padded_vocab_size
from peer_scale.models.networks import PretrainingModel
from peer_scale.objectives.objective import Objective
from peer_scale.parallel.topology import single_process_topology


class Weights(Mapping[str, Tensor]):
    """The fp32 master weights, named as `PretrainingModel` names its parameters, unpadded; read when asked for."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
        self._tensors, self._reader = tensors, TensorReader(folder, tensors)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(name)
        return self._reader.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a weight without reading it."""
        return self._tensors[name].shape


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint; `folder` is the step folder it came from."""

    folder: Path
    sections: Sections
    weights: Weights
    tokenizer: WordPiece

    @property
    def model(self) -> ModelConfig:
        """Sizes of the networks."""
        return self.sections.model

    @property
    def objective(self) -> Objective:
        """What was learned."""
        return self.sections.objective


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the newest committed checkpoint in `path`, or the one that `path` is, whatever layout saved it.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder, manifest = require_found(path)
    for name, entry in manifest.files.items():
        check_file(folder / name, entry)
    return open_checkpoint(folder, manifest)


def open_checkpoint(folder: Path, manifest: Manifest) -> Checkpoint:
    """Do as `read_checkpoint` does, with files that need not be checked."""
    tokenizer = load_wordpiece(str(folder / TOKENIZER))
    if tokenizer.digest != manifest.sections.tokenizer.digest:
        raise UserError(f"{folder / TOKENIZER}: not the tokenizer that the model was trained with (by {MANIFEST})")
    return Checkpoint(folder, manifest.sections, Weights(folder, manifest.tensors), tokenizer)


def empty_model(checkpoint: Checkpoint) -> PretrainingModel:
    """Build our own model on the meta device, in evaluation mode, for `our_weights`.

    Raises:
        UserError: a parameter is missing, superfluous or of another shape than the manifest's model has; all are named.
    """
    config, weights = checkpoint.model, checkpoint.weights
    model = model_without_weights(config, checkpoint.objective, single_process_topology().tensor_parallel)
    shapes = {name: sharding_of(name, p, 1, config.vocab_size).shape for name, p in model.named_parameters()}
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


def our_weights(checkpoint: Checkpoint, name: str) -> Tensor:
    """Give a weight as the model has it: with rows that pad the vocabulary."""
    weight = checkpoint.weights[name]
    if name not in VOCABULARY_PARAMETERS:
        return weight
    padding = padded_vocab_size(len(weight), tensor_parallel=1) - len(weight)
    return torch.cat([weight, weight.new_zeros(padding, *weight.shape[1:])])
