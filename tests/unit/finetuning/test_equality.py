"""Fifty steps against plain loops: the same weights, order and head, no dropout, fp32."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup
from transformers.trainer_utils import IntervalStrategy

from peer_scale.finetuning.encoding import Padded, encode, inputs_of
from peer_scale.finetuning.fit import Execution, Part, predict, training_arguments
from peer_scale.finetuning.loading import build_classifier, open_pretrained
from peer_scale.finetuning.own_files import read_task_folder
from peer_scale.finetuning.recipes import recipe_for
from peer_scale.finetuning.tasks import Examples, Task
from peer_scale.finetuning.trainer import RecipeTrainer, summed_loss
from tiny_encoders import write_encoder, write_task

pytestmark = pytest.mark.heavy

BATCH, EXAMPLES, EPOCHS, LR = 8, 68, 6, 2e-3
STEPS = 9 * EPOCHS  # the ninth batch of an epoch has 4 examples


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model, the training examples as it takes them, and their batches in order."""
    folder = tmp_path_factory.mktemp("equality")
    pretrained = open_pretrained(str(write_encoder(folder / "model")), "model")
    data = read_task_folder(write_task(folder / "task", train=EXAMPLES))

    def make(name):
        recipe = recipe_for(name, hidden_size=16, task="praise", train_size=EXAMPLES)
        recipe = replace(recipe, dropout=0.0, attention_dropout=0.0, batch_size=BATCH, epochs=EPOCHS)
        model = build_classifier(pretrained, data.task, recipe, seed=1)
        train = encode(data.train, pretrained.tokenizer, inputs_of(model), 32)
        collate = Padded(pretrained.tokenizer.pad_token_id)
        batches = [
            collate([train[n] for n in range(begin, min(begin + BATCH, EXAMPLES))])
            for begin in range(0, EXAMPLES, BATCH)
        ]
        return recipe, data.task, model, train, collate, batches * EPOCHS

    return make


def by_trainer(recipe, task, model, train, collate, folder, micro_batch_size=None):
    args = training_arguments(recipe, LR, 1, folder, Execution(micro_batch_size))
    args.train_sampling_strategy = "sequential"
    args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, 1
    trainer = RecipeTrainer(model, args, recipe=recipe, task=task, train_dataset=train, data_collator=collate)
    trainer.train()
    steps = [record for record in trainer.state.log_history if "loss" in record]
    return [(step["loss"], step["grad_norm"]) for step in steps]


def plain_transformers(model, batches):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=6, num_training_steps=STEPS)
    found = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def plain_electra(model, batches):
    """google-research's loop; the exponents of two layers by hand."""
    powers = {"electra.embeddings": 4, "electra.encoder.layer.0.": 3, "electra.encoder.layer.1.": 2, "classifier": 0}
    named = dict(model.named_parameters())
    power = {name: next(value for key, value in powers.items() if name.startswith(key)) for name in named}
    mean, square = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    head = model.classifier.out_proj
    found = []
    for step, batch in enumerate(batches):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model.electra(**inputs).last_hidden_state[:, 0] @ head.weight.T + head.bias
        loss = -F.log_softmax(logits, -1)[torch.arange(len(logits)), batch["labels"]].sum()
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
        rate = LR * (1 - step / STEPS) * min(1, step / (0.1 * STEPS))
        for name, p in named.items():
            g = gradients[name] / max(norm, 1)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            decay = 0.0 if "LayerNorm" in name or name.endswith("bias") else 0.01
            p.data -= rate * 0.8 ** power[name] * (mean[name] / (square[name] ** 0.5 + 1e-6) + decay * p.data)
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize(("name", "micro"), [("paper", None), ("paper", 4), ("electra", None)])
def test_fifty_steps_are_those_of_a_plain_loop(parts, tmp_path, name, micro):
    recipe, task, model, train, collate, batches = parts(name)
    plain = {"paper": plain_transformers, "electra": plain_electra}[name]
    wanted = torch.tensor(plain(copy.deepcopy(model), batches))
    found = torch.tensor(by_trainer(recipe, task, model, train, collate, tmp_path, micro))
    assert found.shape == (STEPS, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert wanted[-9:, 0].mean() < 0.7 * wanted[:9, 0].mean(), "it learns, so the steps are of some size"


def test_losses_are_not_broadcast():
    """transformers issue 11583: the squared error of [B, 1] and [B] would be of [B, B]."""
    task = Task("t", "regression", "pearson_spearman", ("text",))
    outputs, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 1.0, 1.0])
    assert summed_loss(task, outputs, labels).item() == 10
    with pytest.raises(AssertionError):
        summed_loss(task, outputs[:, 0], labels)


@pytest.mark.parametrize("group_by_length", [False, True])
def test_predictions_are_in_the_order_of_the_examples(parts, tmp_path, group_by_length):
    recipe, task, model, train, collate, _ = parts("paper")
    args = training_arguments(recipe, LR, 1, tmp_path, Execution(group_by_length=group_by_length))
    trainer = RecipeTrainer(model, args, recipe=recipe, task=task, train_dataset=train, data_collator=collate)
    examples = Examples([("",)] * EXAMPLES, None)
    found = predict(trainer, {"": Part(examples, train)})[""]
    model.eval()
    for number in range(EXAMPLES):
        alone = {name: value for name, value in collate([train[number]]).items() if name != "labels"}
        with torch.no_grad():
            expected = model(**alone).logits[0]
        torch.testing.assert_close(torch.from_numpy(found[number]), expected, rtol=1e-4, atol=1e-5)
