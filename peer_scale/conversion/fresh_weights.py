"""The weights with which a fresh run would start, of some parameters, one layer at a time."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from peer_scale.models.config import ModelConfig, ModelPart
from peer_scale.models.networks import PretrainingModel
from peer_scale.objectives.objective import Objective
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import single_process_topology


class FreshWeights:
    """Weights by the names of `PretrainingModel`; rows that pad the vocabulary are there."""

    def __init__(self, config: ModelConfig, objective: Objective, seed: int) -> None:
        self._config, self._seed = config, seed
        self._networks, self._heads = dict(objective.graph(config).networks), objective.heads(config)
        self._tensor_parallel = single_process_topology().tensor_parallel
        self._made: tuple[ModelPart | str | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        part = self._part(name)
        if self._made[0] != part:  # parameters of one layer are asked for one after the other
            self._made = part, self._make(part)
        return self._made[1][name]

    def _part(self, name: str) -> ModelPart | str:
        """Find the smallest part of the model with the parameter: one layer, a head by its name, or what is left."""
        first, *others = name.split(".")
        if first in self._heads:
            return first
        no_layers = dict.fromkeys(self._networks, range(0))
        nothing = ModelPart(range(0), tuple(no_layers.items()), has_embeddings=False, ends=())
        numbers = [int(key) for key in others if key.isdecimal()]
        if not numbers:
            return replace(nothing, has_embeddings=True, ends=tuple(self._networks))  # with projections and last norms
        (number,) = numbers
        layer = range(number, number + 1)
        if first in self._networks:
            return replace(nothing, own_layers=tuple({**no_layers, first: layer}.items()))
        return replace(nothing, shared_layers=layer)

    def _make(self, part: ModelPart | str) -> dict[str, Tensor]:
        model: nn.Module
        if isinstance(part, str):
            model = nn.ModuleDict({part: self._heads[part](self._tensor_parallel)})
        else:
            model = PretrainingModel(self._config, self._networks, {}, self._tensor_parallel, part)
        # the trainer's name for it decides what is drawn
        initialize_weights(
            nn.ModuleDict({"model": model}),
            seed=self._seed,
            std=self._config.init_std,
            vocab_size=self._config.vocab_size,
            tensor_parallel=self._tensor_parallel,
            residual_scale=self._config.residual_init_scale,
            by_width=self._config.width_scaled_init,
        )
        return {name: parameter.detach() for name, parameter in model.named_parameters()}
