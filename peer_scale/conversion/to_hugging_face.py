"""A checkpoint's network as a folder that plain transformers opens: weights, tokenizer, model card.

One tensor at a time is in memory; while the result is verified, one layer of either model at a time.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from peer_scale.checkpoints.pieces import write_tensors
from peer_scale.checkpoints.reader import Checkpoint, empty_model, our_weights
from peer_scale.conversion.architecture import TOLERANCE, Architecture
from peer_scale.conversion.hugging_face_folder import HuggingFaceWeights
from peer_scale.conversion.model_card import model_card
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.models.networks import PretrainingModel
from peer_scale.objectives.exports import Entry, Export
from peer_scale.storage import new_folder, write_atomically

WEIGHTS = "model.safetensors"
EXTRAS = "peer_scale"
"""The key in config.json for what transformers has no place for (`Export.extras`)."""


def to_hugging_face(checkpoint: Checkpoint, export: Export, output: Path, *, verify: bool = True) -> None:
    """Write an export of the checkpoint into the folder `output`.

    With `verify`, transformers' model must give the logits of our own model with what was written.

    Raises:
        UserError: `output` holds something or cannot be written, the checkpoint's parameters are not those of its
            model, or the logits differ by more than `TOLERANCE`; then nothing is left at `output`.
    """
    architecture = Architecture.of(export, checkpoint.model, checkpoint.objective)
    model = empty_model(checkpoint)
    _check_coverage(checkpoint)
    with new_folder(output, "--output") as aside:
        try:
            theirs = _write(architecture, checkpoint, aside)
            if verify:
                _verify(architecture, checkpoint, model, theirs, aside)
        except SafetensorError as error:
            raise UserError(f"--output {output}: cannot be written: {error}") from None
        for path in aside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def choose_export(checkpoint: Checkpoint, branch: str | None) -> Export:
    """Find the export that `branch` names, by default the objective's first; raise UserError where there is none."""
    exports = checkpoint.objective.exports(checkpoint.model)
    for export in exports:
        if branch in (None, export.branch):
            return export
    known = ", ".join(dict.fromkeys(export.branch for export in exports))
    raise UserError(f"--branch {branch}: this checkpoint has no {branch}; it has: {known}")


def _check_coverage(checkpoint: Checkpoint) -> None:
    """Let no trained number be lost unnoticed: each parameter is in an export's map, or told of as left out."""
    model, objective = checkpoint.model, checkpoint.objective
    architectures = [Architecture.of(export, model, objective) for export in objective.exports(model)]
    known = {name for one in architectures for name in (*(e.ours for e in one.entries), *one.export.left_out)}
    unused = checkpoint.weights.keys() - known
    if unused:
        raise UserError(f"{checkpoint.folder}: no branch's map takes the parameter {', '.join(sorted(unused))}")


def _write(architecture: Architecture, checkpoint: Checkpoint, folder: Path) -> nn.Module:
    """Write all files; give transformers' model on the meta device."""
    class_name = architecture.export.class_name
    config = _config(architecture, checkpoint)
    config.architectures = [class_name]
    config.dtype = "float32"
    theirs = architecture.build(config)
    shapes = architecture.names(theirs)
    entries = architecture.entries
    converted = [name for entry in entries for name in entry.theirs]
    unmatched = sorted(shapes.keys() ^ {*converted})
    if unmatched:
        raise UserError(f"{checkpoint.folder} as {class_name}: {', '.join(unmatched)}: unmatched")
    in_order = {name: shapes[name] for name in converted}
    write_tensors(folder / WEIGHTS, in_order, _converted(checkpoint, entries), format="pt")
    config.save_pretrained(folder)
    _write_tokenizer(checkpoint.tokenizer, checkpoint.model.max_position_embeddings, folder)
    write_atomically(folder / "README.md", model_card(checkpoint, architecture.export).encode())
    return theirs


def _converted(checkpoint: Checkpoint, entries: list[Entry]) -> Iterator[Tensor]:
    for entry in entries:
        yield from entry.convert(checkpoint.weights[entry.ours])


def _config(architecture: Architecture, checkpoint: Checkpoint) -> Any:
    extras = {key: checkpoint.weights[our].tolist() for key, our in architecture.export.extras.items()}
    labels = architecture.export.labels
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    more = {**({EXTRAS: extras} if extras else {}), **(names if labels else {})}
    return architecture.config(checkpoint.tokenizer.pad_id, **more)


def _write_tokenizer(tokenizer: WordPiece, max_length: int, folder: Path) -> None:
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": max_length}
    write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())


def _verify(
    architecture: Architecture, checkpoint: Checkpoint, ours: PretrainingModel, theirs: nn.Module, folder: Path
) -> None:
    written = HuggingFaceWeights(folder, architecture.prefix)
    difference = architecture.difference(ours, partial(our_weights, checkpoint), theirs, written.__getitem__)
    if not difference <= TOLERANCE:  # NaN fails too
        raise UserError(
            f"verification: the logits of {architecture.export.class_name} differ from our own by {difference:.3g}, "
            f"more than {TOLERANCE:g}; nothing was written"
        )
