"""Token quality ranking: the labels of Table 2, the loss of Eq. 5, and the objective of PEER; ELECTRA's at K = 2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from peer_scale.configuration import configuration, option
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.costs import Blocks, score_head_matmul_flops
from peer_scale.models.paper_costs import paper_generator_flops, paper_ranker_flops
from peer_scale.objectives.exports import Entry, Export, dense_entries, family_of, first, norm_entries
from peer_scale.objectives.graph import Cost, Graph, Value, Work, embedding_costs
from peer_scale.objectives.masked_lm import MLM_LOSS, MLM_SUMS, generator_exports, generator_metrics, generator_works
from peer_scale.objectives.objective import Loss, Objective
from peer_scale.objectives.statistics import RTD_SUMS, Places, rtd_metrics, rtd_sums, share
from peer_scale.objectives.works import Outcome, WorkContext

# torch and what needs it are imported where they are used: `--help` reads the fields below and shall not wait for them
if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.models.generator_head import GeneratorOutput
    from peer_scale.models.networks import HeadBuilder, PretrainingModel
    from peer_scale.samples.examples import Batch

UNKNOWN_LABEL = -1.0
BUFFER_OFFSET = 0.1


def rank_labels(
    is_original: Tensor,
    original_logit: Tensor,
    sampled_logit: Tensor,
    original_rank: Tensor,
    *,
    num_levels: int = 3,
    taus: Sequence[float] = (1.0,),
    top_t: int = 3,
    delta: float = 3.0,
    buffer_offset: float = BUFFER_OFFSET,
) -> Tensor:
    """Give the rank label of each token after Table 2, elementwise over tensors of one (any) shape.

    Args:
        is_original: bool; the sampled token equals the original.
        original_logit: logit of the original token.
        sampled_logit: logit of the sampled token.
        original_rank: 1 + number of tokens with a strictly greater logit than the original's.
        num_levels: K >= 2.
        taus: tau_1 < ... < tau_{K-2}.
        top_t: T; where the original ranks below it, the level is unknown (-1).
        delta: width of the buffers; 0 for none.
        buffer_offset: what is added to a level's label in the buffer above it.

    Returns:
        fp32: K for originals, -1, levels 1..K-1, or k + buffer_offset in the buffer above level k.

    Raises:
        UserError: the settings are none of `TokenQualityRanking`: K < 2, a wrong number of taus, and so on.
    """
    import torch

    TokenQualityRanking(num_levels=num_levels, taus=tuple(taus), top_t=top_t, delta=delta)  # checks them
    difference = sampled_logit.float() - original_logit.float()
    labels = torch.ones_like(difference)
    for level in range(1, num_levels - 1):
        tau = taus[num_levels - 2 - level]  # tau_{K-1-level} parts this level from the next
        labels = torch.where(difference >= -math.log(tau * (1 + delta)), level + buffer_offset, labels)
        labels = torch.where(difference >= -math.log(tau), float(level + 1), labels)
    labels = torch.where(original_rank > top_t, UNKNOWN_LABEL, labels)
    return torch.where(is_original, float(num_levels), labels)


def tqr_loss(
    scores: Tensor,
    thresholds: Tensor,
    labels: Tensor,
    *,
    gamma: float | Sequence[float] = 0.5,
    buffer_offset: float = BUFFER_OFFSET,
    warmup: bool = False,
) -> Tensor:
    """Sum up Eq. 5 (not averaged) over all given tokens; a scalar in fp32 (or fp64, if the scores are).

    Args:
        scores: w.h of each token, any shape.
        thresholds: xi_1 < ... < xi_{K-1}; their number gives K.
        labels: of `rank_labels`, shaped as scores.
        gamma: weight of each level term r = 1..K-2, or one for all.
        buffer_offset: as in `rank_labels`.
        warmup: only the first term, ELECTRA's loss (Eq. 4).
    """
    return token_losses(scores, thresholds, labels, gamma=gamma, buffer_offset=buffer_offset, warmup=warmup).sum()


def _loss(scores: Tensor, thresholds: Tensor, labels: Tensor, gammas: tuple[float, ...], warmup: bool) -> Tensor:
    """Do as `tqr_loss` does, by arguments in a row as what is compiled gets them."""
    return tqr_loss(scores, thresholds, labels, gamma=gammas, warmup=warmup)


def token_losses(
    scores: Tensor,
    thresholds: Tensor,
    labels: Tensor,
    *,
    gamma: float | Sequence[float] = 0.5,
    buffer_offset: float = BUFFER_OFFSET,
    warmup: bool = False,
) -> Tensor:
    """Give the summands of `tqr_loss`, one per token, shaped as scores."""
    import torch
    import torch.nn.functional as F

    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, thresholds = scores.to(dtype), thresholds.to(dtype)
    num_levels = len(thresholds.unbind()) + 1
    losses = F.binary_cross_entropy_with_logits(
        thresholds[-1] - scores, (labels <= num_levels - 1).to(dtype), reduction="none"
    )
    if warmup:
        return losses
    gammas = [gamma] * (num_levels - 2) if isinstance(gamma, int | float) else list(gamma) * (num_levels - 2)
    for level in range(1, num_levels - 1):
        logit = thresholds[level - 1] - scores
        # halfway between the buffer's label and the next level's: no rounding of either can matter
        is_above = labels > level + (1 + buffer_offset) / 2
        is_below = (labels <= level) & (labels != UNKNOWN_LABEL)
        losses = losses - gammas[level - 1] * (is_below * F.logsigmoid(logit) + is_above * F.logsigmoid(-logit))
    return losses


@configuration
class TokenQualityRanking(Objective):
    """PEER's hyper-parameters (Section 3; Appendix A); two levels make ELECTRA's replaced-token detection.

    `taus` has K-2 entries and `gammas` K-2 (or one for all); `warmup_epochs` is how long only the first term of Eq. 5
    is used.
    """

    kind: ClassVar[str] = "tqr"
    validation_metrics: ClassVar[tuple[str, ...]] = ("mlm_accuracy", "rtd_recall", "rtd_auc", "rank_concordance")
    progress_metrics: ClassVar[Mapping[str, str]] = {"mlm_accuracy": "MLM accuracy", "rtd_auc": "RTD AUC"}

    num_levels: Annotated[int, Field(ge=2)] = option(
        default=3,
        help="Levels of quality that tokens are ranked into (K): the original is in the best one; 2 is ELECTRA's "
        "replaced-token detection.",
        metavar="K",
    )
    taus: tuple[PositiveFloat, ...] = option(
        default=(1.0,),
        help="Borders between the levels of replaced tokens: how many times as likely as the replacement the generator "
        "finds the original there. K - 2 ratios, ascending.",
        metavar="TAU",
    )
    top_t: PositiveInt = option(
        default=3,
        help="A replaced token's level counts as known where the original is among the generator's T best guesses.",
        metavar="T",
    )
    delta: NonNegativeFloat = option(
        default=3.0,
        help="Width of the buffer at each border: from tau to tau x (1 + delta) a token counts for neither side of it; "
        "0 for none.",
        metavar="X",
    )
    gammas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = option(
        default=(0.5,),
        help="Weights of the loss's ranking terms: one for all, or K - 2.",
        metavar="GAMMA",
    )
    tqr_weight: NonNegativeFloat = option(
        default=50.0, help="Weight of the ranker's loss in the total, the generator's being 1.", metavar="LAMBDA"
    )
    warmup_epochs: NonNegativeFloat = option(
        default=0.8,
        help="Epochs in which only replaced tokens are told from original ones, before the ranking terms begin.",
        metavar="EPOCHS",
    )

    def __post_init__(self) -> None:
        _check_levels(self.num_levels, self.taus, self.delta)
        if len(self.gammas) not in (1, self.num_levels - 2):
            raise UserError(
                f"gammas {list(self.gammas)}: {self.num_levels} levels take one weight, or {self.num_levels - 2}"
            )

    def changed(self, changes: Mapping[str, object]) -> Objective:
        """Take the taus away with the levels: K = 2 has none."""
        defaults = {"taus": ()} if changes.get("num_levels") == 2 else {}
        return super().changed({**defaults, **changes})

    def check_model(self, model: ModelConfig) -> None:
        if model.ranker is None:
            raise UserError("the objective tqr trains a generator and a ranker, but the model has no ranker")

    def graph(self, model: ModelConfig) -> Graph:
        ranker = _ranker(model)
        works = (
            *generator_works(model, self._label, (Value("sampled", "int64"), Value("labels", "float32"))),
            Work(
                "ranker",
                network="ranker",
                begin=corrupted_ids,
                begin_takes=("sampled",),
                end=self._rank,
                end_takes=("labels",),
                heads=("ranking_head",),
                has_loss=True,
                begin_costs=embedding_costs(model, ranker),
                end_costs=(score_head_cost(ranker),),
            ),
        )
        return Graph(tuple(model.networks.items()), model.num_shared_layers, works, Blocks.of(model))

    def heads(self, model: ModelConfig) -> Mapping[str, HeadBuilder]:
        from peer_scale.models.heads import MaskedLMHead, RankingHead

        return {
            "mlm_head": lambda tensor_parallel: MaskedLMHead(model, tensor_parallel),
            "ranking_head": lambda _: RankingHead(_ranker(model).hidden_size, self.num_levels, model),
        }

    @property
    def losses(self) -> tuple[Loss, ...]:
        return MLM_LOSS, Loss("tqr_loss", self.tqr_weight, "tokens")

    @property
    def sum_names(self) -> tuple[str, ...]:
        labels = map(label_key, possible_labels(self.num_levels))
        correct = (f"correct_{level}" for level in range(1, self.num_levels + 1))
        return (*MLM_SUMS, *RTD_SUMS, "rank_pairs", "rank_pairs_in_order", *labels, *correct)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, object]:
        counts = {label: sums[label_key(label)] for label in possible_labels(self.num_levels)}
        return {
            **generator_metrics(sums),
            **rtd_metrics(sums),
            "rank_concordance": share(sums["rank_pairs_in_order"], sums["rank_pairs"]),
            "rank_label_fractions": {f"{label:g}": count / sums["selected"] for label, count in counts.items()},
            "level_accuracy": {
                str(level): share(sums[f"correct_{level}"], counts[float(level)])
                for level in range(1, self.num_levels + 1)
            },
        }

    def describe(self) -> str:
        levels = {"taus": list(self.taus), "top T": self.top_t, "delta": self.delta}
        details = ", ".join(f"{name} {value}" for name, value in levels.items()) if self.num_levels > 2 else "ELECTRA"
        return f"{self.num_levels} levels ({details}), lambda {self.tqr_weight:g}"

    def paper_flops(self, model: ModelConfig, seq_length: int) -> float:
        return paper_generator_flops(model, seq_length) + paper_ranker_flops(model, _ranker(model), seq_length)

    def exports(self, model: ModelConfig) -> tuple[Export, ...]:
        family = family_of(model)
        ranker = Export(
            branch="ranker",
            network="ranker",
            family=family,
            class_name=RTD_CLASSES[family],
            head=rtd_head_entries("ranking_head", model),
            usage=RTD_USAGES[family],
            logits=lambda model, hidden: replaced_logits(model, hidden, "ranking_head"),
            extras={"free_thresholds": "ranking_head.free_thresholds"},
            labels=RTD_LABELS[family],
        )
        return ranker, *generator_exports(model)

    def warmup_steps(self, samples_per_epoch: int, global_batch_size: int) -> int:
        """Count the steps with Eq. 5's first term only: those that begin before the warm-up's share of an epoch."""
        return -(-round(self.warmup_epochs * samples_per_epoch) // global_batch_size)

    def notices(self, warmup_steps: int) -> dict[int, str]:
        if self.num_levels == 2:
            return {}
        return {warmup_steps + 1: "the ranking terms of the loss begin; it rises here"}

    def _label(self, context: WorkContext, generated: GeneratorOutput) -> dict[str, Tensor]:
        """Make what the ranker needs of the sampled tokens: ids and rank labels, [n] each."""
        originals = context.batch.input_ids[context.batch.positions]
        labels = rank_labels(
            generated.sampled_ids == originals,
            generated.original_logit,
            generated.sampled_logit,
            generated.original_rank,
            num_levels=self.num_levels,
            taus=self.taus,
            top_t=self.top_t,
            delta=self.delta,
        )
        return {"sampled": generated.sampled_ids, "labels": labels}

    def _rank(self, context: WorkContext, hidden: Tensor | None) -> Outcome:
        """TQR head on the ranker's hidden states."""
        assert hidden is not None, "a network ends in hidden states"
        batch = context.batch
        hidden = context.model.all_tokens(hidden, batch.sequences)
        scores, thresholds = context.model.head("ranking_head")(hidden)
        labels = scatter_labels(batch, context.values["labels"], self.num_levels)
        loss = context.call(_loss, scores, thresholds, labels, self.gammas, context.warmup)
        sums = context.tally(ranking_sums, scores.detach(), thresholds.detach(), labels)
        return Outcome({"tqr_loss": loss}, sums)


def corrupted_ids(context: WorkContext) -> Tensor:
    """Put the sampled tokens in place: token ids [T]."""
    return context.batch.input_ids.scatter(0, context.batch.positions, context.values["sampled"])


def scatter_labels(batch: Batch, labels: Tensor, num_levels: int) -> Tensor:
    """Give all tokens labels [T]: those of the selected positions, [n], and K for all others."""
    import torch

    everywhere = torch.full(batch.input_ids.shape, float(num_levels), device=labels.device)
    return everywhere.scatter(0, batch.positions, labels)


def score_head_cost(shape: EncoderShape) -> Cost:
    """Say what a dense layer and one score per token take."""
    width = shape.hidden_size
    # dense (both sides), GELU (both sides), the score
    return Cost("token", flops=score_head_matmul_flops(shape), activations=3 * width, moved=5 * width)


RTD_CLASSES = {"electra": "ElectraForPreTraining", "modernbert": "ModernBertForTokenClassification"}
RTD_LABELS = {"electra": (), "modernbert": ("original", "replaced")}
RTD_USAGES = {
    "electra": "Positive logits mark tokens that do not fit: logit = -(w.h) + xi_{K-1}.",
    "modernbert": "The label replaced marks tokens that do not fit: its logit is -(w.h) + xi_{K-1}, the other's is 0.",
}


def rtd_head_entries(head: str, model: ModelConfig) -> tuple[Entry, ...]:
    """Map our RankingHead to transformers' class, whose logit for "replaced" is -w.h + xi_{K-1} (Eq. 3).

    Of the thresholds it has the last only. ElectraForPreTraining has that logit alone; ModernBertForTokenClassification
    has two labels, and the logit of "original" is 0.
    """
    if family_of(model) == "modernbert":
        return (
            *dense_entries(f"{head}.dense", "head.dense", has_bias=model.linear_bias),
            *norm_entries(f"{head}.norm", "head.norm", model),
            Entry(
                f"{head}.score.weight", ("classifier.weight",), lambda w: (_below_zero(-w),), lambda t: -_second(t[0])
            ),
            Entry(
                f"{head}.free_thresholds",
                ("classifier.bias",),
                lambda xi: (_below_zero(xi[-1:]),),
                lambda t: _second(t[0]),
                _with_last,
            ),
        )
    theirs = "discriminator_predictions"
    return (
        *dense_entries(f"{head}.dense", f"{theirs}.dense"),
        Entry(f"{head}.score.weight", (f"{theirs}.dense_prediction.weight",), lambda w: (-w,), lambda t: -t[0]),
        Entry(
            f"{head}.free_thresholds",
            (f"{theirs}.dense_prediction.bias",),
            lambda xi: (xi[-1:],),
            first,
            _with_last,
        ),
    )


def _with_last(thresholds: Tensor, last: Tensor) -> Tensor:
    import torch

    return torch.cat([thresholds[:-1], last])


def _below_zero(row: Tensor) -> Tensor:
    """Put a row of zeros, for the label "original", before that of "replaced"."""
    import torch

    return torch.cat([torch.zeros_like(row), row])


def _second(rows: Tensor) -> Tensor:
    """Take the row of "replaced", as it is where that of "original" is zero: other weights fail the verification."""
    return rows[1:]


def replaced_logits(model: PretrainingModel, hidden: Tensor, head: str) -> Tensor:
    """Give the logits of transformers' class for the hidden states [T, H]: [T], or [T, 2] with those of "original"."""
    import torch

    scores, thresholds = model.head(head)(hidden)
    logits = thresholds[-1] - scores
    is_one = family_of(model.config) == "electra"
    return logits if is_one else torch.stack([torch.zeros_like(logits), logits], -1)


def _ranker(model: ModelConfig) -> EncoderShape:
    assert model.ranker is not None, "check_model has been asked"
    return model.ranker


def _check_levels(num_levels: int, taus: tuple[float, ...], delta: float) -> None:
    """Raise UserError unless there are K-2 taus and tau_k (1 + delta) <= tau_{k+1} for k = 1..K-3 (footnote 4)."""
    if len(taus) != num_levels - 2:
        raise UserError(f"taus {list(taus)}: K = {num_levels} levels take {num_levels - 2} values")
    for index, (tau, following) in enumerate(itertools.pairwise(taus), start=1):
        if tau >= following or tau * (1 + delta) > following:
            raise UserError(
                f"tau_{index} (1 + delta) = {tau:g} x {1 + delta:g} must not exceed tau_{index + 1} = {following:g}: "
                f"lower delta or spread the taus {list(taus)}"
            )


def possible_labels(num_levels: int) -> list[float]:
    """List -1, the levels 1..K and the buffers above levels 1..K-2, ascending."""
    buffers = [level + BUFFER_OFFSET for level in range(1, num_levels - 1)]
    return sorted([UNKNOWN_LABEL, *map(float, range(1, num_levels + 1)), *buffers])


def label_key(label: float) -> str:
    """Name the sum that counts `label`."""
    return f"label_{label:g}"


def ranking_sums(scores: Tensor, thresholds: Tensor, labels: Tensor, places: Places) -> dict[str, Tensor]:
    """Sum up the ranker's pass: RTD over all tokens; labels, levels and pairs at the selected positions.

    A pair of ranks is two replaced tokens of one sequence whose levels are known and differ, in order where the better
    one has the greater score. Scores and labels are [T], thresholds [K-1].
    """
    import torch

    from peer_scale.sequences import tokens_of_each

    num_levels = len(thresholds.unbind()) + 1  # known when this is compiled, as the length of a tensor is not
    sums = rtd_sums(scores, thresholds[-1], labels != num_levels, places)
    scores, labels = scores[places.positions], labels[places.positions]
    is_level = (labels >= 1) & (labels < num_levels) & (labels == labels.round())
    others, is_other = tokens_of_each(places.selected_ids, places.selected_boundaries, places.max_selected)
    is_pair = (labels[:, None] < labels[others]) & is_level[:, None] & is_level[others] & is_other
    sums["rank_pairs"] = is_pair.sum()
    sums["rank_pairs_in_order"] = (is_pair & (scores[:, None] < scores[others])).sum()
    predicted = 1 + (scores[:, None] > thresholds).sum(-1)
    for label in possible_labels(num_levels):
        has_label = labels == torch.tensor(label, dtype=labels.dtype)
        sums[label_key(label)] = has_label.sum()
        if label >= 1 and label.is_integer():
            sums[f"correct_{int(label)}"] = (has_label & (predicted == label)).sum()
    return sums
