#!/usr/bin/env python3
"""How many kernels a GPU would be given per micro-batch and per step, without a GPU, and what --compile takes off.

python tools/count_launches.py                                  # peer-small and peer-base, ZeRO-2
python tools/count_launches.py --presets teams-base --list      # also which operators they are

The model runs on tensors without numbers, by its ways for GPUs: each of torch's operators that computes counts as one
launch, as does each Triton kernel. That is a lower bound: a few operators need two kernels. What torch.compile makes is
counted after its fusion, on the CPU, where it may join a reduction or two more than on a GPU. What DeepSpeed adds is
counted on a real engine of one rank; several ranks add their messages.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peer_scale.quiet import silence_libraries

silence_libraries()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bench import synthetic_batch  # noqa: E402
from peer_scale.kernels import attention  # noqa: E402
from peer_scale.kernels.availability import gpu_branches  # noqa: E402
from peer_scale.models.layers import TransformerLayer  # noqa: E402
from peer_scale.objectives.task import PretrainingTask  # noqa: E402
from peer_scale.objectives.works import GlobalCounts, StepInfo  # noqa: E402
from peer_scale.parallel.environment import ProcessEnvironment  # noqa: E402
from peer_scale.parallel.topology import build_topology, init_process_group, single_process_topology  # noqa: E402
from peer_scale.samples.examples import Batch  # noqa: E402
from peer_scale.sequences import Sequences  # noqa: E402
from peer_scale.settings.ds_config import with_bucket_sizes  # noqa: E402
from peer_scale.settings.flags import build_parser  # noqa: E402
from peer_scale.settings.resolve import resolve  # noqa: E402
from peer_scale.settings.run import RunConfig  # noqa: E402
from peer_scale.training.engine import build_engine  # noqa: E402
from peer_scale.training.runner import WholeModelRunner  # noqa: E402

_NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts operators that compute, and Triton kernels, by phase and name; `add` is for what is known otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._is_counting = True

    def add(self, name: str, number: int = 1) -> None:
        """Count `number` launches more."""
        if self._is_counting:
            self.counts[self.phase][name] += number

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within."""
        self._is_counting = False
        try:
            yield
        finally:
            self._is_counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("prim", "profiler") and not _is_free(func):
            self.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _is_free(func: Any) -> bool:
    """Say whether an operator only looks at memory, or reserves it."""
    results = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in results)
    return is_view or func.overloadpacket.__name__ in _NO_LAUNCH


@contextmanager
def ways_for_gpus(launches: Launches) -> Iterator[None]:
    """Let the CPU's tensors take the ways for GPUs, and count Triton kernels instead of running them."""
    from triton.runtime.jit import JITFunction

    def counted(kernel: Any, *_: Any, **__: Any) -> None:
        launches.add(kernel.fn.__name__)

    run, flash = JITFunction.run, attention.flash_kernel
    JITFunction.run = counted
    attention.flash_kernel = lambda: attention.FlashKernel("", attention._torch_flash)  # type: ignore[assignment]
    try:
        with gpu_branches(triton=True):
            yield
    finally:
        JITFunction.run, attention.flash_kernel = run, flash


@dataclass(frozen=True)
class Kernels:
    """How many kernels torch.compile makes of a function, forward and backward; products are among them."""

    forward: int
    backward: int


def compiled_kernels(run: RunConfig) -> dict[Any, Kernels]:
    """Compile what `compile_task` would: by the layers' widths what follows attention, and the statistics."""
    ranks = single_process_topology().tensor_parallel
    task = PretrainingTask(run.model, run.objective, ranks).bfloat16()
    for parameter in task.parameters():
        parameter.data.zero_()
    few = replace(run, training=replace(run.training, micro_batch_size=2, seq_length=16))
    found: dict[Any, Kernels] = {}
    calls: dict[Callable[..., Any], tuple[Any, ...]] = {}

    def remember(function: Callable[..., Any], *arguments: Any) -> Any:
        calls[function] = arguments
        return function(*arguments)

    task.call = remember
    run_works(task, synthetic_batch(few, ranks.device))
    for layer in layers_of(task):
        width = layer.feed_forward_norm.weight.shape[0]
        if width not in found:
            states = [torch.randn(32, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
            found[width] = _kernels_of(layer.after_attention, *states)
    return found | {function: _kernels_of(function, *arguments) for function, arguments in calls.items()}


class _Fused(Exception):
    """Ends a compilation where all is known that is asked of it."""


def _kernels_of(function: Callable[..., Any], *arguments: Any) -> Kernels:
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.exc import InductorError
    from torch._inductor.scheduler import NopKernelSchedulerNode

    made: Counter[str] = Counter()
    phase = "forward"

    def count(nodes: list[Any]) -> list[Any]:
        made[phase] += sum(not isinstance(node, NopKernelSchedulerNode) for node in nodes)
        raise _Fused

    def inner(graph: Any, given: Any, **kwargs: Any) -> Any:
        nonlocal phase
        phase = "backward" if kwargs.get("is_backward") else "forward"
        unfused = torch.fx.Graph()
        unfused.output(unfused.graph_copy(graph.graph, {}))
        before = torch.fx.GraphModule(graph, unfused)
        try:
            compile_fx_inner(graph, given, **kwargs)
        except InductorError as error:
            if isinstance(error.inner_exception, _Fused):
                return make_boxed_func(before.forward)
            raise
        raise AssertionError("nothing was fused")

    def backend(graph: Any, given: Any) -> Any:
        return compile_fx(graph, given, inner)

    torch._dynamo.config.specialize_float = True
    with config.patch(cpu_backend="triton", _post_fusion_custom_pass=count, force_disable_caches=True):
        result = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)(*arguments)
        if isinstance(result, Tensor) and result.requires_grad:
            result.sum().backward()
    return Kernels(made["forward"], made["backward"])


class _Opaque(torch.autograd.Function):
    """Stands for a compiled part of a layer: results and gradients without numbers, at the cost of its kernels."""

    @staticmethod
    def forward(ctx: Any, launches: Launches, kernels: Kernels, like: Tensor, *inputs: Tensor) -> Tensor:
        ctx.launches, ctx.kernels = launches, kernels
        ctx.save_for_backward(*inputs)
        launches.add("compiled", kernels.forward)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.launches.add("compiled", ctx.kernels.backward)
        return None, None, None, *(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def put_in(found: dict[Any, Kernels], task: PretrainingTask, launches: Launches) -> None:
    """Let `task`, of tensors without numbers, count the compiled kernels in place of what they are made of."""
    for layer in layers_of(task):
        kernels = found[layer.feed_forward_norm.weight.shape[0]]
        parameters = [p for name, p in layer.named_parameters() if not name.startswith("attention.qkv")]

        def after(context: Tensor, hidden: Tensor, kernels: Kernels = kernels, parameters: Any = parameters) -> Tensor:
            return _Opaque.apply(launches, kernels, hidden.detach(), context, hidden, *parameters)

        layer.after_attention = after  # type: ignore[method-assign,assignment]

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        kernels = found[function]
        with launches.paused():
            result = function(*arguments)
        if kernels.backward:
            tensors = [each for each in arguments if isinstance(each, Tensor) and each.requires_grad]
            return _Opaque.apply(launches, kernels, result.detach(), *tensors)
        launches.add("compiled", kernels.forward)
        return result

    task.call = call


def layers_of(task: PretrainingTask) -> list[TransformerLayer]:
    """List all layers; what comes before attention has to be one product, which is not compiled."""
    layers = [module for module in task.modules() if isinstance(module, TransformerLayer)]
    assert not any(layer.is_pre_norm or layer.attention.rotary_base is not None for layer in layers)
    return layers


def run_works(task: PretrainingTask, batch: Batch) -> Tensor:
    """Run the forward pass; gives the loss."""
    counts = GlobalCounts(*(torch.ones(()) for _ in range(2)))
    loss, *_ = task(tuple(work.name for work in task.graph.works), batch, StepInfo(counts))
    assert loss is not None, "the works have losses"
    return loss


def model_launches(run: RunConfig, found: dict[Any, Kernels] | None = None) -> Launches:
    """Count a micro-batch's forward and backward pass; with the kernels that were `found`, as it would be compiled."""
    ranks, launches = single_process_topology().tensor_parallel, Launches()
    task, batch = PretrainingTask(run.model, run.objective, ranks), synthetic_batch(run, ranks.device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in task.modules():
            module._parameters.update(
                {n: nn.Parameter(_like(p)) for n, p in module._parameters.items() if p is not None}
            )
            module._buffers.update({n: _like(buffer) for n, buffer in module._buffers.items() if buffer is not None})
        if found is not None:
            put_in(found, task, launches)
        fake = Batch(*map(_without_numbers, batch))
        with ways_for_gpus(launches), launches:
            loss = run_works(task, fake)
            launches.phase = "backward"
            loss.backward()
    return launches


def _without_numbers(value: Any) -> Any:
    if isinstance(value, Sequences):
        return Sequences(value.lengths, *(torch.empty_like(getattr(value, each.name)) for each in fields(value)[1:]))
    return torch.empty_like(value)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.dtype == torch.float32 else tensor.dtype)


def engine_launches(run: RunConfig) -> tuple[Counter[str], Counter[str]]:
    """Count what DeepSpeed adds to a micro-batch, and to a step, of one rank: its copies, norms and the update."""
    topology = build_topology(torch.device("cpu"))
    few = replace(run, training=replace(run.training, micro_batch_size=2, seq_length=16))
    batch = synthetic_batch(few, topology.device)
    task = PretrainingTask(run.model, run.objective, topology.tensor_parallel)
    for parameter in task.parameters():
        parameter.data.zero_()
    alone = Launches()
    with alone:
        run_works(task.bfloat16(), batch).backward()
    task.float().zero_grad()
    num_parameters = sum(parameter.numel() for parameter in task.parameters())
    as_on_gpus = with_bucket_sizes(run.deepspeed, num_parameters=num_parameters, data_parallel=1, on_gpu=True)
    runner = WholeModelRunner(build_engine(task, replace(run, deepspeed=as_on_gpus), topology), topology)
    counts = []
    for number in (1, 1, 2):  # the first one makes buffers
        launches = Launches()
        with launches:
            runner.train([batch] * number, StepInfo(GlobalCounts(torch.ones(()), torch.ones(()))), lambda _: None)
        counts.append(launches.counts["forward"])
    _, one, two = counts
    per_micro_batch = two - one - alone.counts["forward"]
    return per_micro_batch, one + one - two


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["peer-small", "peer-base"], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="also name the operators")
    args = parser.parse_args()
    print("| | forward | backward | compiled: forward | backward | DeepSpeed, per micro-batch | per step |")
    print("|---|---|---|---|---|---|---|")
    init_process_group(ProcessEnvironment(0, 1, 0, 1, "127.0.0.1", 0, "none"))
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)  # it tells of each compilation that is ended
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        print_rows(args.presets, show_operators=args.list)


def print_rows(presets: Sequence[str], *, show_operators: bool) -> None:
    """Print the row of each preset, and what its numbers are made of."""
    for preset in presets:
        flags = ["--model", preset, "--hidden-dropout", "0", "--attention-dropout", "0", "--micro-batch-size", "8"]
        run = resolve(build_parser().parse_args(flags), 1)
        found = compiled_kernels(run)
        eager, compiled = model_launches(run), model_launches(run, found)
        added = engine_launches(run)
        counts = [each.counts[phase] for each in (eager, compiled) for phase in ("forward", "backward")]
        print("|", " | ".join([preset, *(f"{each.total():,}" for each in (*counts, *added))]), "|", flush=True)
        if show_operators:
            for key, kernels in found.items():
                name = getattr(key, "__name__", f"what follows attention, {key} wide")
                print(f"{preset} {name}: compiled to {kernels.forward} kernels and {kernels.backward} of backward")
            names = ("forward", "backward", "compiled forward", "compiled backward", "per micro-batch", "per step")
            for name, each in zip(names, (*counts, *added), strict=True):
                print(f"{preset} {name}:", ", ".join(f"{operator} {n}" for operator, n in each.most_common()))


if __name__ == "__main__":
    main()
