"""`peer-scale convert to-hf` against plain transformers and against weights put together by hand."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForMaskedLM, ElectraForMaskedLM, ElectraForPreTraining

from batches import rows_of
from checkpoint_runs import write_manifest
from peer_scale.checkpoints.reader import read_checkpoint
from peer_scale.commands import convert
from peer_scale.corpus.prepare import open_corpus
from peer_scale.corpus.wordpiece import load_wordpiece
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives import tqr
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.task import build_model
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.parallel.topology import single_process_topology
from peer_scale.samples.examples import ExampleBuilder, collate
from peer_scale.samples.loader import ExampleDataset
from peer_scale.samples.split import split_text
from peer_scale.samples.windows import Windows
from peer_scale.sequences import Sequences
from runs import PROJECT, corpus, ds_config, read_metrics, train_in_pool

pytestmark = pytest.mark.heavy

TOOL = PROJECT / "tools/convert_checkpoint.py"
STEPS = 12
TOLERANCE = 1e-5
SENTENCES = [
    "A logger turns records into text and sends them to its handlers.",
    "Return the mean of the data, which may come from any iterable.",
    "Walk.",
]


def train(pool, folder, text_file, stage, *flags):
    pool.run(
        train_in_pool,
        [
            *corpus(text_file),
            *("--save", str(folder), "--log-dir", str(folder.parent / f"log-{folder.name}")),
            *("--deepspeed_config", str(ds_config(folder.parent, stage))),
            *("--train-iters", str(STEPS), "--global-batch-size", "8", "--micro-batch-size", "4"),
            *("--lr", "0.0005", "--lr-warmup-iters", "1"),
            *(() if "bert-tiny" in flags else ("--warmup-epochs", "0")),
            *(flags or ("--model", "peer-tiny", "--fp32")),
        ],
    )
    return folder / f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def checkpoints(two_ranks, tmp_path_factory, text_file):
    """Steps trained by two ranks under ZeRO-2 and ZeRO-3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {stage: train(two_ranks, folder / f"zero{stage}", text_file, stage) for stage in (2, 3)}


@pytest.fixture
def copy(checkpoints, tmp_path):
    return shutil.copytree(checkpoints[2], tmp_path / checkpoints[2].name)


def to_hf(*arguments):
    command = [sys.executable, str(TOOL), "to-hf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", check=False)


@pytest.fixture
def refused(refusal, tmp_path):
    """Convert what must be refused; gives the one line."""

    def run(load, *arguments):
        output = () if "--output" in arguments else ("--output", tmp_path / "out")
        return refusal("to-hf", "--load", load, *output, *arguments)

    return run


def weights_by_hand(folder):
    """The fp32 weights, put together without the project's reader: ranges of whole tensors, one after the other."""
    manifest = json.loads((folder / "peer_scale.json").read_text())
    content = {name: load_file(folder / name) for name in manifest["files"] if name.endswith(".safetensors")}
    weights = {}
    for name, entry in manifest["tensors"].items():
        pieces = sorted(entry["pieces"], key=lambda piece: piece[2])
        weights[name] = torch.cat([content[file][f"weight/{name}"] for file, *_ in pieces]).view(entry["shape"])
    return weights


def our_model(folder):
    saved = json.loads((folder / "peer_scale.json").read_text())
    sizes = dict(saved["model"])
    for network in ("generator", "ranker"):
        sizes[network] = sizes[network] and EncoderShape(**sizes[network])
    settings = dict(saved["objective"])
    objective = {"mlm": MaskedLanguageModel, "tqr": TokenQualityRanking}[settings.pop("kind")](**settings)
    model = build_model(ModelConfig(**sizes), objective, single_process_topology().tensor_parallel).eval()
    weights = weights_by_hand(folder)
    for name, parameter in model.named_parameters():
        weight = weights.pop(name)
        parameter.data[: len(weight)] = weight  # the model's vocabulary is padded
    assert not weights
    return model


def tokenized(folder, output):
    """The sentences as AutoTokenizer gives them, checked against the run's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    wordpiece = load_wordpiece(str(folder / "tokenizer"))
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    expected = [[wordpiece.cls_id, *ids, wordpiece.sep_id] for ids in wordpiece.encode(SENTENCES)]
    lengths = batch["attention_mask"].sum(1)
    assert [ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)] == expected
    assert min(lengths) < max(lengths)
    assert tokenizer.pad_token_id == wordpiece.pad_id
    assert tokenizer("a [MASK]").input_ids[-2] == wordpiece.mask_id
    assert tokenizer.model_max_length == 128
    return batch, batch["attention_mask"].bool()


def assert_same_logits(found, expected):
    assert found.shape == expected.shape
    assert expected.std() > 100 * TOLERANCE, "too alike to tell a wrong weight"
    assert (found - expected).abs().max().item() < TOLERANCE


def encode(model, network, batch, mask):
    sequences = Sequences.of(mask.sum(1).tolist())
    return model.encode(network, batch["input_ids"][mask], batch["token_type_ids"][mask], sequences)


def masked_lm_logits(model, batch, mask):
    states, bias = model.head("mlm_head")(encode(model, "generator", batch, mask))
    vocab_size = model.config.vocab_size
    return F.linear(states, model.embeddings.word.weight[:vocab_size], bias[:vocab_size])


@torch.no_grad()
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_ranker_opens_as_electra_for_pre_training(stage, checkpoints, tmp_path):
    folder = checkpoints[stage]
    output = tmp_path / "deep" / "hf"
    done = to_hf("--load", folder.parent, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "ElectraForPreTraining" in done.stdout
    assert len(done.stdout.splitlines()) == 1

    batch, mask = tokenized(folder, output)
    reference, report = ElectraForPreTraining.from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    model = our_model(folder)
    hidden = encode(model, "ranker", batch, mask)
    head = model.head("ranking_head")
    features = F.gelu(head.dense(hidden))
    threshold = head(hidden)[1][-1]
    assert abs(threshold) > 1e-3
    assert_same_logits(reference.eval()(**batch).logits[mask], -(features @ head.score.weight[0]) + threshold)

    card = (output / "README.md").read_text()
    manifest = json.loads((folder / "peer_scale.json").read_text())
    for fact in (manifest["data"]["fingerprint"], f"| {STEPS} |", f"| {STEPS * 8} |", f"ZeRO-{stage}, data parallel 2"):
        assert fact in card
    assert "documents.txt" in card
    assert "licen" not in card.split("---")[1], "the licence is the publisher's to choose"


@torch.no_grad()
def test_the_generator_opens_as_electra_for_masked_lm(checkpoints, capfd):
    folder = checkpoints[3]
    assert convert.main(["to-hf", "--load", str(folder), "--network", "generator"]) == 0
    output = folder.parent / f"hf_generator_{STEPS:08d}"
    assert str(output) in capfd.readouterr().out
    batch, mask = tokenized(folder, output)
    reference = ElectraForMaskedLM.from_pretrained(output).eval()
    assert_same_logits(reference(**batch).logits[mask], masked_lm_logits(our_model(folder), batch, mask))


@torch.no_grad()
def test_bert_opens_as_bert_for_masked_lm(one_rank, refused, tmp_path, text_file):
    folder = train(one_rank, tmp_path / "bert", text_file, 1, "--model", "bert-tiny", "--fp32")
    assert "no ranker" in refused(folder, "--network", "ranker")
    assert convert.main(["to-hf", "--load", str(folder), "--output", str(tmp_path / "hf")]) == 0
    batch, mask = tokenized(folder, tmp_path / "hf")
    reference, report = BertForMaskedLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    assert_same_logits(reference.eval()(**batch).logits[mask], masked_lm_logits(our_model(folder), batch, mask))


# DeepSpeed has an optimizer of its own for bf16 under ZeRO-1
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bf16_with_activation_checkpointing_gives_the_fp32_masters(stage, two_ranks, tmp_path, text_file):
    flags = ("--model", "electra-tiny", "--bf16", "--activation-checkpointing")
    folder = train(two_ranks, tmp_path / "bf16", text_file, stage, *flags)
    assert convert.main(["to-hf", "--load", str(folder), "--output", str(tmp_path / "hf")]) == 0
    masters = weights_by_hand(folder)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    layer = "layer.3.intermediate.dense.weight"
    for ours, theirs in {
        "embeddings.word.weight": "electra.embeddings.word_embeddings.weight",
        "ranker.layers.3.feed_forward.up.weight": f"electra.encoder.{layer}",
    }.items():
        assert torch.equal(written[theirs], masters[ours])
        assert (written[theirs] != written[theirs].bfloat16().float()).float().mean() > 0.9


@torch.no_grad()
def test_the_trainers_rtd_auc_comes_out_of_transformers_too(one_rank, tmp_path, text_file):
    """Its own models mask-fill and tell apart what the trainer's validation does; the samples are drawn from theirs."""
    flags = ("--model", "peer-tiny", "--fp32", "--eval-iters", "6", "--eval-interval", str(STEPS))
    folder = train(one_rank, tmp_path / "run", text_file, 1, *flags, "--validation-fraction", "0.5")
    (last,) = read_metrics(tmp_path / "log-run")[-1:]
    models = {}
    for network, cls in (("ranker", ElectraForPreTraining), ("generator", ElectraForMaskedLM)):
        convert.main(["to-hf", "--load", str(folder), "--network", network, "--output", str(tmp_path / network)])
        models[network] = cls.from_pretrained(tmp_path / network).eval()
    saved = json.loads((folder / "peer_scale.json").read_text())
    assert saved["data"]["seq_length"] == 64
    store, tokenizer = open_corpus(
        [str(text_file)], None, vocab_size=2000, text_key="text", cache_dir=text_file.parent / "cache", workers=1
    )
    windows = Windows(store, split_text(store, 0.5, "tokens")[1], width=61)
    masking = read_checkpoint(folder).sections.masking
    samples = ExampleDataset(windows, ExampleBuilder(tokenizer, masking, 64, saved["data"]["seed"] + 2**32))
    batch = collate([samples[number] for number in range(6 * 8)]).to(torch.device("cpu"))
    batch = rows_of(batch, tokenizer.pad_id)

    common = {"token_type_ids": batch.token_types, "attention_mask": batch.is_token}
    logits = models["generator"](input_ids=batch.masked_ids, **common).logits.double()
    chosen = logits.gather(1, batch.positions[..., None].expand(-1, -1, logits.shape[2]))
    below = chosen.softmax(-1).cumsum(-1) <= batch.uniforms[..., None]
    sampled = torch.where(batch.is_selected, below.sum(-1), batch.input_ids.gather(1, batch.positions))
    corrupted = batch.input_ids.scatter(1, batch.positions, sampled)
    flags = models["ranker"](input_ids=corrupted, **common).logits
    in_order = pairs = 0
    for row in range(len(flags)):
        is_replaced = corrupted[row] != batch.input_ids[row]
        replaced, original = flags[row][is_replaced], flags[row][batch.is_token[row] & ~is_replaced]
        in_order += (replaced[:, None] > original).sum().item()
        pairs += len(replaced) * len(original)
    assert pairs > 10_000
    assert last["validation_rtd_auc"] == pytest.approx(in_order / pairs, abs=1e-6)
    assert abs(last["validation_rtd_auc"] - 0.5) > 1e-3


def test_parameters_that_do_not_match_the_model(copy, refused):
    def with_model(**changes):
        manifest = json.loads(original)
        for network, sizes in changes.items():
            manifest["model"][network] |= sizes
        write_manifest(copy / "peer_scale.json", manifest)
        return refused(copy)

    original = (copy / "peer_scale.json").read_text()
    assert "lacks the parameter ranker.layers.3.attention.qkv.weight" in with_model(ranker={"num_layers": 5})
    assert "has a parameter ranker.layers.2.attention_norm.bias" in with_model(ranker={"num_layers": 3})
    sizes = {"ffn_hidden_size": 256}
    assert "shared_layers.0.feed_forward.up.weight in shape [512, 128]" in with_model(ranker=sizes, generator=sizes)

    (copy / "peer_scale.json").write_text(original)
    manifest = json.loads(original)
    manifest["tensors"]["stray.weight"] = manifest["tensors"]["mlm_head.bias"]
    write_manifest(copy / "peer_scale.json", manifest)
    assert "has a parameter stray.weight" in refused(copy)


def test_damaged_checkpoints(copy, refused, tmp_path):
    file = copy / "peer_scale.json"
    original = file.read_text()

    def damaged(section, key, value=None):
        manifest = json.loads(original)
        manifest[section].pop(key)
        if value is not None:
            manifest[section][key] = value
        write_manifest(file, manifest)
        return refused(copy)

    assert "peer_scale.json: model.init_std: missing" in damaged("model", "init_std")
    assert "peer_scale.json: model.vocab_size" in damaged("model", "vocab_size", "many")
    assert "peer_scale.json: data.seq_length" in damaged("data", "seq_length")
    assert "peer_scale.json: layout.tensor_parallel" in damaged("layout", "tensor_parallel", "two")
    assert "not the tokenizer" in damaged("tokenizer", "digest", "0" * 64)
    assert "peer_scale.json: objective.kind: missing" in damaged("objective", "kind")
    assert "peer_scale.json: objective.kind: 'xyz' is unknown" in damaged("objective", "kind", "xyz")
    assert "peer_scale.json: objective.delta: missing" in damaged("objective", "delta")
    assert "peer_scale.json: masking.mask_fraction: missing" in damaged("masking", "mask_fraction")
    for content in (original[:200], "[]", "{}"):
        file.write_text(content)
        assert "peer_scale.json: not a checkpoint's manifest" in refused(copy)

    file.write_text(original)
    shard = copy / "rank_00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:1000])
    assert f"{shard.name}: is 1000 bytes" in refused(copy)
    shard.write_bytes(bytes(len(content)))
    assert f"{shard.name}: is damaged" in refused(copy)
    shard.unlink()
    assert f"{shard.name}: is missing" in refused(copy)
    assert "no committed checkpoint" in refused(tmp_path / "nowhere")
    assert "no committed checkpoint" in refused(file)


def test_the_output_is_left_alone_when_it_holds_something(checkpoints, refused, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("mine")
    assert f"--output {taken}: exists and is not an empty folder" in refused(checkpoints[2], "--output", taken)
    assert [path.read_text() for path in taken.iterdir()] == ["mine"]
    assert f"--output {taken / 'config.json'}: exists" in refused(checkpoints[2], "--output", taken / "config.json")


def test_wrong_logits_are_refused_and_leave_nothing(checkpoints, refused, run, tmp_path, monkeypatch):
    """The score's sign turned in the map: what the tool's own verification is there to find."""
    right = tqr.rtd_head_entries

    def wrong(*head):
        return tuple(e._replace(convert=lambda w: (w,)) if "score" in e.ours else e for e in right(*head))

    monkeypatch.setattr(tqr, "rtd_head_entries", wrong)
    assert refused(checkpoints[2]).startswith("error: verification: the logits of ElectraForPreTraining differ")
    told = run("to-hf", "--load", checkpoints[2], "--output", tmp_path / "hf", "--no-verify")
    assert "not verified" in told


def test_help_shows_a_whole_example():
    done = to_hf("--help")
    assert done.returncode == 0
    assert "--load runs/tiny --output hub/peer-tiny" in done.stdout
    assert "from_pretrained('hub/peer-tiny')" in done.stdout
