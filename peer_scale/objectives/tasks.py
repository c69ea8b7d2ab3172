"""The forward pass of one micro-batch: corrupt, rank, and add up the losses and what is worth watching.

This is the module that the training engine wraps; `PretrainingModel` beneath it is architecture only.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from peer_scale.models.config import ModelConfig, ModelPart
from peer_scale.models.generator_head import GeneratorOutput, generator_head
from peer_scale.models.networks import PretrainingModel, select
from peer_scale.objectives.config import ObjectiveConfig
from peer_scale.objectives.statistics import StatisticsLayout, masked_lm_statistics, ranking_statistics
from peer_scale.objectives.tqr import rank_labels, token_losses
from peer_scale.parallel.topology import Topology
from peer_scale.samples.examples import Batch


class GlobalCounts(NamedTuple):
    """Normalisers of one optimizer step, summed over all its micro-batches on all ranks (0-dim fp32 tensors)."""

    selected: Tensor
    tokens: Tensor


class PretrainingTask(nn.Module):
    """MLM for the generator and, unless the model is BERT, token quality ranking for the ranker (Section 3)."""

    def __init__(
        self, config: ModelConfig, objective: ObjectiveConfig, topology: Topology, part: ModelPart | None = None
    ) -> None:
        super().__init__()
        self.objective = objective
        self.tensor_group = topology.group("tp")
        self.model = PretrainingModel(config, objective.num_levels, topology, part)
        self.statistics = StatisticsLayout(objective.num_levels, has_ranker=config.ranker is not None)

    def forward(self, batch: Batch, counts: GlobalCounts, warmup: bool = False) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the global loss (a scalar) and its statistics [len(self.statistics)]."""
        model = self.model
        hidden = model.encode(model.generator, batch.masked_ids, batch.token_types, batch.is_token)
        loss, generated, statistics = self.masked_lm(select(hidden, batch.positions), batch, counts)
        if model.config.ranker is not None:
            corrupted_ids, labels = corrupt(batch, generated, self.objective)
            hidden = model.encode(model.ranker, corrupted_ids, batch.token_types, batch.is_token)
            ranking_loss, ranking = self.ranking(hidden, corrupted_ids, labels, batch, counts, warmup)
            loss, statistics = loss + ranking_loss, statistics | ranking
        return loss, self.statistics.pack(statistics)

    def masked_lm(
        self, selected: Tensor, batch: Batch, counts: GlobalCounts
    ) -> tuple[Tensor, GeneratorOutput, dict[str, Tensor]]:
        """MLM head on the selected hidden states [B*P, H]: share of the loss, samples (no gradient), statistics."""
        states, bias = self.model.mlm_head(selected)
        targets = batch.input_ids.gather(1, batch.positions).flatten()
        word_embeddings = self.model.embeddings.word.weight
        generated = generator_head(
            states, word_embeddings, bias, targets, batch.uniforms.flatten(), group=self.tensor_group
        )
        is_selected = batch.is_selected.flatten()
        mlm_loss = torch.where(is_selected, generated.loss, 0.0).sum()
        statistics = masked_lm_statistics(mlm_loss, generated.original_rank, is_selected, batch.is_token)
        return mlm_loss / counts.selected, generated, statistics

    def ranking(
        self, hidden: Tensor, corrupted_ids: Tensor, labels: Tensor, batch: Batch, counts: GlobalCounts, warmup: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """TQR head on the ranker's hidden states [S, B, H]: share of the loss and statistics."""
        scores_SB, thresholds = self.model.ranking_head(hidden)
        scores = scores_SB.transpose(0, 1)
        losses = token_losses(scores, thresholds, labels, gamma=self.objective.gammas, warmup=warmup)
        tqr_loss = torch.where(batch.is_token, losses, 0.0).sum()
        statistics = ranking_statistics(tqr_loss, scores.detach(), thresholds.detach(), labels, batch, corrupted_ids)
        return self.objective.tqr_weight * tqr_loss / counts.tokens, statistics


def corrupt(batch: Batch, generated: GeneratorOutput, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Put the sampled tokens in place: corrupted ids and rank labels, [B, S] each (originals have label K)."""
    originals = batch.input_ids.gather(1, batch.positions)
    # slots that only fill up point at position 0 and write back what is there
    sampled = torch.where(batch.is_selected, generated.sampled_ids.view_as(originals), originals)
    labels = rank_labels(
        sampled == originals,
        generated.original_logit.view_as(batch.uniforms),
        generated.sampled_logit.view_as(batch.uniforms),
        generated.original_rank.view_as(originals),
        num_levels=objective.num_levels,
        taus=objective.taus,
        top_t=objective.top_t,
        delta=objective.delta,
    )
    all_labels = torch.full(batch.input_ids.shape, float(objective.num_levels), device=labels.device)
    return batch.input_ids.scatter(1, batch.positions, sampled), all_labels.scatter(1, batch.positions, labels)
