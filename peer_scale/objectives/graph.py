"""What one micro-batch takes to train on, as a graph: the works, what they hand to each other and what they cost.

An objective describes its graph once. The whole-model runner runs the works in their order; placement, schedules,
simulator, pipeline executor, planner and FLOPs read the same graph, so none of them knows an objective by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.costs import Blocks, projection_matmul_flops

if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.objectives.works import Outcome, WorkContext

ValueFormat: TypeAlias = Literal["compute", "float32", "int64"]


@dataclass(frozen=True)
class Value:
    """What one work gives to others: a number, or `width` numbers, for each selected position of a micro-batch.

    Shape [n] or [n, width], n being the selected positions of all its sequences. Values in the format of the
    matrix products ("compute") carry a gradient back to the work that gives them; others do not.
    """

    name: str
    format: ValueFormat
    width: int | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient comes back for it."""
        return self.format == "compute"


@dataclass(frozen=True)
class Cost:
    """What a work takes beside its layers, for each token or each selected position.

    Attributes:
        per: what it is counted for.
        flops: forward matrix products, 2 FLOPs per multiply-add; backward takes twice as many.
        activations: numbers in the compute format that are kept from forward to backward.
        workspace: numbers that are there while the work runs, once in the compute format and once in fp32.
        reduced_bytes: what tensor-parallel ranks all-reduce, forward and backward together.
        gathered_bytes: what each tensor-parallel rank sends to every other.
        moved: numbers in the compute format that the GPU's kernels read and write forward, weights left out; backward
            moves twice as many. What a workspace holds is made once more in backward, with its `flops` and `moved`.
    """

    per: Literal["token", "position"]
    flops: int = 0
    activations: int = 0
    workspace: int = 0
    reduced_bytes: int = 0
    gathered_bytes: int = 0
    moved: int = 0


@dataclass(frozen=True)
class SampleSize:
    """What costs go by: of one sequence, the mean of several, or the sum over them.

    Attributes:
        tokens: non-pad ones, the special ones included.
        selected: how many of them are selected for prediction.
        token_pairs: squared length, which attention goes by; of several sequences the mean or the sum of the squares.
    """

    tokens: float
    selected: float
    token_pairs: float

    @classmethod
    def of_sequence(cls, tokens: int, selected: int) -> SampleSize:
        """Give the size of one sequence."""
        return cls(tokens, selected, tokens**2)

    def times(self, number: float) -> SampleSize:
        """Give the size of so many such samples together."""
        return SampleSize(number * self.tokens, number * self.selected, number * self.token_pairs)

    def count(self, costs: tuple[Cost, ...], what: str) -> float:
        """Sum the field `what` of `costs`; whole numbers give a whole number."""
        sizes = {"token": self.tokens, "position": self.selected}
        return sum(sizes[cost.per] * getattr(cost, what) for cost in costs)


@dataclass(frozen=True)
class Work:
    """A node of the graph: runs forward once per micro-batch, and backward once if it has a loss or gives gradients.

    A work with a `network` runs along the stages that hold the network's layers: it begins with the embeddings of the
    ids that `begin` gives, goes through the layers, and `end` gets the hidden states. A work without one is `end` alone
    and runs where the word table is, on the first stage.

    Attributes:
        name: unique in the graph; also what its hidden states are called on their way between stages.
        network: whose path it takes, or None.
        begin: makes token ids [T] from the batch and the values in `begin_takes`.
        end: makes losses, sums and values of the hidden states [T, H] (a slice of them under sequence parallelism) and
            the values in `end_takes`.
        begin_takes: names of values needed on the first stage.
        end_takes: names of values needed on the last stage.
        gives: values that `end` makes.
        heads: names of the heads that `end` uses; they live on its stage.
        has_loss: whether `end` gives a loss.
        end_layers: Transformer layers of the network's shape within `heads`.
        end_joins: how often `end` joins the slices of hidden states that sequence parallelism left.
        begin_costs: beside the layers, on the first stage.
        end_costs: beside the layers, on the last stage.
    """

    name: str
    # not compared: equal objectives make functions of their own, and schedules are kept by the graph they are of
    end: Callable[[WorkContext, Tensor | None], Outcome] = field(compare=False)
    network: str | None = None
    begin: Callable[[WorkContext], Tensor] | None = field(default=None, compare=False)
    begin_takes: tuple[str, ...] = ()
    end_takes: tuple[str, ...] = ()
    gives: tuple[Value, ...] = ()
    heads: tuple[str, ...] = ()
    has_loss: bool = False
    end_layers: int = 0
    end_joins: int = 1
    begin_costs: tuple[Cost, ...] = ()
    end_costs: tuple[Cost, ...] = ()

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of all values that it needs."""
        return self.begin_takes + self.end_takes

    @property
    def has_backward(self) -> bool:
        """Whether a gradient goes through it."""
        return self.has_loss or any(value.has_gradient for value in self.gives)


@dataclass(frozen=True)
class Graph:
    """The works of one micro-batch in an order in which they can run, and the networks whose layers they use.

    The bottom `num_shared_layers` layers are the same ones in all networks.
    """

    networks: tuple[tuple[str, EncoderShape], ...]
    num_shared_layers: int
    works: tuple[Work, ...]
    blocks: Blocks = field(default_factory=Blocks)

    def __post_init__(self) -> None:
        given: set[str] = set()
        for work in self.works:
            assert given.issuperset(work.takes), f"{work.name} takes {work.takes} before they are given"
            assert (work.begin is None) == (work.network is None), f"{work.name}: only a network has a beginning"
            given |= {value.name for value in work.gives}
        for name in given:
            takers = [work for work in self.works if name in work.takes]
            if self.value(name).has_gradient:
                assert len(takers) == 1, f"the gradient of {name} comes from {len(takers)} works"
                assert takers[0].network is None, f"{name}: only works without layers take values with a gradient"

    def work(self, name: str) -> Work:
        """Give the work of that name."""
        return self._works[name]

    def value(self, name: str) -> Value:
        """Give the value of that name."""
        return self._values[name][1]

    def giver(self, value: str) -> Work:
        """Give the work that gives the value."""
        return self._values[value][0]

    def takers(self, value: str) -> tuple[Work, ...]:
        """Give the works that take the value."""
        return tuple(work for work in self.works if value in work.takes)

    def shape(self, network: str) -> EncoderShape:
        """Give the sizes of the network as its path has them."""
        return dict(self.networks)[network]

    def num_own_layers(self, network: str) -> int:
        """Give the layers of the network above the shared ones."""
        return self.shape(network).num_layers - self.num_shared_layers

    @cached_property
    def _works(self) -> dict[str, Work]:
        return {work.name: work for work in self.works}

    @cached_property
    def _values(self) -> dict[str, tuple[Work, Value]]:
        return {value.name: (work, value) for work in self.works for value in work.gives}


def embedding_costs(model: ModelConfig, shape: EncoderShape) -> tuple[Cost, ...]:
    """Say what a network's embeddings, dropout and projection take."""
    width, has_dropout = model.embedding_size, model.hidden_dropout > 0
    num_tables = 1 + (model.position_embedding == "absolute") + (model.num_token_types > 0)
    # each table: a row read and written; each but the first: a sum; then the norm and dropout, a pass each
    passes = 2 * num_tables + 3 * (num_tables - 1) + 2 + 2 * has_dropout
    projection = projection_matmul_flops(model, shape)
    moved = passes * width + (width + shape.hidden_size if projection else 0)
    return (Cost("token", flops=projection, activations=width * (1 + has_dropout), moved=moved),)
