"""Floating-point operations of a training run in two accountings, and the peak rate of devices for MFU.

`paper` accounting is that of Tables 3 and 4 of PEER, which took it from google-research/electra: it serves to compare
models at equal compute. `actual` accounting is what a run really executes: it serves throughput and MFU.
"""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.costs import layer_matmul_flops
from peer_scale.objectives.graph import SampleSize

if TYPE_CHECKING:
    import torch

    from peer_scale.objectives.objective import Objective


def paper_train_flops(model: ModelConfig, objective: Objective, *, seq_length: int, samples: float) -> float:
    """Count the FLOPs of training on `samples` sequences in the paper's accounting, that of google-research/electra.

    Backward counts as much as forward; see `peer_scale.models.paper_costs` for the rest.
    """
    return 2.0 * objective.paper_flops(model, seq_length) * samples


def paper_flops(name: str) -> float:
    """Training FLOPs of a row of Tables 3 and 4, by the row's printed name, e.g. "PEER-Small (250K)".

    Raises:
        UserError: There is no such row; the message has the nearest name.
    """
    known = _paper_rows()
    if name not in known:
        # With and without the number of steps: "peer-base" is nearer to "PEER-Base (666.9K)" than difflib thinks.
        rows = {spelling.lower(): row for row in known for spelling in (row.partition(" (")[0], row)}
        nearest = difflib.get_close_matches(name.lower(), rows, n=1, cutoff=0.0)[0]
        raise UserError(f"no row {name!r} in the paper's tables; did you mean {rows[nearest]!r}?")
    model, objective, seq_length, samples = known[name]
    return paper_train_flops(model, objective, seq_length=seq_length, samples=samples)


def actual_train_flops(
    model: ModelConfig,
    objective: Objective,
    size: SampleSize,
    *,
    samples: float,
    activation_checkpointing: bool = False,
) -> float:
    """Count the FLOPs that training on `samples` times `size` really executes: its matrix products.

    2 FLOPs per multiply-add. Look-ups and element-wise work count nothing, backward is twice forward, and shared layers
    count in each pass. Activation checkpointing runs the layers' forward pass once more. Padding counts nothing. `size`
    may be the mean or the sum over sequences of different lengths, since all costs are linear in it, but for those of
    local attention: they count as if all sequences had the length at which a token has as many others.
    """
    graph = objective.graph(model)
    total: float = 0
    for work in graph.works:
        layers: float = 0
        if work.network is not None:
            shape = graph.shape(work.network)
            one = layer_matmul_flops(shape, size.tokens, size.token_pairs, graph.blocks)
            layers = (shape.num_layers + work.end_layers) * one
        others = size.count((*work.begin_costs, *work.end_costs), "flops")
        times = 3 if work.has_backward else 1
        total += times * (layers + others) + (layers if activation_checkpointing and work.has_backward else 0)
    return float(samples * total)


def square_cost_ratio(model: ModelConfig, objective: Objective, size: SampleSize) -> float:
    """Give what a pair of tokens of one sequence costs (attention) over what a token costs (all else).

    A sequence of n tokens costs n + ratio * n * n; `size` says how many tokens are selected of how many. Both terms are
    read off the costs of that many tokens and of half as many: local attention goes by the square of short ones only.
    """
    share = size.selected / size.tokens

    def cost(tokens: float) -> float:
        return actual_train_flops(model, objective, SampleSize(tokens, share * tokens, tokens**2), samples=1)

    whole, halves = cost(size.tokens), 2 * cost(size.tokens / 2)
    of_pairs = 2 * (whole - halves) / size.tokens**2
    return of_pairs / (whole / size.tokens - of_pairs * size.tokens)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak FLOP/s of a GPU for matrix products of `dtype` (fp32 with TF32 off); None where it is not known.

    Args:
        device_name: What `torch.cuda.get_device_name()` says. An MI250 or MI250X counts one of its two dies, which is
            what torch calls a device; a slice of a GPU (MIG, GRID) is not known.
        dtype: torch.float16, torch.bfloat16 or torch.float32.
    """
    column = {"torch.float16": 0, "torch.bfloat16": 1, "torch.float32": 2}.get(str(dtype))
    if column is None or re.search(r"\b(MIG|GRID)\b", device_name):
        return None
    for pattern, *teraflops in _PEAK_TERAFLOPS:
        if re.search(rf"\b(?:{pattern})", device_name, re.IGNORECASE):
            value = teraflops[column]
            return None if value is None else value * 1e12
    return None


def measure_peak_flops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Best FLOP/s of a square matrix product on the CPU with the current number of threads, tried for `seconds`."""
    import torch

    size = 1536  # large enough for the best rate, small enough for several trials in the time
    left = torch.ones(size, size, dtype=dtype)
    right = torch.ones(size, size, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    torch.mm(left, right, out=out)  # warm-up: threads, packing buffers, code generation
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        end = time.perf_counter()
        best = min(best, end - start)
        if end >= deadline:
            return 2 * size**3 / best


@lru_cache(maxsize=1)
def _paper_rows() -> dict[str, tuple[ModelConfig, Objective, int, float]]:
    """Give the model, the objective, the sequence length and the sequences trained on of each row.

    PEER-Small and TEAMS-Small count embedding size 128, although Table 8 says 256: their printed numbers come out only
    so.
    """
    # here, so that the rest of the module does without torch
    from peer_scale.objectives.masked_lm import MaskedLanguageModel
    from peer_scale.objectives.teams import Teams
    from peer_scale.objectives.tqr import TokenQualityRanking

    small = EncoderShape(num_layers=12, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4)
    small_narrow = EncoderShape(num_layers=12, hidden_size=64, ffn_hidden_size=256, num_attention_heads=1)
    base = EncoderShape(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12)
    base_narrow = EncoderShape(num_layers=12, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4)
    electra_small = ModelConfig(small_narrow, small, embedding_size=128)
    shared_small = ModelConfig(replace(small, num_layers=6), small, num_shared_layers=3, embedding_size=128)
    shared_base = ModelConfig(replace(base, num_layers=6), base, num_shared_layers=3, embedding_size=768)

    bert, peer, teams = MaskedLanguageModel(), TokenQualityRanking(), Teams()
    electra = TokenQualityRanking(num_levels=2, taus=())
    return {
        "BERT-Small": (ModelConfig(small, None, embedding_size=256), bert, 128, 512 * 250e3),
        "ELECTRA-Small": (electra_small, electra, 128, 512 * 250e3),
        "ELECTRA-Small++": (electra_small, electra, 512, 128 * 4e6),
        "TEAMS-Small": (shared_small, teams, 128, 512 * 250e3),
        "PEER-Small (212.5K)": (shared_small, peer, 128, 512 * 212.5e3),
        "PEER-Small (250K)": (shared_small, peer, 128, 512 * 250e3),
        "BERT-Base (1M)": (ModelConfig(base, None, embedding_size=768), bert, 512, 256 * 1e6),
        "ELECTRA-Base (766K)": (ModelConfig(base_narrow, base, embedding_size=768), electra, 512, 256 * 766e3),
        "TEAMS-Base (666.9K)": (shared_base, teams, 512, 256 * 666.9e3),
        "PEER-Base (666.9K)": (shared_base, peer, 512, 256 * 666.9e3),
    }


# Name pattern -> dense TFLOP/s in fp16, bf16 (both accumulated in fp32) and fp32, from the data sheets. The first
# match counts, so special boards stand above the general name. None: not supported, or not known.
_PEAK_TERAFLOPS: Final[tuple[tuple[str, float | None, float | None, float | None], ...]] = (
    ("V100S-PCIE", 130.0, None, 16.4),
    ("V100-PCIE", 112.0, None, 14.0),
    ("V100-SXM2", 125.0, None, 15.7),
    (r"T4\b", 65.0, None, 8.1),
    ("A100-SXM-64GB", None, None, None),  # a larger custom chip whose data sheet is not public
    (r"A100X\b", 318.5, 318.5, 19.9),
    (r"A100\b|A800\b", 312.0, 312.0, 19.5),
    (r"A10\b", 125.0, 125.0, 31.2),
    (r"A10G\b", 70.0, 70.0, 31.5),
    (r"A30\b", 165.0, 165.0, 10.3),
    (r"A40\b", 149.7, 149.7, 37.4),
    ("RTX A6000", 154.8, 154.8, 38.7),
    ("RTX 6000 Ada", 364.2, 364.2, 91.1),
    (r"L4\b", 121.0, 121.0, 30.3),
    (r"L40\b", 181.0, 181.0, 90.5),
    (r"L40S\b", 362.0, 362.0, 91.6),
    ("H100 PCIe|H800 PCIe", 756.0, 756.0, 51.0),
    ("H100 NVL", 835.5, 835.5, 60.0),
    (r"H100 80GB HBM3|H800$|GH200\b", 989.4, 989.4, 66.9),
    ("H200 NVL", 835.5, 835.5, 60.0),
    (r"H200\b", 989.4, 989.4, 66.9),
    (r"H20\b", 148.0, 148.0, 44.0),
    (r"GB300\b", 2500.0, 2500.0, 80.0),
    (r"B300\b", 2250.0, 2250.0, 75.0),
    (r"GB200\b", 2500.0, 2500.0, 80.0),
    (r"B200\b", 2250.0, 2250.0, 75.0),
    ("RTX 3090$", 71.0, 71.0, 35.6),
    ("RTX 3090 Ti", 80.0, 80.0, 40.0),
    ("RTX 4090$", 165.2, 165.2, 82.6),
    ("RTX 5090$", 209.5, 209.5, 104.8),
    (r"MI100\b", 184.6, 92.3, 46.1),
    (r"MI210\b", 181.0, 181.0, 45.3),
    (r"MI250X\b", 191.5, 191.5, 47.9),
    (r"MI250\b", 181.0, 181.0, 45.3),
    (r"MI300A\b", 980.6, 980.6, 122.6),
    (r"MI300X\b|MI325X\b", 1307.4, 1307.4, 163.4),
)
