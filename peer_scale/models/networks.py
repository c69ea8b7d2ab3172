"""The pre-training model: a generator and a ranker over shared embeddings and shared bottom layers."""

import torch
from torch import Tensor, nn

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.heads import MaskedLMHead, RankingHead
from peer_scale.models.layers import Embeddings, TransformerLayer
from peer_scale.parallel.sequence import join_sequence, split_sequence
from peer_scale.parallel.topology import Topology


class Network(nn.Module):
    """What one encoder does not share: its projection (where E != H) and its layers above the shared ones."""

    def __init__(self, shape: EncoderShape, config: ModelConfig, topology: Topology) -> None:
        super().__init__()
        needs_projection = config.embedding_size != shape.hidden_size
        self.projection = nn.Linear(config.embedding_size, shape.hidden_size) if needs_projection else nn.Identity()
        own_layers = shape.num_layers - config.num_shared_layers
        self.layers = nn.ModuleList(TransformerLayer(shape, config, topology) for _ in range(own_layers))


class PretrainingModel(nn.Module):
    """Architecture of BERT (generator only), ELECTRA (narrow generator) and PEER (shared bottom layers).

    B micro-batch, S sequence length, E embedding size, H hidden size.
    """

    def __init__(self, config: ModelConfig, num_levels: int, topology: Topology) -> None:
        super().__init__()
        self.config, self.topology = config, topology
        self.embeddings = Embeddings(config, topology)
        shared = (TransformerLayer(config.generator, config, topology) for _ in range(config.num_shared_layers))
        self.shared_layers = nn.ModuleList(shared)
        self.generator = Network(config.generator, config, topology)
        self.mlm_head = MaskedLMHead(config, topology)
        if config.ranker is not None:
            self.ranker = Network(config.ranker, config, topology)
            self.ranking_head = RankingHead(config.ranker.hidden_size, num_levels)

    def encode(self, network: Network, ids_BS: Tensor, token_types_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Hidden states [S, B, H] of `network` (self.generator or self.ranker); mask is True on non-pad tokens."""
        embedded = network.projection(self.embeddings(ids_BS, token_types_BS))
        hidden = split_sequence(embedded, self.topology)
        for layer in (*self.shared_layers, *network.layers):
            hidden = layer(hidden, mask_BS)
        return join_sequence(hidden, self.topology)

    def generate(self, hidden_SBH: Tensor, positions_BP: Tensor) -> tuple[Tensor, Tensor]:
        """MLM head on the selected positions only: states [B*P, E] and the vocabulary bias."""
        rows = torch.arange(positions_BP.shape[0], device=positions_BP.device)[:, None]
        return self.mlm_head(hidden_SBH[positions_BP, rows].flatten(0, 1))
