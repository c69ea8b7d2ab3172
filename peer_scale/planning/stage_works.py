"""What a pipeline stage does of each work of the objective's graph: all that memory and traffic are counted from."""

from __future__ import annotations

from dataclasses import dataclass

from peer_scale.models.config import EncoderShape
from peer_scale.objectives.graph import Cost, Work
from peer_scale.pipeline.placement import Placement


@dataclass(frozen=True)
class StageWork:
    """A stage's part in a work.

    Attributes:
        work: the whole of it.
        shape: of its layers; None for a work beside the word table, which has none.
        num_layers: how many it runs through here, those within its heads included.
        begins: whether it begins here.
        ends: whether it ends here.
    """

    work: Work
    shape: EncoderShape | None
    num_layers: int
    begins: bool
    ends: bool

    @property
    def costs(self) -> tuple[Cost, ...]:
        """What it takes here beside the layers."""
        return self.work.begin_costs * self.begins + self.work.end_costs * self.ends


def stage_works(placement: Placement, stage: int) -> tuple[StageWork, ...]:
    """List a stage's parts in all works that visit it, in the graph's order."""
    works = placement.graph.works
    return tuple(stage_part(placement, stage, work) for work in works if stage in placement.path(work.name))


def stage_part(placement: Placement, stage: int, work: Work) -> StageWork:
    """Give a stage's part in one work; nothing is in it where the work does not visit the stage."""
    path = placement.path(work.name)
    begins, ends = stage == path[0], stage == path[-1]
    if work.network is None:
        return StageWork(work, None, 0, begins, ends)
    num_layers = placement.stages[stage].num_layers(work.network) + work.end_layers * ends
    return StageWork(work, placement.graph.shape(work.network), num_layers, begins, ends)
