"""What an objective has to say for itself; the rest of the project asks and knows no objective by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peer_scale.models.config import ModelConfig
from peer_scale.objectives.graph import Graph

if TYPE_CHECKING:
    from peer_scale.models.networks import HeadBuilder
    from peer_scale.objectives.exports import Export


@dataclass(frozen=True)
class Loss:
    """A term of the total loss: `weight` x (sum over the global batch) / (selected positions or non-pad tokens)."""

    name: str
    weight: float
    normaliser: Literal["selected", "tokens"]


class Objective(ABC):
    """Base of all objectives: a `configuration` whose fields, each with a default, are its hyper-parameters.

    Once it is in the registry, each field made by `option` is a flag of the trainer.

    Class attributes:
        kind: what it is called in configuration files and checkpoints.
        validation_metrics: which of its metrics are reported of held-out text, beside the losses.
        progress_metrics: which of its metrics the progress line shows beside the losses, and what it calls them.
    """

    kind: ClassVar[str]
    validation_metrics: ClassVar[tuple[str, ...]] = ()
    progress_metrics: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def check_model(self, model: ModelConfig) -> None:
        """Raise UserError unless `model` has the networks that this objective trains."""

    @abstractmethod
    def graph(self, model: ModelConfig) -> Graph:
        """Describe the works of one micro-batch."""

    @abstractmethod
    def heads(self, model: ModelConfig) -> Mapping[str, HeadBuilder]:
        """Give the makers of the modules on top of the networks, by the names that the graph's works use."""

    @property
    @abstractmethod
    def losses(self) -> tuple[Loss, ...]:
        """The terms of the total loss, in the order in which they are added up."""

    @property
    @abstractmethod
    def sum_names(self) -> tuple[str, ...]:
        """Names of the sums that the works make beside the losses."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, object]:
        """Make the metrics of a step, beside the losses, of its sums; `selected` and `tokens` are among them."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a line of the start-up summary what is learned."""

    @abstractmethod
    def paper_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Count one sequence's forward FLOPs in the accounting of PEER's Tables 3 and 4."""

    @abstractmethod
    def exports(self, model: ModelConfig) -> tuple[Export, ...]:
        """Say which networks can be exported to Hugging Face's classes, the one to take by default first."""

    def changed(self, changes: Mapping[str, object]) -> Objective:
        """Give the objective with other hyper-parameters, as a user asks for them by flags or in a file."""
        return replace(self, **changes)  # type: ignore[type-var]

    def section(self) -> dict[str, Any]:
        """Describe the objective by its kind and its hyper-parameters, as configuration files and checkpoints do."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @property
    def num_extra_uniforms(self) -> int:
        """Random numbers per selected position that its works need besides the one that a replacement is drawn with."""
        return 0

    def warmup_steps(self, samples_per_epoch: int, global_batch_size: int) -> int:
        """Give the number of first steps in which works see `warmup` set."""
        return 0

    def notices(self, warmup_steps: int) -> dict[int, str]:
        """Give what the progress line should say when a step begins, by step."""
        return {}


class SumsLayout:
    """Order of the sums in the vector that travels between ranks, and the metrics made of them.

    After the losses come `selected` positions, non-pad `tokens`, and `token_pairs`, the sum of the sequences' squared
    lengths, which attention's cost goes by.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.names = [
            *(loss.name for loss in objective.losses),
            "selected",
            "tokens",
            "token_pairs",
            *objective.sum_names,
        ]

    def __len__(self) -> int:
        return len(self.names)

    def metrics(self, vector: list[float]) -> dict[str, object]:
        """Make losses and shares of a step, as metrics.jsonl names them; a share of nothing is None."""
        sums = dict(zip(self.names, vector, strict=True))
        losses = {loss.name: sums[loss.name] / sums[loss.normaliser] for loss in self._objective.losses}
        total = sum(loss.weight * losses[loss.name] for loss in self._objective.losses)
        return {"loss": total, **losses, **self._objective.metrics(sums)}
