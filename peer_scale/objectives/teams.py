"""TEAMS (Shen et al. 2021): replaced-token detection and multi-word selection, each with top layers of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import NonNegativeFloat, PositiveInt

from peer_scale.configuration import configuration, option
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.costs import Blocks
from peer_scale.models.paper_costs import paper_generator_flops, paper_ranker_flops
from peer_scale.objectives.exports import ENCODER_CLASSES, Export, family_of
from peer_scale.objectives.graph import Cost, Graph, Value, Work, embedding_costs
from peer_scale.objectives.masked_lm import MLM_LOSS, MLM_SUMS, generator_exports, generator_metrics, generator_works
from peer_scale.objectives.objective import Loss, Objective
from peer_scale.objectives.statistics import RTD_SUMS, rtd_metrics, rtd_sums
from peer_scale.objectives.tqr import (
    RTD_CLASSES,
    RTD_LABELS,
    RTD_USAGES,
    corrupted_ids,
    replaced_logits,
    rtd_head_entries,
    scatter_labels,
    score_head_cost,
    token_losses,
)
from peer_scale.objectives.works import Outcome, WorkContext

# torch and what needs it are imported where they are used: `--help` reads the fields below and shall not wait for them
if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.models.generator_head import GeneratorOutput
    from peer_scale.models.networks import HeadBuilder

_REPLACED, _ORIGINAL = 1.0, 2.0  # rank labels of two levels


@configuration
class Teams(Objective):
    """TEAMS's hyper-parameters; the weights are those of its released code, 1 : 5 : 2.

    The ranker's `num_layers` counts its trunk and `num_separate_layers` of replaced-token detection; as many layers
    again, for multi-word selection, branch off the trunk. A position's candidates are the original token and
    `num_negatives` others that the generator finds likely.
    """

    kind: ClassVar[str] = "teams"
    validation_metrics: ClassVar[tuple[str, ...]] = ("mlm_accuracy", "rtd_recall", "rtd_auc", "mws_accuracy")
    progress_metrics: ClassVar[Mapping[str, str]] = {
        "mlm_accuracy": "MLM accuracy",
        "rtd_auc": "RTD AUC",
        "mws_accuracy": "MWS accuracy",
    }

    rtd_weight: NonNegativeFloat = option(
        default=5.0, help="Weight of replaced-token detection in the loss, the generator's being 1.", metavar="X"
    )
    mws_weight: NonNegativeFloat = option(
        default=2.0, help="Weight of multi-word selection in the loss, the generator's being 1.", metavar="X"
    )
    num_negatives: PositiveInt = option(
        default=4,
        help="Wrong candidates per position, among which multi-word selection finds the original.",
        metavar="N",
    )
    num_separate_layers: PositiveInt = option(
        default=1, help="Top layers of the ranker that detection and selection each have of their own.", metavar="N"
    )

    def check_model(self, model: ModelConfig) -> None:
        if model.ranker is None:
            raise UserError("the objective teams trains a generator and a ranker, but the model has no ranker")
        limit = model.ranker.num_layers - max(model.num_shared_layers, 1)
        if self.num_separate_layers > limit:
            raise UserError(
                f"num_separate_layers is {self.num_separate_layers}; of the ranker's {model.ranker.num_layers} layers "
                f"at most {limit} can be above the trunk"
            )
        if model.vocab_size - 1 < self.num_negatives:
            raise UserError(
                f"num_negatives is {self.num_negatives}, but a vocabulary of {model.vocab_size} has only "
                f"{model.vocab_size - 1} tokens beside the original"
            )

    def graph(self, model: ModelConfig) -> Graph:
        trunk, num_candidates = self._trunk(model), 1 + self.num_negatives
        width = model.embedding_size
        gives = (
            Value("sampled", "int64"),
            Value("labels", "float32"),
            Value("candidates", "int64", num_candidates),
        )
        works = (
            *generator_works(model, _after_sampling, gives, num_negatives=self.num_negatives),
            Work(
                "ranker",
                network="ranker",
                begin=corrupted_ids,
                begin_takes=("sampled",),
                end=_detect,
                end_takes=("labels",),
                gives=(Value("selection_states", "compute", width),),
                heads=("rtd_branch", "mws_branch"),
                has_loss=True,
                end_layers=2 * self.num_separate_layers,
                end_joins=2,
                begin_costs=embedding_costs(model, trunk),
                end_costs=(
                    score_head_cost(trunk),
                    Cost(
                        "position",
                        flops=2 * trunk.hidden_size * width,
                        activations=trunk.hidden_size + 3 * width,
                        moved=trunk.hidden_size + 5 * width,
                    ),
                ),
            ),
            Work(
                "selection",
                end=_choose,
                end_takes=("selection_states", "candidates"),
                has_loss=True,
                end_costs=(
                    Cost(
                        "position",
                        flops=2 * width * num_candidates,
                        activations=width,
                        workspace=num_candidates * width,
                        reduced_bytes=4 * (num_candidates + width),
                        moved=3 * num_candidates * width,  # rows read, written, and read by the product
                    ),
                ),
            ),
        )
        networks = {**model.networks, "ranker": trunk}
        return Graph(tuple(networks.items()), model.num_shared_layers, works, Blocks.of(model))

    def heads(self, model: ModelConfig) -> Mapping[str, HeadBuilder]:
        from peer_scale.models.heads import MaskedLMHead
        from peer_scale.models.multi_word_selection import DetectionBranch, SelectionBranch

        trunk, count = self._trunk(model), self.num_separate_layers
        return {
            "mlm_head": lambda ranks: MaskedLMHead(model, ranks),
            "rtd_branch": lambda ranks: DetectionBranch(trunk, model, count, ranks),
            "mws_branch": lambda ranks: SelectionBranch(trunk, model, count, ranks),
        }

    @property
    def num_extra_uniforms(self) -> int:
        return self.num_negatives

    @property
    def losses(self) -> tuple[Loss, ...]:
        rtd, mws = Loss("rtd_loss", self.rtd_weight, "tokens"), Loss("mws_loss", self.mws_weight, "selected")
        return MLM_LOSS, rtd, mws

    @property
    def sum_names(self) -> tuple[str, ...]:
        return (*MLM_SUMS, *RTD_SUMS, "mws_correct")

    def metrics(self, sums: Mapping[str, float]) -> dict[str, object]:
        accuracy = {"mws_accuracy": sums["mws_correct"] / sums["selected"]}
        return {**generator_metrics(sums), **rtd_metrics(sums), **accuracy}

    def describe(self) -> str:
        return (
            f"TEAMS, {1 + self.num_negatives} candidates, weights 1 : {self.rtd_weight:g} : {self.mws_weight:g} (MLM, "
            "detection, selection)"
        )

    def paper_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Count the layers of both branches, but not the candidates' scores: the printed numbers leave them out."""
        trunk = self._trunk(model)
        all_layers = replace(trunk, num_layers=trunk.num_layers + 2 * self.num_separate_layers)
        return paper_generator_flops(model, seq_length) + paper_ranker_flops(model, all_layers, seq_length)

    def exports(self, model: ModelConfig) -> tuple[Export, ...]:
        family = family_of(model)
        detection = Export(
            branch="rtd",
            network="ranker",
            family=family,
            class_name=RTD_CLASSES[family],
            head=rtd_head_entries("rtd_branch.head", model),
            usage=f"The branch of replaced-token detection (rtd). {RTD_USAGES[family]}",
            logits=lambda model, hidden: replaced_logits(model, hidden, "rtd_branch.head"),
            top_layers=self._top_layers("rtd_branch"),
            top_norm="rtd_branch.final_norm",
            labels=RTD_LABELS[family],
        )
        parts = [f"mws_branch.dense.{kind}" for kind in ("weight", *(["bias"] if model.linear_bias else []))]
        parts += [f"mws_branch.norm.{kind}" for kind in ("weight", *(["bias"] if model.has_norm_bias else []))]
        selection = Export(
            branch="mws",
            network="ranker",
            family=family,
            class_name=ENCODER_CLASSES[family],
            head=(),
            usage="The branch of multi-word selection (mws), as an encoder to fine-tune.",
            logits=None,
            top_layers=self._top_layers("mws_branch"),
            top_norm="mws_branch.final_norm",
            left_out=tuple(parts),
        )
        return detection, selection, *generator_exports(model)

    def _top_layers(self, branch: str) -> tuple[str, ...]:
        return tuple(f"{branch}.layers.{number}" for number in range(self.num_separate_layers))

    def _trunk(self, model: ModelConfig) -> EncoderShape:
        assert model.ranker is not None, "check_model has been asked"
        return replace(model.ranker, num_layers=model.ranker.num_layers - self.num_separate_layers)


def _after_sampling(context: WorkContext, generated: GeneratorOutput) -> dict[str, Tensor]:
    """Make what the other works need of the generator's draws: replacements, labels [n] and candidates [n, c]."""
    import torch

    assert generated.negatives is not None, "the head was asked for negatives"
    originals = context.batch.input_ids[context.batch.positions]
    return {
        "sampled": generated.sampled_ids,
        "labels": torch.where(generated.sampled_ids == originals, _ORIGINAL, _REPLACED),
        "candidates": torch.cat([originals[:, None], generated.negatives], 1),
    }


def _detect(context: WorkContext, hidden: Tensor | None) -> Outcome:
    """Run both branches on the trunk's states: the loss of detection, and the states to select candidates with."""
    assert hidden is not None, "a network ends in hidden states"
    model, batch = context.model, context.batch
    scores, thresholds = model.head("rtd_branch")(hidden, batch.sequences)
    labels = scatter_labels(batch, context.values["labels"], num_levels=2)
    losses = token_losses(scores, thresholds, labels)
    states = model.head("mws_branch")(hidden, batch.sequences, batch.positions)
    sums = context.tally(rtd_sums, scores.detach(), thresholds.detach()[-1], labels == _REPLACED)
    return Outcome({"rtd_loss": losses.sum()}, sums, {"selection_states": states})


def _choose(context: WorkContext, _: Tensor | None) -> Outcome:
    """Score the candidates, of which the first is the original."""
    import torch
    import torch.nn.functional as F

    from peer_scale.models.multi_word_selection import candidate_scores

    model = context.model
    scores = candidate_scores(
        context.values["selection_states"],
        model.embeddings.word.weight,
        context.values["candidates"],
        group=model.tensor_parallel.group,
    )
    originals = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    loss = F.cross_entropy(scores, originals, reduction="sum")
    return Outcome({"mws_loss": loss}, {"mws_correct": (scores[:, :1] > scores[:, 1:]).all(1).sum()})
