"""Hugging Face's ELECTRA and BERT weights as a checkpoint of step 0, from which a run starts under any layout.

A tensor at a time is in memory; while the result is verified, a layer of either model at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from peer_scale.checkpoints import sections
from peer_scale.checkpoints.folder import CheckpointFolder, committed
from peer_scale.checkpoints.manifest import (
    IMPORTED,
    KINDS,
    WEIGHT,
    Manifest,
    Piece,
    Sharding,
    TensorEntry,
    key_of,
)
from peer_scale.checkpoints.pieces import write_tensors, write_tokenizer
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.reader import (
    Checkpoint,
    empty_model,
    model_without_weights,
    our_weights,
    read_sections,
)
from peer_scale.checkpoints.state import sharding_of
from peer_scale.conversion.architecture import GENERATOR, RANKER, TOLERANCE, Architecture
from peer_scale.conversion.electra import RANKER_HEAD, Entry
from peer_scale.conversion.fresh_weights import FreshWeights
from peer_scale.conversion.hugging_face_folder import HuggingFaceFolder
from peer_scale.conversion.to_hugging_face import EXTRAS
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.settings.presets import Preset
from peer_scale.storage import new_folder, write_atomically

MODEL_FILE = "model.yaml"
_FILE = "rank_00000.safetensors"
_THRESHOLDS = "ranking_head.free_thresholds"
_HEADS = {
    (RANKER, "electra"): (f"{RANKER_HEAD}.",),
    (GENERATOR, "electra"): ("generator_predictions.", "generator_lm_head."),
    (GENERATOR, "bert"): ("cls.predictions.",),
    (RANKER, "bert"): (),
}


@dataclass(frozen=True)
class Source:
    """A Hugging Face model and the network it becomes."""

    architecture: Architecture
    folder: HuggingFaceFolder

    @staticmethod
    def of(network: str, folder: HuggingFaceFolder) -> Source:
        """`network` is "ranker" or "generator"; the head comes along where the folder has the one that it needs."""
        has_head = any(name.startswith(_HEADS[network, folder.family]) for name in folder.weights)
        return Source(Architecture(network, folder.family, has_head), folder)

    def is_left_out(self, name: str) -> bool:
        """What no network here has: BERT's pooler and next-sentence head, its MLM head above a ranker, buffers."""
        heads = ("cls.",) if self.architecture.network == RANKER and self.folder.family == "bert" else ()
        parts = (f"{self.folder.family}.pooler.", "cls.seq_relationship.", *heads)
        return name.startswith(parts) or name.endswith((".position_ids", ".token_type_ids"))


@dataclass(frozen=True)
class Import:
    """What became of the sources, for the user: names of our parameters and of theirs."""

    step_folder: Path
    fresh: list[str]
    left_out: list[str]
    has_other_embeddings: bool


def from_hugging_face(
    sources: list[Source], name: str, preset: Preset, tokenizer: WordPiece, output: Path, *, seed: int, verify: bool
) -> Import:
    """Write a folder of checkpoints with one of step 0, and the model's sizes beside it for the trainer's --config.

    Args:
        sources: the ranker first, if there is one: shared embeddings are its own.
        name: of the preset.
        preset: with the sources' sizes (`model_of`).
        tokenizer: whose ids the sources' embeddings are for.
        output: new or empty.
        seed: for the parameters that no source has; they are those of a fresh run with this seed.
        verify: compare the logits with transformers' models.

    Raises:
        UserError: a tensor of a source is unmatched, missing, of another shape or not equal to the one it should share,
            `output` cannot be written, or logits differ by more than `TOLERANCE`; then nothing is left at `output`.
    """
    taken, thresholds = _Weights(sources, preset), _extra_thresholds(sources, preset)
    fresh = FreshWeights(preset.model, preset.objective.num_levels, seed)
    model = model_without_weights(preset.model, preset.objective.num_levels)
    shardings = {
        our: sharding_of(our, parameter, 1, preset.model.vocab_size) for our, parameter in model.named_parameters()
    }

    def weight(our: str) -> Tensor:
        rows = shardings[our].shape[0]
        if our == _THRESHOLDS:
            return _thresholds(taken, thresholds, fresh[our])
        return taken[our] if our in taken else fresh[our][:rows]

    with new_folder(output, "--output") as aside:
        manifest = _write(aside, shardings, weight, _sections(sources, name, preset, tokenizer, seed), tokenizer)
        (step,) = committed(aside)
        if verify:
            _verify(read_sections(step, manifest), sources, taken)
        write_atomically(aside / MODEL_FILE, _model_file(preset).encode())
    left_out = [s.folder.weights.original_name(n) for s in sources for n in s.folder.weights if s.is_left_out(n)]
    return Import(output / step.name, sorted(shardings.keys() - taken.names), left_out, taken.has_other_embeddings)


def model_of(preset: Preset, sources: list[Source], vocab_size: int) -> Preset:
    """The preset with what the sources say of the model beside their layers' sizes.

    Raises:
        UserError: generator and ranker cannot share embeddings, or have fewer rows than the vocabulary.
    """
    first, *others = sources
    fields = first.folder.model_fields
    for other in others:
        for key, value in other.folder.model_fields.items():
            if value != fields[key]:
                raise UserError(
                    f"{other.folder.name}: {key} is {value}, but {first.folder.name}, with which it shares the "
                    f"embeddings, has {fields[key]}"
                )
    for source in sources:
        rows = source.folder.config.vocab_size
        if rows < vocab_size:
            raise UserError(f"{source.folder.name}: {rows} word embeddings for a tokenizer of {vocab_size} ids")
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, vocab_size=vocab_size, **fields))


class _Weights:
    """What the sources have of our parameters; of what they share, the first one's."""

    def __init__(self, sources: list[Source], preset: Preset) -> None:
        self._places: dict[str, tuple[Source, Entry]] = {}
        self.has_other_embeddings = False
        for source in sources:
            entries = source.architecture.entries(preset.model)
            _check_names(source, entries)
            _check_ties(source)
            for entry in entries:
                if entry.ours not in self._places:
                    self._places[entry.ours] = source, entry
                elif not torch.equal(self[entry.ours], self._restored(source, entry)):
                    self._other(source, entry.ours)
        self.names = self._places.keys()

    def __contains__(self, our: str) -> bool:
        return our in self._places

    def __getitem__(self, our: str) -> Tensor:
        return self._restored(*self._places[our])

    def _other(self, source: Source, our: str) -> None:
        if not our.startswith("embeddings."):
            raise UserError(
                f"{source.folder.name}: {our} is not the {RANKER}'s, with which it is to be shared; give "
                "--num-shared-layers 0, or leave out --generator"
            )
        self.has_other_embeddings = True

    @staticmethod
    def _restored(source: Source, entry: Entry) -> Tensor:
        return entry.restore(tuple(source.folder.weights[name] for name in entry.theirs))


def _check_names(source: Source, entries: list[Entry]) -> None:
    weights = source.folder.weights
    expected = source.architecture.names(source.architecture.build(source.folder.config))
    assert {name for entry in entries for name in entry.theirs} == expected.keys(), "the map covers the architecture"
    ties = source.architecture.ties
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [
        f"{weights.original_name(name)} is not a part of {source.architecture.class_name}"
        for name in weights
        if name not in expected and name not in ties and not source.is_left_out(name)
    ]
    problems += [
        f"{weights.original_name(name)} has shape {list(weights.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights.shape(name) != shape
    ]
    if problems:
        raise UserError(f"{source.folder.name}: {'; '.join(problems)}")


def _check_ties(source: Source) -> None:
    weights = source.folder.weights
    for name, taken in source.architecture.ties.items():
        if name in weights and not torch.equal(weights[name], weights[taken]):
            raise UserError(
                f"{source.folder.name}: {weights.original_name(name)} is not {weights.original_name(taken)}, to which "
                "the model here ties it"
            )


def _extra_thresholds(sources: list[Source], preset: Preset) -> Tensor | None:
    """The thresholds that `to-hf` put into config.json, where they are as many as the model has."""
    for source in sources:
        free = (getattr(source.folder.config, EXTRAS, None) or {}).get("free_thresholds")
        if source.architecture.network == RANKER and free is not None and len(free) == preset.objective.num_levels - 1:
            return torch.tensor(free)
    return None


def _thresholds(taken: _Weights, extra: Tensor | None, fresh: Tensor) -> Tensor:
    """ELECTRA has the last only: xi_{K-1}, its bias."""
    found = (fresh if extra is None else extra).clone()
    if _THRESHOLDS in taken:
        found[-1:] = taken[_THRESHOLDS]
    return found


def _sections(sources: list[Source], name: str, preset: Preset, tokenizer: WordPiece, seed: int) -> dict[str, Any]:
    return {
        "progress": dataclasses.asdict(Progress()),
        "optimizer": {"updates": 0, "skipped_steps": 0, "loss_scale": None},
        "model": dataclasses.asdict(preset.model),
        "objective": dataclasses.asdict(preset.objective),
        "data": {"tokenizer": tokenizer.digest},
        "provenance": {"model": name, "data_path": []},
        IMPORTED: {source.architecture.network: source.folder.name for source in sources},
        "random": {"seed": seed},
        "ties": sections.TIES,
    }


def _write(
    folder: Path,
    shardings: dict[str, Sharding],
    weight: Callable[[str], Tensor],
    said: dict[str, Any],
    tokenizer: WordPiece,
) -> Manifest:
    checkpoints = CheckpointFolder(folder, keep_last=1)
    aside = checkpoints.begin(0)

    def tensors() -> Iterator[Tensor]:
        for our in shardings:
            for kind in KINDS:
                yield weight(our).flatten() if kind == WEIGHT else torch.zeros(lengths[our])

    lengths = {our: sharding.stored(0) for our, sharding in shardings.items()}
    shapes = {key_of(kind, our): (length,) for our, length in lengths.items() for kind in KINDS}
    files = {_FILE: write_tensors(aside / _FILE, shapes, tensors()), **write_tokenizer(aside, tokenizer)}
    entries = {
        our: TensorEntry(s.shape, s.dim, s.count, s.padding, (Piece(_FILE, 0, 0, lengths[our]),))
        for our, s in shardings.items()
    }
    manifest = Manifest(said, entries, files)
    checkpoints.commit(0, manifest)
    return manifest


def _verify(checkpoint: Checkpoint, sources: list[Source], taken: _Weights) -> None:
    """Each source's own logits, but for a generator with other embeddings, which then is computed with the ranker's."""
    shared = f"{sources[0].folder.family}.embeddings."
    for source in sources:

        def read(name: str, source: Source = source) -> Tensor:
            mine = f"{source.folder.family}.embeddings."
            if taken.has_other_embeddings and name.startswith(mine):
                return sources[0].folder.weights[shared + name.removeprefix(mine)]
            return source.folder.weights[name]

        theirs = source.architecture.build(source.folder.config)
        ours = empty_model(checkpoint)
        difference = source.architecture.difference(ours, partial(our_weights, checkpoint), theirs, read)
        if not difference <= TOLERANCE:  # NaN fails too
            raise UserError(
                f"verification: our logits differ by {difference:.3g} from those of {source.folder.name} as "
                f"{source.architecture.class_name}, more than {TOLERANCE:g}; nothing was written"
            )


def _model_file(preset: Preset) -> str:
    """For the trainer's --config."""
    content = json.loads(json.dumps({key: dataclasses.asdict(getattr(preset, key)) for key in ("model", "objective")}))
    content["model"] = {key: value for key, value in content["model"].items() if value is not None}
    return yaml.safe_dump(content, sort_keys=False)
