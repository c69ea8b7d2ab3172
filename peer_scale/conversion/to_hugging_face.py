"""A checkpoint's network as a folder that plain transformers opens: weights, tokenizer, model card.

A tensor at a time is in memory; while the result is verified, a layer of either model at a time.
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
from peer_scale.conversion import electra
from peer_scale.conversion.architecture import GENERATOR, RANKER, TOLERANCE, Architecture
from peer_scale.conversion.hugging_face_folder import HuggingFaceWeights
from peer_scale.conversion.model_card import model_card
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.models.networks import PretrainingModel
from peer_scale.storage import new_folder, write_atomically

WEIGHTS = "model.safetensors"
EXTRAS = "peer_scale"
"""The key in config.json for what transformers has no place for: `free_thresholds`, from which xi_1.. are made."""


def to_hugging_face(
    checkpoint: Checkpoint, output: Path, *, network: str | None = None, verify: bool = True
) -> Architecture:
    """Write `network` of the checkpoint (by default the ranker; BERT has the generator only) into the folder `output`.

    With `verify`, transformers' model must give the logits of our own model with what was written.

    Raises:
        UserError: `output` holds something or cannot be written, the checkpoint's parameters are not those of its
            model, or the logits differ by more than `TOLERANCE`; then nothing is left at `output`.
    """
    architecture = choose_architecture(checkpoint, network)
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
    return architecture


def choose_architecture(checkpoint: Checkpoint, network: str | None) -> Architecture:
    """The architecture for `network`; UserError where the checkpoint has no such network."""
    model = checkpoint.model
    if network == RANKER or (network is None and model.ranker is not None):
        architecture = Architecture(RANKER, "electra")
        architecture.shape(model)
        return architecture
    # BertForMaskedLM cannot project embeddings to another width; ELECTRA's class computes the same function and can
    if model.ranker is None and model.embedding_size == model.generator.hidden_size:
        return Architecture(GENERATOR, "bert")
    return Architecture(GENERATOR, "electra")


def _check_coverage(checkpoint: Checkpoint) -> None:
    """No trained number may be lost unnoticed: each parameter belongs to the map of at least one network."""
    networks = [GENERATOR] if checkpoint.model.ranker is None else [GENERATOR, RANKER]
    entries = [entry for network in networks for entry in Architecture(network, "electra").entries(checkpoint.model)]
    unused = checkpoint.weights.keys() - {entry.ours for entry in entries}
    if unused:
        raise UserError(f"{checkpoint.folder}: no network's map takes the parameter {', '.join(sorted(unused))}")


def _write(architecture: Architecture, checkpoint: Checkpoint, folder: Path) -> nn.Module:
    """Write all files; gives transformers' model on the meta device."""
    config = _config(architecture, checkpoint)
    config.architectures = [architecture.class_name]
    config.dtype = "float32"
    theirs = architecture.build(config)
    shapes = architecture.names(theirs)
    entries = architecture.entries(checkpoint.model)
    converted = [name for entry in entries for name in entry.theirs]
    unmatched = sorted(shapes.keys() ^ {*converted})
    if unmatched:
        raise UserError(f"{checkpoint.folder} as {architecture.class_name}: {', '.join(unmatched)}: unmatched")
    in_order = {name: shapes[name] for name in converted}
    write_tensors(folder / WEIGHTS, in_order, _converted(checkpoint, entries), format="pt")
    config.save_pretrained(folder)
    _write_tokenizer(checkpoint.tokenizer, checkpoint.model.max_position_embeddings, folder)
    write_atomically(folder / "README.md", model_card(checkpoint, architecture.class_name).encode())
    return theirs


def _converted(checkpoint: Checkpoint, entries: list[electra.Entry]) -> Iterator[Tensor]:
    for entry in entries:
        yield from entry.convert(checkpoint.weights[entry.ours])


def _config(architecture: Architecture, checkpoint: Checkpoint) -> Any:
    model, pad_id = checkpoint.model, checkpoint.tokenizer.pad_id
    if architecture.family == "bert":
        return electra.bert_config(model, pad_id)
    more: dict[str, Any] = {}
    if architecture.network == RANKER:
        more[EXTRAS] = {"free_thresholds": checkpoint.weights["ranking_head.free_thresholds"].tolist()}
    return electra.electra_config(model, architecture.shape(model), pad_id, **more)


def _write_tokenizer(tokenizer: WordPiece, max_length: int, folder: Path) -> None:
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": max_length}
    write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())


def _verify(
    architecture: Architecture, checkpoint: Checkpoint, ours: PretrainingModel, theirs: nn.Module, folder: Path
) -> None:
    written = HuggingFaceWeights(folder, architecture.family)
    difference = architecture.difference(ours, partial(our_weights, checkpoint), theirs, written.__getitem__)
    if not difference <= TOLERANCE:  # NaN fails too
        raise UserError(
            f"verification: the logits of {architecture.class_name} differ from our own by {difference:.3g}, "
            f"more than {TOLERANCE:g}; nothing was written"
        )
