"""All that a set of fine-tunings is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from peer_scale.configuration import configuration, option
from peer_scale.errors import UserError
from peer_scale.finetuning.recipes import Head, Layerwise, Recipe, RecipeName
from peer_scale.finetuning.tasks import GLUE, Kind, Metric
from peer_scale.settings.run import Seed

_Share = Annotated[float, Field(ge=0, lt=1)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
_MaxLength = Annotated[int, Field(ge=8)]
_BY_RECIPE = "the recipe's"


@configuration
class FinetuneConfig:
    """What is fine-tuned on what, how, and where the results go; None leaves a value to the recipe."""

    model: str = option(
        help="Folder that transformers opens, checkpoint of ours (a --save folder or a step in it) or Hugging Face id.",
        metavar="MODEL",
        default_text="none: must be given",
    )
    output_dir: Path = option(
        help="Folder of the results; finished runs in it are kept, and not done again.",
        metavar="DIR",
        default_text="none: must be given",
    )
    tasks: tuple[str, ...] = option(
        default=(),
        help=f"Tasks: {', '.join(GLUE)}, glue for all of these, or folders with task.json, train.tsv and dev.tsv.",
        metavar="TASK",
        flag="task",
        default_text="the --train-file",
    )
    recipe: RecipeName = option(
        default="paper",
        help="paper: Table 9 of the PEER paper on transformers' classes; electra: google-research's code for ELECTRA.",
        metavar="NAME",
    )
    data_dir: Path | None = option(
        default=None,
        help="Folder of GLUE's own files (CoLA/train.tsv and so on).",
        metavar="DIR",
        default_text="the Hugging Face hub",
    )
    train_file: Path | None = option(
        default=None, help="Own training examples: CSV, TSV or JSONL.", metavar="FILE", default_text="none"
    )
    dev_file: Path | None = option(
        default=None,
        help="Own examples to choose and score by.",
        metavar="FILE",
        default_text="a tenth of the training examples",
    )
    test_file: Path | None = option(
        default=None,
        help="Own examples to score, or to predict where they have no labels.",
        metavar="FILE",
        default_text="none",
    )
    text_columns: tuple[str, ...] = option(
        default=(),
        help="Columns of the text or the two texts of the own files.",
        metavar="NAME",
        default_text="text, or text_a and text_b, or the one beside the label",
    )
    label_column: str = option(default="label", help="Column of the label of the own files.", metavar="NAME")
    kind: Kind = option(
        default="classification", help="What the own labels are: classification or regression.", metavar="KIND"
    )
    metric: Metric | None = option(
        default=None,
        help="What counts for the own files: accuracy, mcc, f1 or pearson_spearman.",
        metavar="NAME",
        default_text="accuracy, or pearson_spearman for regression",
    )
    task_name: str | None = option(
        default=None, help="What the own files' task is called.", metavar="NAME", default_text="the train file's name"
    )
    branch: str | None = option(
        default=None,
        help="Which network of a checkpoint of ours, as for peer-scale convert to-hf.",
        metavar="NAME",
        default_text="the one that its objective is for",
    )
    random_init: bool = option(default=False, help="Start from random weights of the model's sizes.")
    seeds: tuple[Seed, ...] | None = option(
        default=None,
        help="Seeds of the runs: of the head, the order of the examples, dropout and --max-train-examples.",
        metavar="N",
        default_text="1 2 ..., as many as the recipe has runs",
    )
    lrs: tuple[PositiveFloat, ...] | None = option(
        default=None,
        help="Learning rates; the one with the best mean dev score counts.",
        metavar="X",
        flag="lr",
        default_text=_BY_RECIPE,
    )
    epochs: PositiveInt | None = option(
        default=None, help="Passes over the training examples.", metavar="N", default_text=_BY_RECIPE
    )
    batch_size: PositiveInt | None = option(
        default=None, help="Examples per step, of all ranks together.", metavar="N", default_text=_BY_RECIPE
    )
    micro_batch_size: PositiveInt | None = option(
        default=None,
        help="Examples that a rank passes through the model at once.",
        metavar="N",
        default_text="its share of the batch",
    )
    best_epoch: bool | None = option(
        default=None, help="Score the epoch that is best on dev, not the last.", default_text=_BY_RECIPE
    )
    max_length: _MaxLength = option(default=128, help="Tokens of a text or pair, at most.", metavar="N")
    max_train_examples: PositiveInt | None = option(
        default=None,
        help="Train on so many examples, drawn by each run's seed.",
        metavar="N",
        default_text="all",
    )
    head: Head | None = option(
        default=None,
        help="transformers: that of its classes; linear: one layer on the first token's state, as ELECTRA's.",
        metavar="NAME",
        default_text=_BY_RECIPE,
    )
    layerwise: Layerwise | None = option(
        default=None,
        help="Decay of the learning rate from layer to layer: none, official (as ELECTRA's code has it: one power too "
        "many below the head) or fixed.",
        metavar="NAME",
        default_text=_BY_RECIPE,
    )
    layerwise_decay: Annotated[float, Field(gt=0, le=1)] | None = option(
        default=None,
        help="Factor of the learning rate from a layer to the one below.",
        metavar="X",
        default_text="0.8, 0.9 for large models",
    )
    weight_decay: NonNegativeFloat | None = option(
        default=None, help="Weight decay, of matrices alone.", metavar="X", default_text=_BY_RECIPE
    )
    warmup: _Share | None = option(
        default=None, help="Share of the steps in which the rate rises.", metavar="SHARE", default_text=_BY_RECIPE
    )
    dropout: _Share | None = option(
        default=None, help="Dropout of hidden states and of the head.", metavar="P", default_text=_BY_RECIPE
    )
    attention_dropout: _Share | None = option(
        default=None, help="Dropout of attention.", metavar="P", default_text=_BY_RECIPE
    )
    adam_beta1: _Beta | None = option(
        default=None, help="Decay of Adam's mean of the gradients.", metavar="X", default_text=_BY_RECIPE
    )
    adam_beta2: _Beta | None = option(
        default=None, help="Decay of Adam's mean of the squared gradients.", metavar="X", default_text=_BY_RECIPE
    )
    adam_eps: PositiveFloat | None = option(
        default=None, help="What Adam adds to the root of that mean.", metavar="X", default_text=_BY_RECIPE
    )
    clip_grad: PositiveFloat | None = option(
        default=None, help="Norm to which gradients are cut.", metavar="X", default_text=_BY_RECIPE
    )
    group_by_length: bool = option(
        default=False, help="Put texts of about the same length into a batch: faster, in another order."
    )
    bf16: bool = option(default=False, help="Compute in bfloat16 by autocast; the weights stay fp32.")
    save_model: bool = option(default=True, help="Keep the model of the best run.")
    deepspeed_config: str | None = option(
        default=None,
        help="DeepSpeed's settings: a JSON file, or zero1 or zero2; needs a launcher.",
        metavar="FILE",
        flag="deepspeed_config",
        default_text="plain data parallelism",
    )

    def __post_init__(self) -> None:
        for name in ("seeds", "lrs"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise UserError(f"{name} is {list(values)}; it must be one or more different numbers")
        if bool(self.tasks) == (self.train_file is not None):
            raise UserError("give either --task or --train-file")
        if self.train_file is None and (self.dev_file or self.test_file or self.text_columns or self.metric):
            raise UserError("--dev-file, --test-file, --text-columns and --metric go with --train-file")

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Give the recipe with the values that were given in place of its own."""
        names = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
        given: dict[str, Any] = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
