import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peer_scale.errors import UserError
from peer_scale.flops import actual_train_flops, measure_peak_flops, paper_flops, paper_train_flops, peak_flops
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.graph import SampleSize
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.tqr import TokenQualityRanking

# Tables 3 and 4 as printed. The paper prints 6.43e19 for ELECTRA-Base; its accounting gives 6.42e19.
PRINTED = {
    "BERT-Small": "1.27e+18",
    "ELECTRA-Small": "1.29e+18",
    "ELECTRA-Small++": "2.40e+19",
    "TEAMS-Small": "1.55e+18",
    "PEER-Small (212.5K)": "1.27e+18",
    "PEER-Small (250K)": "1.50e+18",
    "BERT-Base (1M)": "6.43e+19",
    "TEAMS-Base (666.9K)": "6.66e+19",
    "PEER-Base (666.9K)": "6.39e+19",
}


@pytest.mark.parametrize(("name", "printed"), PRINTED.items())
def test_rows_of_the_paper(name: str, printed: str) -> None:
    assert f"{paper_flops(name):.2e}" == printed


def test_electra_base_row() -> None:
    assert paper_flops("ELECTRA-Base (766K)") == pytest.approx(6.43e19, rel=0.002)


def encoder(layers: int, hidden: int) -> EncoderShape:
    return EncoderShape(layers, hidden, 4 * hidden, max(hidden // 64, 1))


def objective_of(model: ModelConfig) -> Objective:
    return TokenQualityRanking() if model.ranker else MaskedLanguageModel()


def train_flops(model: ModelConfig, seq_length: int, samples: float) -> float:
    return paper_train_flops(model, objective_of(model), seq_length=seq_length, samples=samples)


@pytest.mark.parametrize(
    ("model", "seq_length", "samples", "released"),
    [
        (ModelConfig(encoder(12, 256), None, embedding_size=128), 128, 128 * 1.45e6, 1.4187399146496e18),
        (ModelConfig(encoder(12, 768), None, embedding_size=768), 512, 256e6, 6.428335104e19),
        (ModelConfig(encoder(24, 1024), None, embedding_size=1024), 512, 256e6, 1.91720905883648e20),
        (ModelConfig(encoder(12, 64), encoder(12, 256), embedding_size=128), 128, 128e6, 1.293743798272e18),
        (ModelConfig(encoder(12, 256), encoder(12, 768), embedding_size=768), 512, 256 * 766e3, 6.424541834277683e19),
        (ModelConfig(encoder(24, 256), encoder(24, 1024), embedding_size=1024), 512, 2048 * 4e5, 7.117606040895488e20),
    ],
)
def test_paper_accounting_equals_what_electras_own_script_prints(
    model: ModelConfig, seq_length: int, samples: float, released: float
) -> None:
    assert train_flops(model, seq_length, samples) == pytest.approx(released, rel=1e-12)


def test_shared_layers_count_half_in_the_generator_and_samples_count_linearly() -> None:
    shared = ModelConfig(encoder(6, 128), encoder(12, 128), num_shared_layers=4)
    apart = ModelConfig(encoder(6, 128), encoder(12, 128))
    two_layers_fewer = ModelConfig(encoder(4, 128), encoder(12, 128))
    one = train_flops(shared, 64, 1)
    assert one == pytest.approx(train_flops(two_layers_fewer, 64, 1), rel=1e-12)
    assert one < train_flops(apart, 64, 1)
    assert train_flops(shared, 64, 1000) == pytest.approx(1000 * one, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("PEER-Small", "PEER-Small (250K)"), ("electra-base", "ELECTRA-Base (766K)"), ("TEAMS-Smal", "TEAMS-Small")],
)
def test_unknown_row_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(repr(name))}.*{re.escape(repr(nearest))}"):
        paper_flops(name)


class Layer(nn.Module):
    """One encoder layer whose attention is two explicit products, so that the counter sees every one of them."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
        self.heads = shape.num_attention_heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.ffn = nn.Sequential(nn.Linear(hidden, ffn), nn.GELU(), nn.Linear(ffn, hidden))
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        query, key, value = (
            part.reshape(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        weights = torch.matmul(query, key.transpose(-1, -2)).softmax(dim=-1)
        x = self.norms[0](x + self.out(torch.matmul(weights, value).transpose(1, 2).reshape(batch, length, hidden)))
        return self.norms[1](x + self.ffn(x))


class Network(nn.Module):
    def __init__(self, shape: EncoderShape, embedding_size: int, layers: list[Layer], checkpointing: bool) -> None:
        super().__init__()
        same = shape.hidden_size == embedding_size
        self.projection = nn.Identity() if same else nn.Linear(embedding_size, shape.hidden_size)
        own = [Layer(shape) for _ in range(shape.num_layers - len(layers))]
        self.layers = nn.ModuleList(layers + own)
        self.checkpointing = checkpointing

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        x = self.projection(embedded)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def counted_flops(model: ModelConfig, seq_length: int, num_predictions: int, samples: int, checkpointing: bool) -> int:
    """What torch's own counter sees in one forward and backward pass of the networks and their heads."""
    words = nn.Embedding(model.vocab_size, model.embedding_size)
    shared = [Layer(model.generator) for _ in range(model.num_shared_layers)]
    generator = Network(model.generator, model.embedding_size, shared, checkpointing)
    mlm_dense = nn.Linear(model.generator.hidden_size, model.embedding_size)
    tokens = torch.randint(model.vocab_size, (samples, seq_length))
    with FlopCounterMode(display=False) as counter:
        embedded = words(tokens)
        selected = generator(embedded)[:, :num_predictions]
        loss = nn.functional.linear(mlm_dense(selected), words.weight).sum()
        if model.ranker is not None:
            hidden = model.ranker.hidden_size
            ranker = Network(model.ranker, model.embedding_size, shared, checkpointing)
            score_head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))
            loss = loss + score_head(ranker(embedded)).sum()
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            ModelConfig(EncoderShape(3, 32, 96, 2), EncoderShape(4, 32, 96, 2), 2, vocab_size=101, embedding_size=32),
            id="peer",
        ),
        pytest.param(
            ModelConfig(EncoderShape(4, 8, 40, 1), EncoderShape(4, 32, 96, 2), vocab_size=101, embedding_size=16),
            id="electra",
        ),
        pytest.param(ModelConfig(EncoderShape(4, 32, 128, 4), None, vocab_size=101, embedding_size=24), id="bert"),
    ],
)
def test_actual_accounting_equals_torchs_counter(model: ModelConfig, checkpointing: bool) -> None:
    expected = counted_flops(model, seq_length=20, num_predictions=3, samples=2, checkpointing=checkpointing)
    objective, size = objective_of(model), SampleSize.of_sequence(tokens=20, selected=3)
    found = actual_train_flops(model, objective, size, samples=2, activation_checkpointing=checkpointing)
    assert found == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sequences_of_different_lengths_count_what_each_of_them_does(checkpointing: bool) -> None:
    model = ModelConfig(EncoderShape(2, 16, 48, 1), EncoderShape(3, 32, 96, 2), vocab_size=101, embedding_size=24)
    lengths, selected = (3, 20, 7, 64, 20), (1, 3, 1, 10, 2)
    one_by_one = [counted_flops(model, *one, 1, checkpointing) for one in zip(lengths, selected, strict=True)]
    total = SampleSize(sum(lengths), sum(selected), sum(length**2 for length in lengths))
    mean = SampleSize(total.tokens / 5, total.selected / 5, total.token_pairs / 5)
    for size, samples in ((total, 1), (mean, 5)):
        found = actual_train_flops(
            model, objective_of(model), size, samples=samples, activation_checkpointing=checkpointing
        )
        assert found == pytest.approx(sum(one_by_one), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "teraflops"),  # fp16, bf16, fp32
    [
        ("Tesla V100-SXM2-16GB", (125, None, 15.7)),
        ("Tesla V100S-PCIE-32GB", (130, None, 16.4)),
        ("Tesla T4", (65, None, 8.1)),
        ("NVIDIA A100-SXM4-80GB", (312, 312, 19.5)),
        ("A100-PCIE-40GB", (312, 312, 19.5)),
        ("NVIDIA A100 80GB PCIe", (312, 312, 19.5)),
        ("NVIDIA A100X", (318.5, 318.5, 19.9)),
        ("NVIDIA A10", (125, 125, 31.2)),
        ("NVIDIA A10G", (70, 70, 31.5)),
        ("NVIDIA A40", (149.7, 149.7, 37.4)),
        ("NVIDIA L4", (121, 121, 30.3)),
        ("NVIDIA L40", (181, 181, 90.5)),
        ("NVIDIA L40S", (362, 362, 91.6)),
        ("NVIDIA H100 80GB HBM3", (989.4, 989.4, 66.9)),
        ("NVIDIA H100 PCIe", (756, 756, 51)),
        ("NVIDIA H100 NVL", (835.5, 835.5, 60)),
        ("NVIDIA H800", (989.4, 989.4, 66.9)),
        ("NVIDIA H800 PCIe", (756, 756, 51)),
        ("NVIDIA H20", (148, 148, 44)),
        ("NVIDIA H20-3e", (148, 148, 44)),  # the same chip with more memory
        ("NVIDIA H200", (989.4, 989.4, 66.9)),
        ("NVIDIA H200 NVL", (835.5, 835.5, 60)),
        ("NVIDIA GH200 480GB", (989.4, 989.4, 66.9)),
        ("NVIDIA B200", (2250, 2250, 75)),
        ("NVIDIA B300 SXM6 AC", (2250, 2250, 75)),
        ("NVIDIA GB300", (2500, 2500, 80)),
        ("NVIDIA GB200", (2500, 2500, 80)),
        ("NVIDIA GeForce RTX 3090", (71, 71, 35.6)),
        ("NVIDIA GeForce RTX 3090 Ti", (80, 80, 40)),
        ("NVIDIA GeForce RTX 4090", (165.2, 165.2, 82.6)),
        ("AMD Instinct MI250X", (191.5, 191.5, 47.9)),
        ("AMD Instinct MI300X", (1307.4, 1307.4, 163.4)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (None, None, None)),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (None, None, None)),
        ("NVIDIA A100-SXM-64GB", (None, None, None)),
        ("NVIDIA H100", (None, None, None)),  # of which board is not said
        ("NVIDIA A1000", (None, None, None)),
        ("Some Other Device", (None, None, None)),
    ],
)
def test_peak_of_known_devices(name: str, teraflops: tuple[float | None, ...]) -> None:
    found = tuple(peak_flops(name, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32))
    assert found == tuple(None if value is None else value * 1e12 for value in teraflops)


def test_peak_of_other_dtypes_is_unknown() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float64) is None


def test_measured_peak_agrees_with_the_profiler() -> None:
    rate = measure_peak_flops(torch.float32, seconds=0.1)
    size = 512
    left, product = torch.randn(size, size), None
    with torch.autograd.profiler.profile() as profile:
        for _ in range(5):
            product = left @ left
    assert product is not None
    seconds = sum(event.time_range.elapsed_us() for event in profile.function_events if event.name == "aten::mm") / 1e6
    smaller_rate = 5 * 2 * size**3 / seconds
    assert 1e8 < rate < 1e15
    assert rate > 0.3 * smaller_rate  # the same kind of product, timed by torch's profiler


def test_import_leaves_torch_out() -> None:
    code = "import sys, peer_scale.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
