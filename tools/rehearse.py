#!/usr/bin/env python
"""A rehearsal for GPUs on a machine without one: passes of every preset over tensors that only claim to be on a GPU.

torch's fake tensors have a device, a shape and a format, and no numbers. A forward pass on fake CUDA tensors stops
where a tensor was left on the host, where shapes or formats do not go together, and where the host asks for a number of
the device. Each of our own autograd functions is sent back at once, since torch's engine would need a device.

What this cannot see: numbers, kernels, streams, NCCL. Our Triton kernels cannot be launched on fake tensors: the same
ways in plain torch stand for them. Attention takes torch's flash kernel where a GPU of compute capability 8.0 would.

It takes a build of torch for CUDA, which installs on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peer_scale.quiet import silence_libraries

silence_libraries()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import Function  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from peer_scale.errors import UserError  # noqa: E402
from peer_scale.kernels import attention  # noqa: E402
from peer_scale.kernels.availability import gpu_branches  # noqa: E402
from peer_scale.models import positions  # noqa: E402
from peer_scale.objectives.task import PretrainingTask  # noqa: E402
from peer_scale.parallel import sequence  # noqa: E402
from peer_scale.parallel.topology import build_topology  # noqa: E402
from peer_scale.samples.examples import Batch, Example, collate  # noqa: E402
from peer_scale.sequences import Sequences  # noqa: E402
from peer_scale.settings.flags import build_parser  # noqa: E402
from peer_scale.settings.presets import preset_names  # noqa: E402
from peer_scale.settings.resolve import resolve  # noqa: E402
from peer_scale.settings.run import RunConfig  # noqa: E402
from peer_scale.training.trainer import Trainer  # noqa: E402

GPU = torch.device("cuda", 0)
BATCHES = ("full", "ragged")


@dataclass(frozen=True)
class Layout:
    """How a layer is shared out; the rank that is rehearsed is the last one."""

    name: str
    ranks: int = 1
    sequence_parallel: bool = False

    def flags(self, model: str) -> list[str]:
        """Give the trainer's flags for a model shared out like this."""
        flags = ["--model", model, "--tensor-model-parallel-size", str(self.ranks)]
        return [*flags, "--sequence-parallel"] if self.sequence_parallel else flags


LAYOUTS = (Layout("TP 1"), Layout("TP 2", 2), Layout("TP 2 with sequence parallelism", 2, sequence_parallel=True))


class LeftBehind(Exception):
    """Something is on the host, or the host would wait for it."""


def main(argv: Sequence[str]) -> int:
    """Rehearse what is asked for and print the table; gives 1 where something failed, 2 where nothing could."""
    parser = argparse.ArgumentParser(
        prog="rehearse.py", description=(__doc__ or "").splitlines()[0], epilog="All other flags are the trainer's."
    )
    parser.add_argument(
        "--model",
        nargs="+",
        choices=preset_names(),
        default=preset_names(),
        metavar="NAME",
        help="presets; all if not given",
    )
    args, trainers_flags = parser.parse_known_args(argv)
    if torch.version.cuda is None:
        print("error: this torch is built for the CPU alone; a build for CUDA will do, without a GPU", file=sys.stderr)
        return 2
    failures: list[str] = []
    print(f"| preset | {' | '.join(layout.name for layout in LAYOUTS)} |\n|---|{'---|' * len(LAYOUTS)}")
    for model in args.model:
        cells = []
        for layout in LAYOUTS:
            try:
                run = resolve(build_parser().parse_args([*layout.flags(model), *trainers_flags]), layout.ranks)
            except UserError as error:
                if layout.ranks == 1:
                    print(f"error: {error}", file=sys.stderr)
                    return 2
                cells.append("refused")  # one attention head is not divided
                continue
            found = {batch: rehearse(run, ragged=batch == "ragged") for batch in BATCHES}
            failures += [f"{model}, {layout.name}, {batch}: {line}" for batch, line in found.items() if line]
            cells.append(", ".join(f"{batch} {'failed' if line else 'ok'}" for batch, line in found.items()))
        print(f"| `{model}` | {' | '.join(cells)} |", flush=True)
    print("\n".join(["", *failures]) if failures else f"\nNothing failed (torch {torch.__version__}).")
    return 1 if failures else 0


def rehearse(run: RunConfig, *, ragged: bool = False) -> str | None:
    """Take a micro-batch from the host to the sums of its step; give what failed and where, or None."""
    with process_group(run.tensor_parallel):
        grid, batch = Grid(run), batch_of(run, ragged=ragged)
        positions._angles.cache_clear()  # of another pass's fake tensors
        try:
            with stand_ins(), gpu_branches(triton=False), torch.no_grad(), FakeTensorMode() as mode:
                step(run, grid, fake(batch, mode))
        except Exception as error:  # whatever it is, it is what is looked for
            return describe(error)
    return None


def step(run: RunConfig, grid: Grid, batch: Batch) -> None:
    """Do what a step does before the update, for one micro-batch that is on the host."""
    task = PretrainingTask(run.model, run.objective, grid.tensor_parallel)
    move(task, run.compute_dtype)
    unused: Any = None
    trainer = Trainer(run, cast(Any, grid), unused, unused, unused, unused, (), progress=unused, warmup_steps=0)
    with HostWaits():
        batch = batch.to(GPU)
        loss, sums, values = task(tuple(work.name for work in task.graph.works), batch, trainer.step_info(1, [batch]))
        sums = trainer.global_sums(sums, 0.0, 0.0)
    for name, tensor in {"loss": loss, "sums": sums, **values}.items():
        if tensor is None or not tensor.is_cuda:
            raise LeftBehind(f"{name}: not on the GPU in the end")


def batch_of(run: RunConfig, *, ragged: bool) -> Batch:
    """Make a micro-batch of the run's size; of sequences of every length in between, or all of the greatest."""
    longest, count = run.training.seq_length, run.training.micro_batch_size
    lengths = np.linspace(longest, 8, count, dtype=np.int64) if ragged else np.full(count, longest)
    examples = []
    for length in lengths.tolist():
        ids = np.full(length, 7)
        selected = run.masking.num_predictions(length)
        extra = np.zeros((selected, run.objective.num_extra_uniforms), np.float32)
        examples.append(Example(ids, ids, 0 * ids, np.arange(selected), np.zeros(selected, np.float32), extra))
    return collate(examples)


def fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Give a batch that is on the host as fake tensors there."""

    def of_sequences(real: Sequences) -> Sequences:
        tensors = (getattr(real, field.name) for field in fields(real)[1:])
        return Sequences(real.lengths, *map(mode.from_tensor, tensors))

    fakes: dict[str, Any] = {
        name: of_sequences(value) if isinstance(value, Sequences) else mode.from_tensor(value)
        for name, value in batch._asdict().items()
    }
    return Batch(**fakes)


def move(module: nn.Module, dtype: torch.dtype) -> None:
    """Do what `module.to(GPU, dtype)` does, which refuses fake parameters."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to(GPU, dtype), requires_grad=False)
        part._buffers.update({name: buffer.to(GPU) for name, buffer in part._buffers.items() if buffer is not None})


class Grid:
    """A `Topology` whose places were looked up beforehand: torch reads tensors to find them, which fake ones refuse."""

    def __init__(self, run: RunConfig) -> None:
        real = build_topology(
            torch.device("cpu"), tensor_parallel=run.tensor_parallel, sequence_parallel=run.sequence_parallel
        )
        self.device = GPU
        self.tensor_parallel = replace(real.tensor_parallel, device=GPU)
        self._tp_rank = real.rank("tp")
        self._groups = {"dp": real.group("dp"), "tp": real.group("tp")}

    def rank(self, dim: str) -> int:
        return {"tp": self._tp_rank}.get(dim, 0)

    def group(self, dim: str) -> dist.ProcessGroup:
        return self._groups[dim]


@contextlib.contextmanager
def process_group(ranks: int) -> Iterator[None]:
    """Be the last rank of a group whose other ranks are not there: torch's fake one, which sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Put something in the place of what only a machine with GPUs has, and send our autograd functions back at once."""
    flash = attention.FlashKernel("torch's flash attention, variable length", attention._torch_flash)
    places: list[tuple[Any, str, Any]] = [
        (attention, "flash_kernel", lambda: flash),
        (sequence, "_default_generator", lambda _: torch.default_generator),
        *((function, "apply", forth_and_back(function)) for function in own_functions()),
    ]
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def own_functions(base: type = Function) -> Iterator[type]:
    """Find the autograd functions of this package."""
    subclasses: list[type] = base.__subclasses__()
    for function in subclasses:
        if function.__module__.startswith("peer_scale."):
            yield function
        yield from own_functions(function)


def forth_and_back(function: Any) -> staticmethod:
    """Give an `apply` that runs forward and, on gradients like its outputs, backward."""

    def apply(*inputs: Any) -> Any:
        context = Context(inputs)
        outputs = function.forward(context, *inputs)
        some = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = function.backward(context, *(None if given is None else torch.empty_like(given) for given in some))
        grads = grads if isinstance(grads, tuple) else (grads,)
        if len(grads) != len(inputs):
            raise LeftBehind(f"{function.__name__}.backward gives {len(grads)} gradients for {len(inputs)} inputs")
        for grad, given in zip(grads, inputs, strict=True):
            if grad is not None and (grad.shape, grad.device) != (given.shape, given.device):
                raise LeftBehind(
                    f"{function.__name__}.backward gives a gradient {tuple(grad.shape)} on {grad.device} "
                    f"for an input {tuple(given.shape)} on {given.device}"
                )
        return outputs

    return staticmethod(apply)


class Context:
    """What a function's forward tells its backward, as torch's own does."""

    saved_tensors: tuple[Any, ...] = ()

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(given, Tensor) and given.is_floating_point() for given in inputs)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_dirty(self, *_: Tensor) -> None:
        pass

    def mark_non_differentiable(self, *_: Tensor) -> None:
        pass


class HostWaits(TorchDispatchMode):
    """Stops where the host would wait for a copy; lets it read what it made itself (a seed)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device.type == "cpu":
            return 1
        result = func(*args, **kwargs)
        indices = args[1] if name in ("index", "index_put", "index_put_") and args[0].is_cuda else []
        if any(index is not None and not index.is_cuda for index in indices):
            raise LeftBehind("an index on the host")
        if name in ("_to_copy", "copy", "copy_"):
            devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)}
            is_asked = kwargs.get("non_blocking", args[2] if name != "_to_copy" and len(args) > 2 else False)
            if len(devices) > 1 and not is_asked:
                raise LeftBehind("a copy between host and device that is not non_blocking")
        return result


def describe(error: Exception) -> str:
    """Say in a line what failed, and where in the package."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "peer_scale" in Path(frame.filename).parts]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: " if ours else ""
    return f"{where}{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
