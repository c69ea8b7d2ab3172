"""The pre-training model: a generator and a ranker over shared embeddings and shared bottom layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peer_scale.models.config import EncoderShape, ModelConfig, ModelPart
from peer_scale.models.heads import MaskedLMHead, RankingHead
from peer_scale.models.layers import Embeddings, TransformerLayer
from peer_scale.parallel.sequence import join_sequence, split_sequence
from peer_scale.parallel.topology import Topology


class Network(nn.Module):
    """What one encoder does not share: its projection (where E != H) and its layers above the shared ones."""

    def __init__(
        self, shape: EncoderShape, config: ModelConfig, layers: range, topology: Topology, *, has_projection: bool
    ) -> None:
        super().__init__()
        needs_projection = has_projection and config.embedding_size != shape.hidden_size
        self.projection = nn.Linear(config.embedding_size, shape.hidden_size) if needs_projection else nn.Identity()
        self.layers = _layers(layers, shape, config, topology)


class PretrainingModel(nn.Module):
    """Architecture of BERT (generator only), ELECTRA (narrow generator) and PEER (shared bottom layers).

    Of a `part` there is only what belongs to it, by the same names. B micro-batch, S sequence length, E embedding size,
    H hidden size.
    """

    def __init__(self, config: ModelConfig, num_levels: int, topology: Topology, part: ModelPart | None = None) -> None:
        super().__init__()
        self.config, self.topology = config, topology
        part = part or ModelPart.whole(config)
        has_projection = part.has_embeddings
        if part.has_embeddings:
            self.embeddings = Embeddings(config, topology)
        self.shared_layers = _layers(part.shared_layers, config.generator, config, topology)
        self.generator = Network(
            config.generator, config, part.generator_layers, topology, has_projection=has_projection
        )
        if part.has_mlm_head:
            self.mlm_head = MaskedLMHead(config, topology)
        if config.ranker is not None:
            self.ranker = Network(config.ranker, config, part.ranker_layers, topology, has_projection=has_projection)
        if config.ranker is not None and part.has_ranking_head:
            self.ranking_head = RankingHead(config.ranker.hidden_size, num_levels)

    def encode(self, network: Network, ids_BS: Tensor, token_types_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Hidden states [S, B, H] of `network` (self.generator or self.ranker); mask is True on non-pad tokens."""
        hidden = self.run_layers(network, self.embed(network, ids_BS, token_types_BS), mask_BS)
        return join_sequence(hidden, self.topology)

    def embed(self, network: Network, ids_BS: Tensor, token_types_BS: Tensor) -> Tensor:
        """What goes into the first layer: [S, B, H], this rank's slice of it under sequence parallelism."""
        return split_sequence(network.projection(self.embeddings(ids_BS, token_types_BS)), self.topology)

    def run_layers(self, network: Network, hidden_SBH: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Through the shared layers and those of `network` that are here: [S, B, H] -> [S, B, H]."""
        for layer in (*self.shared_layers.values(), *network.layers.values()):
            hidden_SBH = layer(hidden_SBH, mask_BS)
        return hidden_SBH

    def generate(self, hidden_SBH: Tensor, positions_BP: Tensor) -> tuple[Tensor, Tensor]:
        """MLM head on the selected positions only: states [B*P, E] and the vocabulary bias."""
        return self.mlm_head(select(hidden_SBH, positions_BP))


def select(hidden_SBH: Tensor, positions_BP: Tensor) -> Tensor:
    """Hidden states at the given positions of each sequence: [B*P, H]."""
    rows = torch.arange(positions_BP.shape[0], device=positions_BP.device)[:, None]
    return hidden_SBH[positions_BP, rows].flatten(0, 1)


def _layers(numbers: Iterable[int], shape: EncoderShape, config: ModelConfig, topology: Topology) -> nn.ModuleDict:
    """Layers by their numbers, so that a part's parameters are named as in the whole."""
    return nn.ModuleDict({str(number): TransformerLayer(shape, config, topology) for number in numbers})
