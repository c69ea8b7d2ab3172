"""A checkpoint's network as a folder that plain transformers opens: weights, tokenizer, model card."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor

from peer_scale.conversion import bert, electra
from peer_scale.conversion.checkpoint_reader import Checkpoint, rebuild_model
from peer_scale.conversion.model_card import model_card
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.models.networks import PretrainingModel
from peer_scale.storage import fsync_folder, write_atomically

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Export:
    """What one network becomes.

    Attributes:
        architecture: transformers' class, by name.
        config: of that class.
        entries: the map to its parameters.
        logits: our own model's, for ids, token types and mask [B, S] (True on text); shaped as those of the class.
    """

    architecture: str
    config: Any
    entries: list[electra.Entry]
    logits: Callable[[PretrainingModel, Tensor, Tensor, Tensor], Tensor]


def to_hugging_face(checkpoint: Checkpoint, output: Path, *, network: str | None = None, verify: bool = True) -> Export:
    """Write `network` of the checkpoint (by default the ranker; BERT has the generator only) into the folder `output`.

    With `verify`, the written folder is opened with transformers and must give the logits of our own model.

    Raises:
        UserError: `output` holds something or cannot be written, the checkpoint's parameters are not those of its
            model, or the logits differ by more than `TOLERANCE`; then nothing is left at `output`.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an empty folder; give another one")
    export = choose_export(checkpoint, network)
    model = rebuild_model(checkpoint)
    _check_coverage(checkpoint)
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        _write(export, checkpoint, aside)
        if verify:
            _verify(export, model, aside)
        _commit(aside, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return export


def choose_export(checkpoint: Checkpoint, network: str | None) -> Export:
    """The architecture for `network`; UserError where the checkpoint has no such network."""
    model, pad_id = checkpoint.model, checkpoint.tokenizer.pad_id
    if network == "ranker" or (network is None and model.ranker is not None):
        entries = electra.ranker_entries(model)
        assert model.ranker is not None
        config = electra.electra_config(model, model.ranker, pad_id)
        return Export("ElectraForPreTraining", config, entries, ranker_logits)
    # BertForMaskedLM cannot project embeddings to another width; ELECTRA's class computes the same function and can
    if model.ranker is None and model.embedding_size == model.generator.hidden_size:
        return Export(
            "BertForMaskedLM", bert.bert_config(model, pad_id), bert.masked_lm_entries(model), generator_logits
        )
    config = electra.electra_config(model, model.generator, pad_id)
    return Export("ElectraForMaskedLM", config, electra.generator_entries(model), generator_logits)


def ranker_logits(model: PretrainingModel, ids: Tensor, token_types: Tensor, mask: Tensor) -> Tensor:
    """-w.h + xi_{K-1}, the logit of "replaced" (Eq. 3): [B, S]."""
    scores, thresholds = model.ranking_head(model.encode(model.ranker, ids, token_types, mask))
    return thresholds[-1] - scores.transpose(0, 1)


def generator_logits(model: PretrainingModel, ids: Tensor, token_types: Tensor, mask: Tensor) -> Tensor:
    """The MLM head's logits at every position: [B, S, vocabulary]."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    states, bias = model.generate(model.encode(model.generator, ids, token_types, mask), positions)
    logits = F.linear(states, model.embeddings.word.weight, bias)
    return logits[:, : model.config.vocab_size].unflatten(0, ids.shape)


def _check_coverage(checkpoint: Checkpoint) -> None:
    """No trained number may be lost unnoticed: each parameter belongs to the map of at least one network."""
    entries = electra.generator_entries(checkpoint.model)
    if checkpoint.model.ranker is not None:
        entries += electra.ranker_entries(checkpoint.model)
    unused = checkpoint.weights.keys() - {entry.ours for entry in entries}
    if unused:
        raise UserError(f"{checkpoint.folder}: no network's map takes the parameter {', '.join(sorted(unused))}")


def _write(export: Export, checkpoint: Checkpoint, folder: Path) -> None:
    model = getattr(transformers, export.architecture)(export.config)
    state = electra.convert(checkpoint.weights, export.entries)
    problems = [f"{name} is unmatched" for name in sorted(state.keys() ^ model.state_dict().keys())]
    problems += [
        f"{name} has shape {list(state[name].shape)}, not {list(theirs.shape)}"
        for name, theirs in model.state_dict().items()
        if name in state and state[name].shape != theirs.shape
    ]
    if problems:
        raise UserError(f"{checkpoint.folder} as {export.architecture}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    _write_tokenizer(checkpoint.tokenizer, checkpoint.model.max_position_embeddings, folder)
    write_atomically(folder / "README.md", model_card(checkpoint, export.architecture).encode())


def _write_tokenizer(tokenizer: WordPiece, max_length: int, folder: Path) -> None:
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": max_length}
    write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())


def _verify(export: Export, ours: PretrainingModel, folder: Path) -> None:
    architecture: Any = getattr(transformers, export.architecture)
    theirs, report = architecture.from_pretrained(folder, output_loading_info=True)
    for problem, keys in report.items():
        if keys:
            raise UserError(
                f"verification: {export.architecture} opens the folder with {problem}: {sorted(map(str, keys))}"
            )
    ids, token_types, mask = _fixed_batch(ours.config.vocab_size, ours.config.max_position_embeddings)
    # In fp64 the rounding of a deep network's sums cannot hide, or pass for, a wrong weight.
    ours.double()
    theirs.double().eval()
    with torch.no_grad():
        expected = export.logits(ours, ids, token_types, mask)
        found = theirs(input_ids=ids, token_type_ids=token_types, attention_mask=mask).logits
    difference = (found - expected)[mask].abs().max().item()
    if not difference <= TOLERANCE:  # NaN fails too
        raise UserError(
            f"verification: the logits of {export.architecture} differ from our own by {difference:.3g}, "
            f"more than {TOLERANCE:g}; nothing was written"
        )


def _fixed_batch(vocab_size: int, max_positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, token types and mask [4, S]: two segments, lengths from full to short, ids from all over the vocabulary."""
    length = min(max_positions, 128)
    ids = torch.randint(vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    token_types = (torch.arange(length) >= length // 2).long().expand(4, length)
    mask = torch.arange(length) < torch.tensor([length, length, length * 3 // 4 + 1, length // 4 + 1])[:, None]
    return ids, token_types, mask


def _commit(aside: Path, output: Path) -> None:
    readable = (aside / "README.md").stat().st_mode
    for path in aside.iterdir():
        path.chmod(readable)  # safetensors makes its files for their owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_folder(aside)
    aside.replace(output)  # an empty folder at `output` gives way
    fsync_folder(output.parent)
