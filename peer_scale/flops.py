"""Floating-point operations of a training run in two accountings, and the peak rate of devices for MFU.

`paper` accounting is that of Tables 3 and 4 of PEER, which took it from google-research/electra: it serves to compare
models at equal compute. `actual` accounting is what a run really executes: it serves throughput and MFU.
"""

from __future__ import annotations

import difflib
import re
import time
from typing import TYPE_CHECKING, Final

from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig

if TYPE_CHECKING:
    import torch

# Paper accounting: operations an element where it is no matrix product, and the share of positions under the MLM head.
_DROPOUT: Final = 4
_LAYER_NORM: Final = 5
_GELU: Final = 8
_SOFTMAX: Final = 5
_OUTPUT_FRACTION: Final = 0.15625


def paper_train_flops(model: ModelConfig, *, seq_length: int, samples: float) -> float:
    """FLOPs of training on `samples` sequences in the paper's accounting, that of google-research/electra.

    2 FLOPs a multiply-add; backward counts as much as forward; an embedding look-up counts as a product with a one-hot
    vector, for each network; 15.625 % of the positions pass the MLM head. The generator's pass through shared layers
    counts half: PEER's and TEAMS's printed numbers come out only so.
    """
    generator, ranker = model.generator, model.ranker
    generator_layers = generator.num_layers - 0.5 * model.num_shared_layers
    forward = (
        generator_layers * _paper_layer_flops(generator, seq_length)
        + _paper_embedding_flops(model, generator, seq_length)
        + _paper_mlm_head_flops(model, generator, seq_length)
    )
    if ranker is not None:
        forward += (
            ranker.num_layers * _paper_layer_flops(ranker, seq_length)
            + _paper_embedding_flops(model, ranker, seq_length)
            + _paper_binary_head_flops(ranker, seq_length)
        )
    return 2.0 * forward * samples


def paper_flops(name: str) -> float:
    """Training FLOPs of a row of Tables 3 and 4, by the row's printed name, e.g. "PEER-Small (250K)".

    Raises:
        UserError: There is no such row; the message has the nearest name.
    """
    if name not in _PAPER_ROWS:
        # With and without the number of steps: "peer-base" is nearer to "PEER-Base (666.9K)" than difflib thinks.
        rows = {spelling.lower(): row for row in _PAPER_ROWS for spelling in (row.partition(" (")[0], row)}
        nearest = difflib.get_close_matches(name.lower(), rows, n=1, cutoff=0.0)[0]
        raise UserError(f"no row {name!r} in the paper's tables; did you mean {rows[nearest]!r}?")
    model, seq_length, samples = _PAPER_ROWS[name]
    return paper_train_flops(model, seq_length=seq_length, samples=samples)


def actual_train_flops(
    model: ModelConfig,
    *,
    seq_length: int,
    num_predictions: float,
    samples: float,
    activation_checkpointing: bool = False,
) -> float:
    """FLOPs that training on `samples` sequences really executes: its matrix products, 2 FLOPs a multiply-add.

    Look-ups and element-wise work count nothing, backward is twice forward, shared layers count in both passes, and the
    MLM head counts the `num_predictions` selected positions of a sequence. Activation checkpointing runs the layers'
    forward pass once more. Padded positions count like others: they are computed like others.
    """
    encoders = [shape for shape in (model.generator, model.ranker) if shape is not None]
    layers = sum(shape.num_layers * layer_matmul_flops(shape, seq_length) for shape in encoders)
    projections = sum(projection_matmul_flops(model, shape, seq_length) for shape in encoders)
    heads = num_predictions * mlm_head_matmul_flops(model, model.generator)
    if model.ranker is not None:
        heads += seq_length * score_head_matmul_flops(model.ranker)
    recomputed = layers if activation_checkpointing else 0
    return float(samples * (3 * (layers + projections + heads) + recomputed))


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


def layer_matmul_flops(shape: EncoderShape, seq_length: int) -> int:
    """Matrix products of one layer's forward pass over a sequence: QKV, scores, weighted values, output, FFN."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    a_token = 2 * 3 * hidden * hidden + 2 * 2 * hidden * seq_length + 2 * hidden * hidden + 2 * 2 * hidden * ffn
    return a_token * seq_length


def projection_matmul_flops(model: ModelConfig, shape: EncoderShape, seq_length: int) -> int:
    """The projection from embedding to hidden size, which is there only where they differ."""
    if model.embedding_size == shape.hidden_size:
        return 0
    return 2 * model.embedding_size * shape.hidden_size * seq_length


def mlm_head_matmul_flops(model: ModelConfig, shape: EncoderShape) -> int:
    """MLM head on one position: dense to embedding size, then the product with the word embeddings."""
    return 2 * model.embedding_size * (shape.hidden_size + model.vocab_size)


def score_head_matmul_flops(shape: EncoderShape) -> int:
    """RTD or TQR head on one position: dense, then the product with one weight vector."""
    return 2 * shape.hidden_size * (shape.hidden_size + 1)


def _paper_layer_flops(shape: EncoderShape, seq_length: int) -> float:
    """One layer's forward pass over a sequence, element-wise work included."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    biases = 3 * hidden + hidden + ffn + hidden
    attention_weights = (1 + _SOFTMAX + _DROPOUT) * seq_length * shape.num_attention_heads  # 1: the scaling
    dropouts_and_residuals = 2 * (_DROPOUT + 1) * hidden
    # The released accounting counts the LayerNorm after attention for one element only; kept, so that totals are equal.
    layer_norms = _LAYER_NORM + _LAYER_NORM * hidden
    a_token = biases + attention_weights + dropouts_and_residuals + layer_norms + _GELU * ffn
    return layer_matmul_flops(shape, seq_length) + a_token * seq_length


def _paper_embedding_flops(model: ModelConfig, shape: EncoderShape, seq_length: int) -> float:
    """Word, position and type look-ups as one-hot products, their sum, LayerNorm, dropout and the projection."""
    one_hot = 2 * (model.vocab_size + seq_length + model.num_token_types)
    a_token = (one_hot + 2 + _LAYER_NORM + _DROPOUT) * model.embedding_size
    if model.embedding_size != shape.hidden_size:
        a_token += shape.hidden_size  # the projection's bias
    return projection_matmul_flops(model, shape, seq_length) + a_token * seq_length


def _paper_mlm_head_flops(model: ModelConfig, shape: EncoderShape, seq_length: int) -> float:
    """Dense with bias, GELU and LayerNorm, vocabulary product, softmax, and 2 a word for the target's probability."""
    a_position = (
        mlm_head_matmul_flops(model, shape)
        + (1 + _GELU + _LAYER_NORM) * model.embedding_size
        + (_SOFTMAX + 2) * model.vocab_size
    )
    return _OUTPUT_FRACTION * seq_length * a_position


def _paper_binary_head_flops(shape: EncoderShape, seq_length: int) -> float:
    """Dense with bias and GELU, then one score, on every position."""
    return seq_length * (score_head_matmul_flops(shape) + (1 + _GELU) * shape.hidden_size)


_SMALL: Final = EncoderShape(num_layers=12, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4)
_SMALL_6: Final = EncoderShape(num_layers=6, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4)
_SMALL_13: Final = EncoderShape(num_layers=13, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4)
_SMALL_NARROW: Final = EncoderShape(num_layers=12, hidden_size=64, ffn_hidden_size=256, num_attention_heads=1)
_BASE: Final = EncoderShape(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12)
_BASE_6: Final = EncoderShape(num_layers=6, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12)
_BASE_13: Final = EncoderShape(num_layers=13, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12)
_BASE_NARROW: Final = EncoderShape(num_layers=12, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4)

_PEER_SMALL: Final = ModelConfig(_SMALL_6, _SMALL, num_shared_layers=3, embedding_size=128)
_ELECTRA_SMALL: Final = ModelConfig(_SMALL_NARROW, _SMALL, embedding_size=128)

# Row -> (model, sequence length, sequences trained on). PEER-Small and TEAMS-Small count embedding size 128, although
# Table 8 says 256: their printed numbers come out only so. TEAMS's 13th layer is the one of multi-word selection, whose
# scoring is left out, as in the printed numbers.
_PAPER_ROWS: Final[dict[str, tuple[ModelConfig, int, float]]] = {
    "BERT-Small": (ModelConfig(_SMALL, None, embedding_size=256), 128, 512 * 250e3),
    "ELECTRA-Small": (_ELECTRA_SMALL, 128, 512 * 250e3),
    "ELECTRA-Small++": (_ELECTRA_SMALL, 512, 128 * 4e6),
    "TEAMS-Small": (ModelConfig(_SMALL_6, _SMALL_13, num_shared_layers=3, embedding_size=128), 128, 512 * 250e3),
    "PEER-Small (212.5K)": (_PEER_SMALL, 128, 512 * 212.5e3),
    "PEER-Small (250K)": (_PEER_SMALL, 128, 512 * 250e3),
    "BERT-Base (1M)": (ModelConfig(_BASE, None, embedding_size=768), 512, 256 * 1e6),
    "ELECTRA-Base (766K)": (ModelConfig(_BASE_NARROW, _BASE, embedding_size=768), 512, 256 * 766e3),
    "TEAMS-Base (666.9K)": (
        ModelConfig(_BASE_6, _BASE_13, num_shared_layers=3, embedding_size=768),
        512,
        256 * 666.9e3,
    ),
    "PEER-Base (666.9K)": (ModelConfig(_BASE_6, _BASE, num_shared_layers=3, embedding_size=768), 512, 256 * 666.9e3),
}

# Name pattern -> dense TFLOP/s in fp16, bf16 (both accumulated in fp32) and fp32, from the data sheets. The first
# match counts, so special boards stand above the general name. None: not supported, or not known.
_PEAK_TERAFLOPS: Final[tuple[tuple[str, float | None, float | None, float | None], ...]] = (
    ("V100S-PCIE", 130.0, None, 16.4),
    ("V100-PCIE", 112.0, None, 14.0),
    ("V100-SXM2", 125.0, None, 15.7),
    (r"T4\b", 65.0, None, 8.1),
    ("A100-SXM-64GB", None, None, None),  # a larger custom chip whose data sheet is not public
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
    ("H100 PCIe", 756.0, 756.0, 51.0),
    ("H100 NVL", 835.5, 835.5, 60.0),
    (r"H100 80GB HBM3|H800$|GH200\b", 989.4, 989.4, 66.9),
    ("H200 NVL", 835.5, 835.5, 60.0),
    (r"H200\b", 989.4, 989.4, 66.9),
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
