"""Every command that a page shows is run, in small: the least of steps, sizes, ranks and text instead of its own."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from glue_files import FILES
from peer_scale.corpus.wordpiece import train_wordpiece
from rank_pool import become_rank, fork_server, free_port
from runs import PROJECT
from tiny_encoders import sentences, write_task

PAGES = [
    PROJECT / "README.md",
    # docs/adding_an_objective.md has a test of its own, which writes the file that it asks for
    *sorted(page for page in PROJECT.glob("docs/*.md") if page.stem != "adding_an_objective"),
    *sorted(PROJECT.glob("*/README.md")),
    *sorted(PROJECT.glob("examples/*/README.md")),
    PROJECT / "CONTRIBUTING.md",
]
# how a command begins, and where else it is run just so
RUN_ELSEWHERE = {
    "python3 -m venv": ".ci/run runs the README's two commands, and installs what CONTRIBUTING.md does",
    "pip install": ".ci/run",
    "pre-commit install": "it changes a checkout's hooks; its checks are those of `make lint`",
    "python examples/small_comparison/prepare.py": "it downloads packages; tests/unit/examples",
    "peer-scale plan --roofline": "a minute of computing; tests/unit/planning/test_roofline.py",
    "export": "containers, which have not been tried",
    "scontrol show hostnames": "Slurm's own",
}
COMPARISON = "examples/small_comparison/comparison.yaml"
LEAST = ("--train-iters", "2", "--global-batch-size", "8", "--seq-length", "32", "--log-interval", "1")
LEAST_MODEL = (
    *("--num-layers", "4", "--hidden-size", "32", "--ffn-hidden-size", "64", "--num-attention-heads", "2"),
    *("--generator-num-layers", "2", "--generator-hidden-size", "32", "--generator-ffn-hidden-size", "64"),
    *("--generator-num-attention-heads", "2", "--num-shared-layers", "0", "--embedding-size", "32"),
)


def commands(page: Path) -> list[str]:
    """Give the commands of a page's shell blocks, each in one line, without comments."""
    blocks = re.findall(r"^ *```(?:bash|sh|console)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (shlex.join(shlex.split(line, comments=True)) for line in lines) if line]


class Place:
    """A folder as a reader's: a checkout's files, text, a vocabulary, and what earlier commands made."""

    def __init__(self, folder: Path, text_file: Path) -> None:
        self.folder = folder
        for name in ("peer_scale", "ds_configs", "slurm", "tools", "examples"):
            (folder / name).symlink_to(PROJECT / name)
        documents = text_file.read_text(encoding="utf-8").split("\n\n")[:6]
        documents = [text[:4000] for text in documents]
        (folder / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        train_wordpiece(documents, 300).save(folder / "bert-vocab")
        labelled = [{"text": text, "label": label} for text, label in sentences(40, seed=1)]
        (folder / "reviews.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
        for name, content in FILES.items():
            (folder / "GLUE" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "GLUE" / name).write_text(content, encoding="utf-8", newline="")
        (folder / "data/small/pretraining").mkdir(parents=True)
        (folder / "data/small/pretraining/text.jsonl").symlink_to(folder / "wiki.jsonl")
        for path in re.findall(r"data/small/tasks/\w+", (PROJECT / COMPARISON).read_text(encoding="utf-8")):
            write_task(folder / path, name=Path(path).name)

    def run(self, line: str) -> None:
        """Run a page's command in small; fails with what it said."""
        if any(line.startswith(beginning) for beginning in RUN_ELSEWHERE):
            return
        words = [word for word in shlex.split(line) if word != "..." and not re.match(r"[A-Z_]+=", word)]
        if "..." in shlex.split(line) and "--model" not in words:  # the reader's own flags
            words += ["--model", "peer-base"]
        program = words[0]
        assert program in PROGRAMS, f"{line}: say in PROGRAMS how {program} is run"
        PROGRAMS[program](self, words[1:])

    def fork(self, argv: list[str], num_ranks: int = 1) -> None:
        """Run `peer-scale ARGV` in forks of the process that has imported everything, as so many ranks."""
        port, log = free_port(), self.folder / f"log-{os.urandom(4).hex()}"
        logs = [str(log.with_suffix(f".{rank}")) for rank in range(num_ranks)]
        processes = [
            fork_server().Process(target=_run, args=(argv, rank, num_ranks, port, logs[rank], str(self.folder)))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        said = "\n".join(Path(log).read_text() for log in logs if Path(log).exists())
        assert codes == [0] * num_ranks, f"peer-scale {shlex.join(argv)}: {codes}\n{said[-4000:]}"


def _run(argv: list[str], rank: int, num_ranks: int, port: int, log: str, folder: str) -> None:
    become_rank(rank, num_ranks, port, log)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    os.chdir(folder)
    from peer_scale.cli import main

    sys.exit(main(argv))


def _peer_scale(place: Place, words: list[str]) -> None:
    command, *flags = words
    COMMANDS.get(command, lambda place, flags: place.fork([command, *flags]))(place, flags)


def _train(place: Place, flags: list[str]) -> None:
    ranks, flags = 1, [flag.removeprefix("/data/") for flag in flags]
    for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
        ranks *= int(flags[flags.index(flag) + 1]) if flag in flags else 1
    sizes = LEAST_MODEL if "--config" not in flags else ()
    data = () if "--data-path" in flags else ("--data-path", "wiki.jsonl")
    vocabulary = () if "--tokenizer" in flags else ("--vocab-size", "300")
    place.fork(["train", *flags, *data, *vocabulary, *sizes, *LEAST], ranks)


def _plan(place: Place, flags: list[str]) -> None:
    less = ("--nodes", "1", "--gpus-per-node", "2") if "--nodes" in flags else ()
    if "--search" in flags:
        less = ("--model", "peer-tiny", "--nodes", "1", "--gpus-per-node", "1")
    place.fork(["plan", *flags, *less])


def _convert(place: Place, flags: list[str]) -> None:
    place.fork(["convert", *flags, *(LEAST_MODEL if flags[0] == "from-hf" else ())])


def _finetune(place: Place, flags: list[str]) -> None:
    """GLUE is a few lines of each task; hf/ranker is what docs/checkpoints.md makes."""
    own = () if {"--train-file", "--data-dir"} & set(flags) else ("--data-dir", "GLUE")
    if "hf/ranker" in flags and not (place.folder / "hf/ranker").exists():
        place.run("peer-scale convert to-hf --load runs/small --output hf/ranker")
    place.fork(["finetune", *flags, *own, "--epochs", "1", "--seeds", "1", "--lr", "1e-3", "--batch-size", "8"])


def _experiment(place: Place, flags: list[str]) -> None:
    """Only planned, on the little text: tests/test_experiment.py runs one."""
    file, *others = flags
    settings = yaml.safe_load((place.folder / file).read_text(encoding="utf-8"))
    settings["common"]["data"] = {"data_path": ["wiki.jsonl"], "tokenizer": "bert-vocab"}
    file = Path(file).name
    (place.folder / file).write_text(yaml.safe_dump(settings), encoding="utf-8")
    less = () if "--dry-run" in others else ("--plan", "--tokens-per-second", "1000")
    place.fork(["experiment", file, *(flag for flag in others if flag not in ("--measure-speed", "20")), *less])


def _launched(place: Place, words: list[str]) -> None:
    """What a launcher is asked for stands before the script or module: other tests start real launchers."""
    for index, word in enumerate(words):
        rest = words[index + 1 :]
        if word.endswith(("pretrain.py", "base.sh", "small.sh", "large.sh")):
            _train(place, rest)
            return
        if word == "peer_scale.finetune" or word.endswith("finetune.sh"):
            _finetune(place, rest)
            return
        if word in ("peer-scale", "peer_scale.cli"):
            _peer_scale(place, rest)
            return
    raise AssertionError(f"{words}: nothing of the project's is launched")


PROGRAMS: dict[str, Callable[[Place, list[str]], None]] = {
    "peer-scale": _peer_scale,
    **dict.fromkeys(("deepspeed", "torchrun", "mpirun", "sbatch", "srun"), _launched),
}
COMMANDS: dict[str, Callable[[Place, list[str]], None]] = {
    "train": _train,
    "plan": _plan,
    "convert": _convert,
    "finetune": _finetune,
    "experiment": _experiment,
    # the trainings of the whole examination: tests/unit/doctor
    "doctor": lambda place, flags: place.fork(["doctor", "--only", "setup"]),
    "data": lambda place, flags: place.fork(["data", *flags, "--workers", "1"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_file) -> Iterator[Place]:
    """What the README's reader has after its first steps."""
    place = Place(tmp_path_factory.mktemp("reader"), text_file)
    place.run("peer-scale train --model peer-small --data-path wiki.jsonl --save runs/small --log-dir runs/small/logs")
    for copy in ("logs/peer-s1", "logs/peer-s2", "logs/electra-s1", "experiments/peer-s1"):
        shutil.copytree(place.folder / "runs/small/logs", place.folder / copy)
    place.run("peer-scale train --model peer-base --data-path wiki.jsonl --save runs/base")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_the_commands_of_a_page(place, page):
    for line in commands(page):
        place.run(line)
