"""What a manifest says of the run, section by section: one description, by which it is written and read.

Each field of `Sections` is a section of the manifest, and its class says what stands there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from peer_scale.checkpoints.progress import Progress
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.registry import OBJECTIVES
from peer_scale.parallel.topology import Topology
from peer_scale.samples.masking import MaskingConfig
from peer_scale.samples.split import SplitRule
from peer_scale.settings.run import RunConfig

T = TypeVar("T")
_UNKNOWN = "unknown to this version"

# what stands in two places of the model under one name
TIES = {"output matrix of mlm_head": "embeddings.word.weight"}


@dataclass(frozen=True)
class TokenizerIdentity:
    """What makes text into the ids that the model knows, by its digest; its files are in the checkpoint's folder."""

    digest: str


@dataclass(frozen=True)
class TrainingData:
    """The data of the run and their order; `fingerprint` is a digest of the text, `split` what is held out."""

    fingerprint: str
    seed: int
    validation_fraction: float
    seq_length: int
    global_batch_size: int
    split: SplitRule


@dataclass(frozen=True)
class SavedLayout:
    """How the ranks that wrote the checkpoint shared the work; a run that loads it may do otherwise."""

    data_parallel: int
    tensor_parallel: int
    pipeline_parallel: int
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class Provenance:
    """The preset's (or own model's) name, where the text came from, and what started the process that saved.

    `start` is a line of the run's starts.jsonl without its number; None where a version before it saved, or an import.
    """

    model: str
    data_path: tuple[str, ...]
    start: dict[str, Any] | None = None


@dataclass(frozen=True)
class LossScale:
    """The state of fp16's dynamic loss scaler, by DeepSpeed's names."""

    cur_scale: float
    cur_iter: int
    last_overflow_iter: int
    cur_hysteresis: int


@dataclass(frozen=True)
class OptimizerState:
    """What belongs to the optimizer as a whole: Adam's count of updates, and what fp16 knows (None: no scaler)."""

    updates: int = 0
    skipped_steps: int = 0
    loss_scale: LossScale | None = None


@dataclass(frozen=True)
class RandomStreams:
    """Where everything drawn comes from."""

    seed: int
    streams: str = (
        "no generator's state is kept: the order of the data, masking, sampling and initial weights are functions of "
        "the seed and a sample's number, dropout of (seed, step, micro-batch, data-parallel rank)"
    )


@dataclass(frozen=True)
class Reshaped:
    """The ranks for which the files were cut anew."""

    tensor_parallel: int
    num_files: int


@dataclass(frozen=True)
class Saving:
    """Which run saved the checkpoint, as the how-manieth of its folder, after which one of them (None: a first one)."""

    run: str
    number: int
    after: int | None = None


@dataclass(frozen=True)
class RecentSteps:
    """Losses and gradient norms of the last steps, by which a spike is known; all of one length."""

    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sections:
    """All that a manifest says of a run; a section that is None is not there.

    Attributes:
        progress: steps, samples and tokens so far; they are also the position in the data.
        optimizer: what the optimizer knows beside its moments.
        model: sizes of the networks.
        objective: what is learned.
        masking: which positions are selected.
        tokenizer: what the ids mean.
        data: None for a checkpoint that was imported, which has seen no data here.
        layout: None for a checkpoint that was imported.
        provenance: for people.
        training: optimizer settings and schedule, for people.
        random: the seed.
        ties: places of the model that use another parameter.
        imported: from where the weights of a checkpoint of step 0 come, by what they became.
        reshaped: how the files were cut anew.
        saving: the order in which the folder's checkpoints were saved; None where a version did that without a number.
        recent: of a run that skips spikes.
    """

    progress: Progress
    optimizer: OptimizerState
    model: ModelConfig
    objective: Objective
    masking: MaskingConfig
    tokenizer: TokenizerIdentity
    data: TrainingData | None
    layout: SavedLayout | None
    provenance: Provenance
    training: dict[str, Any] | None
    random: RandomStreams
    ties: dict[str, str]
    imported: dict[str, str] | None = None
    reshaped: Reshaped | None = None
    saving: Saving | None = None
    recent: RecentSteps | None = None

    def as_json(self) -> dict[str, Any]:
        """Give the sections that are there, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _as_json(value) for name, value in values.items() if value is not None}


def sections_of(run: RunConfig, topology: Topology, *, data_fingerprint: str, tokenizer_digest: str) -> Sections:
    """Describe a run that has not begun."""
    return Sections(
        progress=Progress(),
        optimizer=OptimizerState(),
        model=run.model,
        objective=run.objective,
        masking=run.masking,
        tokenizer=TokenizerIdentity(tokenizer_digest),
        data=TrainingData(
            fingerprint=data_fingerprint,
            seed=run.seed,
            validation_fraction=run.data.validation_fraction,
            seq_length=run.training.seq_length,
            global_batch_size=run.training.global_batch_size,
            split="tokens",
        ),
        layout=SavedLayout(
            data_parallel=topology.size("dp"),
            tensor_parallel=run.tensor_parallel,
            pipeline_parallel=run.pipeline_parallel,
            zero_stage=run.zero_stage,
            precision=run.training.precision,
        ),
        provenance=Provenance(run.name, tuple(map(str, run.data.data_path))),
        training=dataclasses.asdict(run.training),
        random=RandomStreams(run.seed),
        ties=TIES,
    )


def split_of(sections: Sections) -> SplitRule:
    """Give the rule by which the run holds text out; an import, which has seen none, says nothing of one."""
    return sections.data.split if sections.data is not None else "tokens"


def parse_sections(content: Mapping[str, Any], where: str) -> Sections:
    """Make sections of their JSON form.

    Raises:
        UserError: a section or a key in one is missing, unknown, of another type or out of bounds; the message is one
            line that begins with `where` and names it.
    """
    types = get_type_hints(Sections)
    for name in sorted(content.keys() - types.keys()):
        raise UserError(f"{where}: {name}: {_UNKNOWN}")
    if content.get("imported") is None:
        for name in ("data", "layout"):
            if content.get(name) is None:
                raise UserError(f"{where}: {name}: missing")
    return Sections(**{name: _parse_section(types[name], name, content, where) for name in types})


def _parse_section(cls: Any, name: str, content: Mapping[str, Any], where: str) -> Any:
    values = content.get(name)
    if name == "objective":
        return _parse_objective(values, f"{where}: {name}")
    if name == "provenance" and isinstance(values, dict):  # for people: what a version says more or less of it is fine
        known = {field.name for field in dataclasses.fields(Provenance)}
        values = {"start": None, **{key: value for key, value in values.items() if key in known}}
    return _parse(cls, values, f"{where}: {name}")


def _parse_objective(values: object, where: str) -> Objective:
    if not isinstance(values, dict) or "kind" not in values:
        raise UserError(f"{where}.kind: missing")
    settings = dict(values)
    kind = settings.pop("kind")
    if kind not in OBJECTIVES:
        raise UserError(f"{where}.kind: {kind!r} is unknown to this version; known: {', '.join(OBJECTIVES)}")
    return _parse(OBJECTIVES[kind], settings, where)


def _parse(cls: type[T], values: object, where: str) -> T:
    try:
        parsed = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join([where, *map(str, first['loc'])])}: {_problem(first)}") from None
    # pydantic fills in defaults, and passes over what a standard dataclass does not have
    given, known = _keys(values), _keys(_plain(parsed))
    for key in sorted(given ^ known):
        raise UserError(f"{where}.{key}: {'missing' if key in known else _UNKNOWN}")
    return parsed


def _problem(error: Mapping[str, Any]) -> str:
    if error["type"] == "unexpected_keyword_argument":  # to a configuration
        return _UNKNOWN
    if error["type"] == "value_error":  # by a configuration's own check
        return error["msg"].removeprefix("Value error, ")
    return f"{error['msg']}, not {error['input']!r}"


def _as_json(value: Any) -> Any:
    return value.section() if isinstance(value, Objective) else _plain(value)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _keys(values: object, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return set()
    own = {f"{prefix}{key}" for key in values}
    return own.union(*(_keys(value, f"{prefix}{key}.") for key, value in values.items()))
