"""Hugging Face's ELECTRA and BERT weights as a checkpoint of step 0, from which a run starts under any layout.

One tensor at a time is in memory; while the result is verified, one layer of either model at a time.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor

from peer_scale.checkpoints.initial import write_initial
from peer_scale.checkpoints.parameters import shardings
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.reader import Checkpoint, empty_model, open_checkpoint, our_weights
from peer_scale.checkpoints.sections import (
    TIES,
    OptimizerState,
    Provenance,
    RandomStreams,
    Sections,
    TokenizerIdentity,
)
from peer_scale.conversion.architecture import PREFIXES, TOLERANCE, Architecture
from peer_scale.conversion.fresh_weights import FreshWeights
from peer_scale.conversion.hugging_face_folder import HuggingFaceFolder
from peer_scale.conversion.to_hugging_face import EXTRAS
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.objectives.exports import ENCODER_CLASSES, Entry, Export
from peer_scale.parallel.topology import single_process_topology
from peer_scale.settings.presets import Preset
from peer_scale.storage import new_folder, write_atomically

MODEL_FILE = "model.yaml"
_FLAGS = {
    "ElectraForPreTraining": ("--discriminator",),
    "ElectraForMaskedLM": ("--generator", "--bert"),
    "ModernBertForTokenClassification": ("--discriminator",),
    "ModernBertForMaskedLM": ("--generator", "--bert"),
}
"""Where models with heads belong. BERT's heads are left out where there is no place for them."""


def check_class(folder: HuggingFaceFolder, flag: str) -> None:
    """Raise UserError where the folder's model is of a class that belongs to another flag than `flag`."""
    belongs = _FLAGS.get(folder.class_name, (flag,))
    if flag not in belongs:
        raise UserError(f"{flag} {folder.name}: holds an {folder.class_name}, which belongs to {' or '.join(belongs)}")


@dataclass(frozen=True)
class Source:
    """A Hugging Face model and what it becomes; `left_out` are beginnings of names that have no place here."""

    architecture: Architecture
    folder: HuggingFaceFolder
    left_out: tuple[str, ...]

    @staticmethod
    def of(branch: str | None, folder: HuggingFaceFolder, preset: Preset) -> Source:
        """Take a folder for a branch of the preset's objective, by default its first.

        The head comes along where the folder has the one that the branch needs; else only the encoder does.
        """
        of_branch = _exports_of(branch, preset)
        in_family = [export for export in of_branch if export.family == folder.family]
        with_head = [e for e in in_family if any(name in folder.weights for entry in e.head for name in entry.theirs)]
        export = with_head[0] if with_head else _bare(of_branch[0], folder)
        left_out = [f"{folder.family}.pooler.", "cls.seq_relationship."]
        if not in_family:
            left_out.append("cls.")  # a head in whose place the branch has another
        if folder.family == "modernbert" and not with_head:
            left_out += ["head.", "decoder.", "classifier."]
        return Source(Architecture.of(export, preset.model, preset.objective), folder, tuple(left_out))

    @property
    def branch(self) -> str:
        """What the model becomes."""
        return self.architecture.export.branch

    @property
    def class_name(self) -> str:
        """Transformers' class that is taken for it."""
        return self.architecture.export.class_name

    def is_left_out(self, name: str) -> bool:
        """Say whether a tensor has no place here: BERT's pooler and next-sentence head, other heads, buffers."""
        return name.startswith(self.left_out) or name.endswith((".position_ids", ".token_type_ids"))


def _exports_of(branch: str | None, preset: Preset) -> list[Export]:
    """List the exports of a branch, by default of the objective's first; raise UserError where there is none."""
    exports = preset.objective.exports(preset.model)
    found = [export for export in exports if export.branch == (branch or exports[0].branch)]
    if not found:
        raise UserError(f"the model has no {branch} to take weights for")
    return found


def _bare(export: Export, folder: HuggingFaceFolder) -> Export:
    class_name = ENCODER_CLASSES[folder.family]
    return dataclasses.replace(
        export, family=folder.family, class_name=class_name, head=(), logits=None, extras={}, left_out=()
    )


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
        sources: the one whose embeddings are taken first.
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
    taken = _Weights(sources)
    fresh = FreshWeights(preset.model, preset.objective, seed)
    ours = shardings(preset.model, preset.objective, single_process_topology().tensor_parallel)

    def weight(our: str) -> Tensor:
        shape = ours[our].shape
        return taken.whole(our, shape, fresh) if our in taken else fresh[our][: shape[0]]

    with new_folder(output, "--output") as aside:
        step, manifest = write_initial(
            aside, _sections(sources, name, preset, tokenizer, seed), ours, weight, tokenizer
        )
        if verify:
            _verify(open_checkpoint(step, manifest), sources, taken)
        write_atomically(aside / MODEL_FILE, _model_file(preset).encode())
    left_out = [s.folder.weights.original_name(n) for s in sources for n in s.folder.weights if s.is_left_out(n)]
    return Import(output / step.name, sorted(ours.keys() - taken.names), left_out, taken.has_other_embeddings)


def model_of(preset: Preset, folders: list[HuggingFaceFolder], vocab_size: int) -> Preset:
    """Give the preset what the folders say of the model beside their layers' sizes.

    Raises:
        UserError: the folders cannot share embeddings, or have fewer rows than the vocabulary.
    """
    first, *others = folders
    fields = first.model_fields
    for other in others:
        for key, value in other.model_fields.items():
            if value != fields[key]:
                raise UserError(
                    f"{other.name}: {key} is {value}, but {first.name}, with which it shares the embeddings, has "
                    f"{fields[key]}"
                )
    for folder in folders:
        rows = folder.config.vocab_size
        if rows < vocab_size:
            raise UserError(f"{folder.name}: {rows} word embeddings for a tokenizer of {vocab_size} ids")
    return dataclasses.replace(preset, model=dataclasses.replace(preset.model, vocab_size=vocab_size, **fields))


class _Weights:
    """What the sources have of our parameters; of what they share, the first one's."""

    def __init__(self, sources: list[Source]) -> None:
        self._places: dict[str, tuple[Source, Entry]] = {}
        self.has_other_embeddings = False
        for source in sources:
            entries = source.architecture.entries
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

    def whole(self, our: str, shape: tuple[int, ...], fresh: FreshWeights) -> Tensor:
        """Give a parameter, of which the source may have a part only: config.json or a fresh run have the rest."""
        source, entry = self._places[our]
        if entry.complete is None:
            return self[our]
        keys = {name: key for key, name in source.architecture.export.extras.items()}
        saved = (getattr(source.folder.config, EXTRAS, None) or {}).get(keys.get(our))
        whole = None if saved is None else torch.tensor(saved)
        if whole is None or whole.shape != shape:
            whole = fresh[our]
        return entry.complete(whole, self[our])

    def _other(self, source: Source, our: str) -> None:
        if not our.startswith("embeddings."):
            raise UserError(
                f"{source.folder.name}: {our} is not the {self._places[our][0].branch}'s, with which it is to be "
                "shared; give --num-shared-layers 0, or leave out --generator"
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
        f"{weights.original_name(name)} is not a part of {source.class_name}"
        for name in weights
        if name not in expected and name not in ties and not source.is_left_out(name)
    ]
    problems += [
        f"{weights.original_name(name)} has shape {list(weights.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights.shape(name) != shape
    ]
    if problems:
        got = f" (an {source.folder.class_name})" if source.folder.class_name else ""
        raise UserError(f"{source.folder.name}{got}: {'; '.join(problems)}")


def _check_ties(source: Source) -> None:
    weights = source.folder.weights
    for name, taken in source.architecture.ties.items():
        if name in weights and not torch.equal(weights[name], weights[taken]):
            raise UserError(
                f"{source.folder.name}: {weights.original_name(name)} is not {weights.original_name(taken)}, to which "
                "the model here ties it"
            )


def _sections(sources: list[Source], name: str, preset: Preset, tokenizer: WordPiece, seed: int) -> Sections:
    return Sections(
        progress=Progress(),
        optimizer=OptimizerState(),
        model=preset.model,
        objective=preset.objective,
        masking=preset.masking,
        tokenizer=TokenizerIdentity(tokenizer.digest),
        data=None,
        layout=None,
        provenance=Provenance(name, ()),
        training=None,
        random=RandomStreams(seed),
        ties=TIES,
        imported={source.branch: source.folder.name for source in sources},
    )


def _verify(checkpoint: Checkpoint, sources: list[Source], taken: _Weights) -> None:
    """Compare each source's logits; one with other embeddings than the first is computed with the first's."""
    shared = f"{PREFIXES[sources[0].folder.family]}.embeddings."
    for source in sources:

        def read(name: str, source: Source = source) -> Tensor:
            mine = f"{PREFIXES[source.folder.family]}.embeddings."
            if taken.has_other_embeddings and name.startswith(mine):
                return sources[0].folder.weights[shared + name.removeprefix(mine)]
            return source.folder.weights[name]

        theirs = source.architecture.build(source.folder.config)
        ours = empty_model(checkpoint)
        difference = source.architecture.difference(ours, partial(our_weights, checkpoint), theirs, read)
        if not difference <= TOLERANCE:  # NaN fails too
            raise UserError(
                f"verification: our logits differ by {difference:.3g} from those of {source.folder.name} as "
                f"{source.class_name}, more than {TOLERANCE:g}; nothing was written"
            )


def _model_file(preset: Preset) -> str:
    """Write the model and what it learns for the trainer's --config."""
    sections = {key: dataclasses.asdict(getattr(preset, key)) for key in ("model", "masking")}
    content = json.loads(json.dumps({**sections, "objective": preset.objective.section()}))
    content["model"] = {key: value for key, value in content["model"].items() if value is not None}
    return yaml.safe_dump(content, sort_keys=False)
