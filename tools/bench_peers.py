"""What tools/bench.py measures a training step against: other people's code, a plain loop, the bare products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer_scale.objectives.task import PretrainingTask
from peer_scale.objectives.works import GlobalCounts, StepInfo
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import Topology
from peer_scale.samples.examples import Batch
from peer_scale.settings.run import RunConfig
from peer_scale.training.optimizer import build_optimizer


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    run: RunConfig
    topology: Topology
    batches: tuple[Batch, ...]

    @property
    def batch(self) -> Batch:
        """The first batch, for what is timed on one."""
        return self.batches[0]


class PaddedBatch(NamedTuple):
    """What the peers work on: B sequences, filled up to the same length S with [PAD], whose id is 0."""

    input_ids: Tensor  # [B, S] the original tokens
    masked_ids: Tensor  # [B, S] with [MASK] at the selected positions
    attention_mask: Tensor  # [B, S] True but for padding
    is_selected: Tensor  # [B, S] True at the positions that are selected for corruption


PeerStep = Callable[[PaddedBatch], None]


def padded(batch: Batch, seq_length: int | None) -> PaddedBatch:
    """Pad a batch to `seq_length` or, where that is None, to its longest sequence."""
    sequences, length = batch.sequences, seq_length or batch.sequences.max_length
    is_token = torch.ones_like(batch.input_ids, dtype=torch.bool)
    is_selected = torch.zeros_like(is_token).index_fill(0, batch.positions, True)

    def rows(values: Tensor) -> Tensor:
        filled = values.new_zeros(len(sequences.lengths), length)
        filled[sequences.sequence_ids, sequences.position_ids] = values
        return filled

    return PaddedBatch(*map(rows, (batch.input_ids, batch.masked_ids, is_token, is_selected)))


def our_task(setting: Setting) -> PretrainingTask:
    """Our model with its initial weights."""
    run = setting.run
    model, tensor_parallel = run.model, setting.topology.tensor_parallel
    task = PretrainingTask(model, run.objective, tensor_parallel)
    initialize_weights(
        task, seed=run.seed, std=model.init_std, vocab_size=model.vocab_size, tensor_parallel=tensor_parallel
    )
    return task


def plain_loop(setting: Setting) -> Callable[[], None]:
    """Our model without DeepSpeed: weights in the run's format, fp32 masters and gradient sums, clipping, AdamW."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[setting.run.training.precision]
    task = our_task(setting).to(setting.topology.device)
    masters = [parameter.detach().clone().requires_grad_() for parameter in task.parameters()]
    task.to(dtype)
    holder = nn.ParameterList(masters)
    optimizer = build_optimizer(holder, setting.run.training)
    batch, works = setting.batch, [work.name for work in task.graph.works]
    selected, tokens = (torch.tensor(float(n)) for n in (batch.selected.num_tokens, batch.sequences.num_tokens))
    info = StepInfo(GlobalCounts(selected, tokens))

    def step() -> None:
        loss, *_ = task(works, batch, info)
        loss.backward()
        for master, parameter in zip(holder, task.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(holder, setting.run.training.clip_grad)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(holder, task.parameters(), strict=True):
                parameter.copy_(master)

    return step


class TransformersPair(nn.Module):
    """transformers' generator and discriminator, embeddings tied and bottom layers shared as in our model."""

    def __init__(self, run: RunConfig) -> None:
        from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

        from peer_scale.conversion.electra import encoder_settings

        super().__init__()
        model, losses = run.model, run.objective.losses
        if model.ranker is None or len(losses) != 2:
            raise MissingPeer(f"it has the losses of a generator and of a discriminator, {run.name} has others")

        def config(shape: Any) -> Any:
            settings = encoder_settings(model, shape, 0)
            return ElectraConfig(embedding_size=model.embedding_size, **settings)

        self.generator = ElectraForMaskedLM(config(model.generator))
        self.discriminator = ElectraForPreTraining(config(model.ranker))
        self.discriminator.electra.embeddings = self.generator.electra.embeddings
        self.generator.generator_lm_head.weight = self.generator.electra.embeddings.word_embeddings.weight
        for number in range(model.num_shared_layers):
            self.discriminator.electra.encoder.layer[number] = self.generator.electra.encoder.layer[number]
        self.discriminator_weight = losses[1].weight

    def forward(self, batch: PaddedBatch) -> Tensor:
        mask = batch.attention_mask.long()
        logits = self.generator(input_ids=batch.masked_ids, attention_mask=mask).logits
        selected = logits[batch.is_selected].float()
        with torch.no_grad():
            noise = -torch.log(-torch.log(torch.rand_like(selected).clamp_(1e-9, 1 - 1e-7)))
            sampled = (selected + noise).argmax(-1)
        corrupted = batch.input_ids.masked_scatter(batch.is_selected, sampled)
        scores = self.discriminator(input_ids=corrupted, attention_mask=mask).logits[batch.attention_mask].float()
        replaced = (corrupted != batch.input_ids)[batch.attention_mask].float()
        discriminator_loss = F.binary_cross_entropy_with_logits(scores, replaced)
        generator_loss = F.cross_entropy(selected, batch.input_ids[batch.is_selected])
        return generator_loss + self.discriminator_weight * discriminator_loss


def transformers_step(run: RunConfig, device: torch.device, autocast: bool) -> PeerStep:
    """A plain torch loop around transformers' models: fp32, or bf16 autocast."""
    pair = TransformersPair(run).to(device).train()
    return plain_step(run, device, pair, pair, autocast)


class MissingPeer(RuntimeError):
    """A peer that cannot be had: the message says why, or how to install it."""


class LogitsOnly(nn.Module):
    """A model of transformers as electra-pytorch wants it: ids in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def electra_pytorch_step(run: RunConfig, device: torch.device, autocast: bool) -> PeerStep:
    """electra-pytorch's wrapper, which masks, samples and weighs the losses, around the same models."""
    try:
        from electra_pytorch import Electra
    except ImportError:
        raise MissingPeer("its peer is not installed (pip install --no-deps electra-pytorch)") from None
    pair = TransformersPair(run)
    wrapper = Electra(LogitsOnly(pair.generator), LogitsOnly(pair.discriminator), mask_token_id=4, pad_token_id=0)
    wrapper.to(device).train()
    return plain_step(run, device, wrapper, lambda batch: wrapper(batch.input_ids).loss, autocast)


PEERS = {"transformers": transformers_step, "electra-pytorch": electra_pytorch_step}


def plain_step(
    run: RunConfig, device: torch.device, module: nn.Module, loss_of: Callable[[PaddedBatch], Tensor], autocast: bool
) -> PeerStep:
    """Forward, backward, clipping and AdamW of a peer's module."""
    optimizer = build_optimizer(module, run.training)

    def step(batch: PaddedBatch) -> None:
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), run.training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_products(setting: Setting) -> Callable[[], None]:
    """Only the step's dense products (attention's left out), forward and both gradients."""
    model, tokens = setting.run.model, setting.batch.sequences.num_tokens
    shapes: list[tuple[int, int, int]] = []
    graph = setting.run.objective.graph(model)
    for work in graph.works:
        if work.network is not None:
            encoder = graph.shape(work.network)
            hidden, ffn = encoder.hidden_size, encoder.ffn_hidden_size
            layer = [(hidden, 3 * hidden), (hidden, hidden), (hidden, ffn), (ffn, hidden)]
            shapes += [(tokens, *pair) for pair in layer] * (encoder.num_layers + work.end_layers)
    shapes.append((setting.batch.positions.numel(), model.embedding_size, model.vocab_size))
    device = setting.topology.device
    operands = {
        (n, i, o): [torch.randn(s, device=device).bfloat16() for s in ((n, i), (o, i), (n, o))] for n, i, o in shapes
    }

    def step() -> None:
        for shape in shapes:
            x, weight, grad = operands[shape]
            x @ weight.t()
            grad @ weight
            grad.t() @ x

    return step
