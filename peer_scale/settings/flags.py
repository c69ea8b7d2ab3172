"""The trainer's command line. Names are Megatron-LM's and DeepSpeed's; None means: not said."""

import argparse
from pathlib import Path
from typing import NoReturn

from peer_scale.errors import UserError

_EXAMPLE = """example:
  deepspeed peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json --model peer-small \\
      --data-path wiki.jsonl --tokenizer bert-vocab/ --save runs/small --save-interval 1000 --log-dir runs/small/logs
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """All flags, grouped as `--help` shows them."""
    parser = _Parser(
        prog=prog,
        description="Pre-train a text encoder with PEER, ELECTRA or BERT objectives.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser.add_argument_group("model"))
    add_objective_flags(parser.add_argument_group("objective"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_parallel_flags(parser.add_argument_group("parallelism"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def add_model_flags(model: argparse._ArgumentGroup, default: str | None = "peer-tiny") -> None:
    """Those that say what is trained."""
    model.add_argument("--model", default=default, metavar="NAME", help="preset (default: %(default)s)")
    model.add_argument("--config", type=Path, metavar="YAML", help="own sizes: sections model, objective, training")
    for name in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads"):
        model.add_argument(f"--{name}", type=int, help="of the ranker (BERT: of the encoder)")
        model.add_argument(f"--generator-{name}", type=int)
    model.add_argument("--num-shared-layers", type=int, help="bottom layers that generator and ranker share")
    model.add_argument("--embedding-size", type=int)
    model.add_argument("--max-position-embeddings", type=int)
    model.add_argument("--hidden-dropout", type=float)
    model.add_argument("--attention-dropout", type=float)


def add_objective_flags(objective: argparse._ArgumentGroup) -> None:
    """Those that say what it learns."""
    objective.add_argument("--num-levels", type=int, metavar="K", help="levels of the ranker; 2 is ELECTRA")
    objective.add_argument("--taus", type=float, nargs="*", help="K-2 partitioning ratios, ascending")
    objective.add_argument("--top-t", type=int, metavar="T")
    objective.add_argument("--delta", type=float, help="width of the buffers between levels; 0 for none")
    objective.add_argument("--gammas", type=float, nargs="+", help="weights of the level terms (one, or K-2)")
    objective.add_argument("--tqr-weight", type=float, metavar="LAMBDA")
    objective.add_argument("--warmup-epochs", type=float, help="epochs with the first term of the ranking loss only")
    objective.add_argument("--mask-fraction", type=float, help="share of the tokens selected for corruption")
    objective.add_argument("--mask-probability", type=float, help="share of the selected that show [MASK]")


def _add_training_flags(training: argparse._ArgumentGroup) -> None:
    training.add_argument("--deepspeed_config", type=Path, metavar="JSON", help="default: ZeRO-2, everything auto")
    training.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    for name in ("seq-length", "train-iters", "micro-batch-size", "global-batch-size", "lr-warmup-iters"):
        training.add_argument(f"--{name}", type=int)
    for name in ("lr", "weight-decay", "clip-grad", "adam-beta1", "adam-beta2", "adam-eps"):
        training.add_argument(f"--{name}", type=float)
    training.add_argument("--seed", type=int, default=1234)
    training.add_argument("--no-adam-bias-correction", dest="adam_bias_correction", action="store_false", default=None)
    training.add_argument("--max-skipped-steps", type=int, help="fp16 overflows in a row before giving up")
    training.add_argument("--activation-checkpointing", action="store_true", default=None)
    precision = training.add_mutually_exclusive_group()
    for name in ("fp32", "bf16", "fp16"):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name)


def _add_parallel_flags(parallel: argparse._ArgumentGroup) -> None:
    parallel.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parallel.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parallel.add_argument(
        "--sequence-parallel", action="store_true", help="split activations between tensor-parallel products as well"
    )
    parallel.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parallel.add_argument("--num-threads", type=int, help="CPU threads of a rank (default: cores / ranks on the node)")


def _add_data_flags(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--data-path",
        nargs="+",
        default=["builtin"],
        metavar="P",
        help="text, JSONL or parquet files or folders, a Hugging Face dataset id, Megatron .bin/.idx prefixes; "
        "default: the documentation that installed packages carry",
    )
    data.add_argument("--tokenizer", metavar="P", help="WordPiece folder, file or Hugging Face id; default: trained")
    data.add_argument("--vocab-size", type=int, help="of a tokenizer to be trained")
    data.add_argument("--text-key", default="text", help="field of JSONL and parquet (default: %(default)s)")
    data.add_argument("--cache-dir", type=Path, help="where tokenised text is kept (default: ~/.cache/peer_scale)")
    data.add_argument("--num-workers", type=int, default=1, help="data-loading processes a rank")
    data.add_argument("--validation-fraction", type=float, default=0.01, help="share of the documents held out")


def _add_output_flags(output: argparse._ArgumentGroup) -> None:
    output.add_argument("--save", type=Path, metavar="DIR", help="checkpoints; the last step is always saved")
    output.add_argument("--save-interval", type=int, metavar="N")
    output.add_argument("--keep-last", type=int, default=3, metavar="N", help="checkpoints kept (default: 3)")
    output.add_argument("--keep-every", type=int, metavar="M", help="keep those of every Mth step besides")
    output.add_argument(
        "--async-save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write while training goes on, from a copy in host memory of 12 bytes a parameter of a rank's share",
    )
    output.add_argument("--load", type=Path, metavar="DIR", help="go on from the newest checkpoint in DIR")
    output.add_argument("--log-dir", type=Path, metavar="DIR", help="metrics.jsonl, TensorBoard, run.yaml")
    output.add_argument("--log-interval", type=int, default=10, metavar="N", help="steps a printed line")
    output.add_argument("--eval-interval", type=int, metavar="N", help="steps between validations")
    output.add_argument("--eval-iters", type=int, default=8, metavar="N", help="global batches a validation")
    output.add_argument("--exit-duration-in-mins", type=float, help="save and stop after so long")
    output.add_argument("--exit-signal-handler", action="store_true", help="save and stop on SIGTERM")
    output.add_argument("--verbose", action="store_true", help="let DeepSpeed, Megatron and torch speak")
