"""The weights with which a fresh run would start, of some parameters, a layer at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from peer_scale.conversion.architecture import GENERATOR, RANKER
from peer_scale.models.config import ModelConfig, ModelPart
from peer_scale.models.networks import PretrainingModel
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import single_process_topology


class FreshWeights:
    """By the names of `PretrainingModel`; rows that pad the vocabulary are there."""

    def __init__(self, config: ModelConfig, num_levels: int, seed: int) -> None:
        self._config, self._num_levels, self._seed = config, num_levels, seed
        self._topology = single_process_topology()
        self._made: tuple[ModelPart | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        part = self._part(name)
        if self._made[0] != part:  # parameters of one layer are asked for one after the other
            self._made = part, self._make(part)
        return self._made[1][name]

    def _part(self, name: str) -> ModelPart:
        """The smallest part of the model with the parameter."""
        nothing = ModelPart(
            range(0), range(0), range(0), has_embeddings=False, has_mlm_head=False, has_ranking_head=False
        )
        numbers = [int(key) for key in name.split(".") if key.isdecimal()]
        if numbers:
            (number,) = numbers
            field = {"shared_layers": "shared_layers", GENERATOR: "generator_layers", RANKER: "ranker_layers"}
            layers: dict[str, Any] = {field[name.split(".", maxsplit=1)[0]]: range(number, number + 1)}
            return replace(nothing, **layers)
        if name.startswith("mlm_head."):
            return replace(nothing, has_mlm_head=True)
        if name.startswith("ranking_head."):
            return replace(nothing, has_ranking_head=True)
        return replace(nothing, has_embeddings=True)  # with the projections

    def _make(self, part: ModelPart) -> dict[str, Tensor]:
        model = PretrainingModel(self._config, self._num_levels, self._topology, part)
        # the trainer's name for it decides what is drawn
        initialize_weights(
            nn.ModuleDict({"model": model}),
            seed=self._seed,
            std=self._config.init_std,
            vocab_size=self._config.vocab_size,
            topology=self._topology,
        )
        return {name: parameter.detach() for name, parameter in model.named_parameters()}
