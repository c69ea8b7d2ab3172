"""All objectives, by the names that configuration files and checkpoints call them."""

from __future__ import annotations

from peer_scale.errors import UserError
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.teams import Teams
from peer_scale.objectives.tqr import TokenQualityRanking

OBJECTIVES: dict[str, type[Objective]] = {
    objective.kind: objective for objective in (MaskedLanguageModel, TokenQualityRanking, Teams)
}


def objective_class(kind: str) -> type[Objective]:
    """Find the objective called `kind`; UserError for an unknown one."""
    if kind not in OBJECTIVES:
        raise UserError(f"objective {kind!r}: unknown; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[kind]
