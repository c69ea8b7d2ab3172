"""Models that are loaded whole or not at all, and heads that transformers' classes hold exactly."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel, ElectraModel

from peer_scale.errors import UserError
from peer_scale.finetuning.encoding import encode, inputs_of, popped_lengths
from peer_scale.finetuning.loading import build_classifier, find_model, open_pretrained
from peer_scale.finetuning.recipes import recipe_for
from peer_scale.finetuning.saving import for_transformers, save_model
from peer_scale.finetuning.tasks import Examples, Task
from tiny_encoders import tokenizer_of, write_encoder

pytestmark = pytest.mark.heavy

CLASSES = Task("t", "classification", "accuracy", ("text",), labels=("a", "b", "c"))
NUMBERS = Task("t", "regression", "pearson_spearman", ("text",), scale=(-2.0, 6.0))
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: write_encoder(root / family, family) for family in ("electra", "bert", "modernbert")}


def recipe_of(name, **changes):
    return replace(recipe_for(name, hidden_size=16, task="t", train_size=100), **changes)


def opened(folder, **more):
    return open_pretrained(str(folder), "M", **more)


@pytest.mark.parametrize("family", ["electra", "bert", "modernbert"])
def test_encoders_are_loaded_and_heads_start_by_the_seed(folders, family):
    first, second, again = (
        build_classifier(opened(folders[family]), CLASSES, recipe_of("paper"), s) for s in (1, 2, 1)
    )
    saved = load_file(folders[family] / "model.safetensors")
    prefix = first.base_model_prefix
    for name, tensor in first.state_dict().items():
        if name.startswith(f"{prefix}.") and ".pooler." not in name:
            assert torch.equal(tensor, saved[name]), name
        else:
            assert torch.equal(tensor, again.state_dict()[name])
    head = next(name for name in first.state_dict() if name.startswith("classifier") and name.endswith("weight"))
    assert not torch.equal(first.state_dict()[head], second.state_dict()[head])
    fresh = build_classifier(opened(folders[family], random_init=True), CLASSES, recipe_of("paper"), 1)
    name = next(name for name in saved if "embeddings.weight" in name)
    assert fresh.state_dict()[name].shape == saved[name].shape
    assert not torch.equal(fresh.state_dict()[name], saved[name])


def damaged(folder, tmp_path, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


LAYER = "electra.encoder.layer.1."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: [t.pop(f"{LAYER}{name}") for name in ("output.dense.weight", "intermediate.dense.bias")],
            ["lacks", "encoder.layer.1.intermediate.dense.bias", "encoder.layer.1.output.dense.weight"],
        ),
        (
            lambda t: t.update({"electra.encoder.layer.2.output.dense.bias": torch.zeros(16)}),
            ["no place for", "encoder.layer.2.output.dense.bias"],
        ),
        (
            lambda t: t.update({f"{LAYER}output.dense.bias": torch.zeros(17)}),
            ["another shape", "encoder.layer.1.output.dense.bias"],
        ),
    ],
)
def test_every_key_that_is_not_right_is_named(folders, tmp_path, change, said):
    with pytest.raises(UserError) as error:
        opened(damaged(folders["electra"], tmp_path, change))
    assert str(error.value).startswith("--model M: the encoder's file ")
    assert all(text in str(error.value) for text in said)
    assert "\n" not in str(error.value)


def test_a_head_may_be_missing_and_others_be_there(folders, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if not name.startswith("electra.")]:
            tensors.pop(name)
        tensors["cls.predictions.bias"] = torch.zeros(3)

    opened(damaged(folders["electra"], tmp_path, change))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=f"--model {tmp_path}: neither a folder with the config.json of a model nor one with "
    ):
        find_model(str(tmp_path), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(UserError, match="--model M: transformers does not open it"):
        opened(find_model(str(tmp_path), tmp_path))


@torch.no_grad()
@pytest.mark.parametrize(("family", "model_class"), [("electra", ElectraModel), ("bert", BertModel)])
@pytest.mark.parametrize(("task", "label_range"), [(CLASSES, None), (NUMBERS, (-2.0, 6.0))])
def test_the_linear_head_stands_in_transformers_class(folders, tmp_path, family, model_class, task, label_range):
    model = build_classifier(opened(folders[family]), task, recipe_of("electra"), 1).eval()
    head = model.classifier.out_proj
    bound = (6 / (16 + task.num_outputs)) ** 0.5
    assert 0.6 * bound < head.weight.abs().max() <= bound
    assert not head.bias.any(), "Glorot's uniform weights, no bias"
    head.bias.uniform_()
    save_model(for_transformers(model, task, label_range), opened(folders[family]).tokenizer, "card", tmp_path / "m")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    states = model_class.from_pretrained(folders[family]).eval()(**inputs).last_hidden_state[:, 0]
    wanted = states @ head.weight.T + head.bias
    if label_range is not None:
        wanted = wanted * 8 - 2
    torch.testing.assert_close(theirs(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
    assert tokenizer_of(tmp_path / "m").pad_token_id is not None


def test_heads_that_have_no_place_are_refused(folders):
    with pytest.raises(UserError, match=r"--head linear: M is a modernbert model, .* give --head transformers"):
        build_classifier(opened(folders["modernbert"]), CLASSES, recipe_of("electra"), 1)
    many = replace(CLASSES, labels=tuple(map(str, range(9))))
    with pytest.raises(UserError, match="9 classes are more than half of the hidden size 16"):
        build_classifier(opened(folders["electra"]), many, recipe_of("electra"), 1)


def test_dropout_and_labels_are_the_tasks(folders):
    recipe = recipe_of("paper", dropout=0.25, attention_dropout=0.375)
    for family, names in (
        ("electra", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        ("modernbert", ("mlp_dropout", "attention_dropout")),
    ):
        config = build_classifier(opened(folders[family]), CLASSES, recipe, 1).config
        assert tuple(getattr(config, name) for name in names) == (0.25, 0.375)
        assert config.id2label == {0: "a", 1: "b", 2: "c"}
        assert config.num_labels == 3


def popped(first, second, room):
    """google-research's truncation, token by token."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        if len(first) > len(second):
            first.pop()
        else:
            second.pop()
    return first, second


def test_pairs_are_cut_as_electra_does(folders):
    for first in range(9):
        for second in range(9):
            for room in range(1, 12):
                wanted = tuple(map(len, popped(range(first), range(second), room)))
                assert popped_lengths(first, second, room) == wanted
    tokenizer = tokenizer_of(folders["electra"])
    words = ["good", "film", "bad", "story"]
    pairs = [(" ".join(words * n), " ".join(words[::-1] * m)) for n in range(1, 5) for m in range(1, 5)]
    model = build_classifier(opened(folders["electra"]), CLASSES, recipe_of("electra"), 1)
    wanted_inputs = inputs_of(model)
    assert wanted_inputs == ["input_ids", "token_type_ids", "attention_mask"]
    found = encode(Examples(pairs, None), tokenizer, wanted_inputs, 16, pops_longer=True)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for number, pair in enumerate(pairs):
        first, second = popped(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair), 13)
        assert found[number]["input_ids"] == [cls, *first, sep, *second, sep]
        assert found[number]["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert found[number]["attention_mask"] == [1] * len(found[number]["input_ids"])
    by_tokenizer = encode(Examples(pairs, None), tokenizer, wanted_inputs, 16)
    assert max(by_tokenizer.lengths()) == 16
    assert by_tokenizer[0]["token_type_ids"] == found[0]["token_type_ids"]
    modern = build_classifier(opened(folders["modernbert"]), CLASSES, recipe_of("paper"), 1)
    assert inputs_of(modern) == ["input_ids", "attention_mask"]
