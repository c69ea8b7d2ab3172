"""Masked language modelling: BERT's objective, and how the generators of all others are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from peer_scale.configuration import configuration
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.models.costs import Blocks, mlm_head_matmul_flops
from peer_scale.models.paper_costs import paper_generator_flops
from peer_scale.objectives.exports import Entry, Export, dense_entries, family_of, norm_entries, vocabulary_entry
from peer_scale.objectives.graph import Cost, Graph, Value, Work, embedding_costs
from peer_scale.objectives.objective import Loss, Objective
from peer_scale.objectives.works import Outcome, WorkContext

# torch and what needs it are imported where they are used: `--help` reads the fields below and shall not wait for them
if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.models.generator_head import GeneratorOutput
    from peer_scale.models.networks import HeadBuilder, PretrainingModel
    from peer_scale.objectives.statistics import Places

MLM_LOSS = Loss("mlm_loss", 1.0, "selected")
MLM_SUMS = ("mlm_correct", "selected_square", "selected_variation")

_GENERATOR_USAGE = "This is the generator of the pre-training pair, kept to inspect it or to train further."

AfterSampling: TypeAlias = "Callable[[WorkContext, GeneratorOutput], Mapping[str, Tensor]]"
"""Makes the values that a generator's head gives of what it has sampled."""


@configuration
class MaskedLanguageModel(Objective):
    """BERT without next-sentence prediction: one network, the generator of the other objectives by itself."""

    kind: ClassVar[str] = "mlm"
    validation_metrics: ClassVar[tuple[str, ...]] = ("mlm_accuracy",)
    progress_metrics: ClassVar[Mapping[str, str]] = {"mlm_accuracy": "MLM accuracy"}

    def check_model(self, model: ModelConfig) -> None:
        if model.ranker is not None:
            raise UserError("the objective mlm trains one network; a model with a ranker needs another objective")

    def graph(self, model: ModelConfig) -> Graph:
        return Graph(tuple(model.networks.items()), model.num_shared_layers, generator_works(model), Blocks.of(model))

    def heads(self, model: ModelConfig) -> Mapping[str, HeadBuilder]:
        from peer_scale.models.heads import MaskedLMHead

        return {"mlm_head": lambda tensor_parallel: MaskedLMHead(model, tensor_parallel)}

    @property
    def losses(self) -> tuple[Loss, ...]:
        return (MLM_LOSS,)

    @property
    def sum_names(self) -> tuple[str, ...]:
        return MLM_SUMS

    def metrics(self, sums: Mapping[str, float]) -> dict[str, object]:
        return generator_metrics(sums)

    def describe(self) -> str:
        return "masked language model"

    def paper_flops(self, model: ModelConfig, seq_length: int) -> float:
        return paper_generator_flops(model, seq_length)

    def exports(self, model: ModelConfig) -> tuple[Export, ...]:
        return generator_exports(model)[::-1]


def generator_works(
    model: ModelConfig,
    after_sampling: AfterSampling | None = None,
    gives: tuple[Value, ...] = (),
    *,
    num_negatives: int = 0,
) -> tuple[Work, Work]:
    """Describe the pass through the generator and its head, which gives `gives` as `after_sampling` makes them.

    With `num_negatives` the head draws so many other tokens per position with the batch's extra random numbers.
    """
    from peer_scale.kernels.vocab_chunk import BLOCK
    from peer_scale.models.generator_head import (
        DRAW_REDUCED_BYTES,
        EXCLUSION_REDUCED_BYTES,
        GATHERED_BYTES,
        REDUCED_BYTES,
    )
    from peer_scale.models.vocab_shard import GPU_CHUNK_SIZE

    def head(context: WorkContext, _: Tensor | None) -> Outcome:
        return _masked_lm(context, after_sampling, num_negatives)

    width = model.generator.hidden_size
    # the blocks of the original and of each negative are computed again; the CPU's way does so for whole chunks
    num_blocks = 1 + num_negatives if num_negatives else 0
    drawing = EXCLUSION_REDUCED_BYTES + num_negatives * DRAW_REDUCED_BYTES if num_negatives else 0
    positions = Cost(
        "position",
        flops=mlm_head_matmul_flops(model, model.generator) + num_blocks * 2 * BLOCK * model.embedding_size,
        activations=width + 3 * model.embedding_size,
        workspace=GPU_CHUNK_SIZE,
        reduced_bytes=REDUCED_BYTES + 4 * model.embedding_size + drawing,
        gathered_bytes=GATHERED_BYTES,
        # the logits written by the product and read once; dense (both sides), GELU, norm
        moved=2 * model.vocab_size + width + 5 * model.embedding_size,
    )
    return (
        Work(
            "generator",
            network="generator",
            begin=lambda context: context.batch.masked_ids,
            end=_give_selected,
            gives=(Value("selected", "compute", width),),
            begin_costs=embedding_costs(model, model.generator),
        ),
        Work(
            "mlm_head",
            end=head,
            end_takes=("selected",),
            gives=gives,
            heads=("mlm_head",),
            has_loss=True,
            end_costs=(positions,),
        ),
    )


def generator_metrics(sums: Mapping[str, float]) -> dict[str, object]:
    """Make the metrics of a generator of its sums.

    `varying_share`: share of the squared norm of the hidden states at a sequence's selected positions that lies in
    their differences from the sequence's mean; near 0 the network says the same everywhere and does not learn.
    """
    return {
        "mlm_accuracy": sums["mlm_correct"] / sums["selected"],
        "varying_share": sums["selected_variation"] / sums["selected_square"] if sums["selected_square"] else None,
    }


def generator_exports(model: ModelConfig) -> tuple[Export, ...]:
    """Describe the generator as an ElectraForMaskedLM and, where it can be one, as a BertForMaskedLM.

    With ModernBERT's blocks it is a ModernBertForMaskedLM.
    """
    if family_of(model) == "modernbert":
        return (_modern_bert_export(model),)
    # BertForMaskedLM cannot project embeddings to another width; ELECTRA's class computes the same function and can
    has_projection = model.embedding_size != model.generator.hidden_size
    return (generator_export(model),) if has_projection else (generator_export(model), _bert_export(model))


def generator_export(model: ModelConfig) -> Export:
    """Describe the generator as an ElectraForMaskedLM, whose output matrix is the word embeddings."""
    entries = _mlm_head_entries(
        model, "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"
    )
    return Export("generator", "generator", "electra", "ElectraForMaskedLM", entries, _GENERATOR_USAGE, _mlm_logits)


def _bert_export(model: ModelConfig) -> Export:
    head = "cls.predictions"
    entries = _mlm_head_entries(model, f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.bias")
    return Export("generator", "generator", "bert", "BertForMaskedLM", entries, "A masked language model.", _mlm_logits)


def _modern_bert_export(model: ModelConfig) -> Export:
    entries = _mlm_head_entries(model, "head.dense", "head.norm", "decoder.bias")
    usage = "A masked language model." if model.ranker is None else _GENERATOR_USAGE
    return Export("generator", "generator", "modernbert", "ModernBertForMaskedLM", entries, usage, _mlm_logits)


def _mlm_head_entries(model: ModelConfig, dense: str, norm: str, bias: str) -> tuple[Entry, ...]:
    return (
        *dense_entries("mlm_head.dense", dense, has_bias=model.linear_bias),
        *norm_entries("mlm_head.norm", norm, model),
        vocabulary_entry("mlm_head.bias", bias, model.vocab_size),
    )


def _mlm_logits(model: PretrainingModel, hidden: Tensor) -> Tensor:
    import torch.nn.functional as F

    states, bias = model.head("mlm_head")(hidden)
    return F.linear(states, model.embeddings.word.weight, bias)[..., : model.config.vocab_size]


def _give_selected(context: WorkContext, hidden: Tensor | None) -> Outcome:
    assert hidden is not None, "a network ends in hidden states"
    batch = context.batch
    return Outcome(values={"selected": context.model.all_tokens(hidden, batch.sequences)[batch.positions]})


def _masked_lm(context: WorkContext, after_sampling: AfterSampling | None, num_negatives: int) -> Outcome:
    """MLM head on the selected hidden states [n, H]: the loss, samples (no gradient), sums."""
    from peer_scale.models.generator_head import generator_head

    model, batch, selected = context.model, context.batch, context.values["selected"]
    states, bias = model.head("mlm_head")(selected)
    generated = generator_head(
        states,
        model.embeddings.word.weight,
        bias,
        batch.input_ids[batch.positions],
        batch.uniforms,
        group=model.tensor_parallel.group,
        negative_uniforms=batch.extra_uniforms[:, :num_negatives] if num_negatives else None,
    )
    sums = context.tally(_generator_sums, selected.detach(), generated.original_rank)
    values = after_sampling(context, generated) if after_sampling else {}
    return Outcome({"mlm_loss": generated.loss.sum()}, sums, values)


def _generator_sums(selected: Tensor, original_rank: Tensor, places: Places) -> dict[str, Tensor]:
    """Count the best guesses, and sum the squared norms of the states [n, H] and of their differences from the mean.

    The mean is that of each sequence's states.
    """
    import torch

    states = selected.float()
    numbers = torch.arange(len(places.boundaries) - 1, device=states.device)
    belongs = (numbers[:, None] == places.selected_ids).float()  # [B, n]: a product adds up in a fixed order
    square = states.square().sum()
    of_means = (belongs @ states).square().sum(-1) / belongs.sum(1).clamp(min=1)
    return {
        "mlm_correct": (original_rank == 1).sum(),  # the original token is the best guess
        "selected_square": square,
        "selected_variation": square - of_means.sum(),
    }
