"""All checks in their order: what each needs, and what its result says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peer_scale.doctor.crew import Crew, Trial
from peer_scale.doctor.curves import Layout, ShortRun, Steps, compare, layouts
from peer_scale.doctor.machine import NO_GPU, check_setup
from peer_scale.doctor.outcome import Failed, NotTried, Outcome, attempt, join_nodes

GROUPS = ("setup", "curves", "gpu", "bandwidth")
_SEEDS = (1, 2)
_STEPS_OF_A_WATCHED_RUN = 12
_BUCKET = 100_000  # elements: more than one, so that there is something to overlap
_BENCH_ROWS = ("step-plain-loop", "head-forward", "text-512-transformers-bf16")
_BENCH_SECONDS = 900

Found = str | tuple[str, dict[str, Any]]


class Examination:
    """Runs the checks of the doctor's processes, all of which call `run` alike; all get all outcomes."""

    def __init__(
        self,
        crew: Crew,
        run: ShortRun,
        *,
        environ: Mapping[str, str],
        host: str,
        local_rank: int,
        folder: Path,
        shared_memory: Path,
        bench: Path,
        tell: Callable[[Outcome], None],
    ) -> None:
        self._crew, self._run, self._tell = crew, run, tell
        self._environ, self._host, self._local_rank = environ, host, local_rank
        self._folder, self._shared_memory, self._bench = folder, shared_memory, bench
        self._references: dict[int, Steps] = {}
        self.bandwidth: dict[str, Any] | None = None

    def run(self, groups: Collection[str]) -> list[Outcome]:
        """Run the groups of checks that are asked for, in their order."""
        parts = {"setup": self._setup, "curves": self._curves, "gpu": self._gpu, "bandwidth": self._bandwidth}
        return [outcome for name, part in parts.items() if name in groups for outcome in part()]

    def _check(self, group: str, name: str, check: Callable[[], Found]) -> Outcome:
        outcome = attempt(group, name, check)
        self._tell(outcome)
        return outcome

    def _setup(self) -> list[Outcome]:
        own = None
        if self._local_rank == 0:
            crew = self._crew
            own = check_setup(
                self._environ,
                num_ranks=crew.ranks_per_node,
                num_gpus=crew.num_gpus,
                folder=self._folder,
                shared_memory=self._shared_memory,
            )
        found = self._crew.exchange((self._host, own))
        outcomes = join_nodes([(host, of_node) for host, of_node in found if of_node is not None])
        for outcome in outcomes:
            self._tell(outcome)
        return outcomes

    def _curves(self) -> list[Outcome]:
        """Compare one GPU, then each layout of all ranks, on GPUs where there are any, with one process on the CPU."""
        reference = self._check("curves", "one process on the CPU", self._learns)
        checks: dict[str, Callable[[], Found]] = {"one GPU": self._one_gpu}
        for layout in layouts(max(2, self._crew.num_ranks)):
            checks[layout.name] = partial(self._agrees, layout)
        if reference.state == "failed":
            checks = dict.fromkeys(checks, _no_reference)
        return [reference, *(self._check("curves", name, check) for name, check in checks.items())]

    def _learns(self) -> str:
        steps = self._reference(_SEEDS[0])
        name = next(name for name in steps[0] if name.endswith("_loss"))  # the generator's; the others set in later
        first, last = steps[0][name], steps[-1][name]
        line = f"{len(steps)} steps, {name} went from {first:.4f} to {last:.4f}"
        if len(steps) > 1 and not last < first:
            raise Failed(line, {"found": list(steps)})
        return line

    def _one_gpu(self) -> str:
        if not self._crew.num_gpus:
            raise NotTried(NO_GPU)
        return f"{self._compared(None, Trial('curve', ranks=1))} of one process on the CPU"

    def _agrees(self, layout: Layout) -> str:
        ranks = self._crew.num_ranks
        if ranks == 1:
            raise NotTried("one rank" + (" (one GPU)" if self._crew.num_gpus == 1 else ""))
        if not layout.suits(ranks):
            raise NotTried(f"{ranks} ranks cannot be shared out so")
        where = "on GPUs, NCCL" if self._crew.num_gpus else "on CPUs, gloo"
        return f"{self._compared(layout, Trial('curve'))} of one process; {where}"

    def _compared(self, layout: Layout | None, trial: Trial) -> str:
        """Compare a curve with the reference; where they part, once more with another seed.

        Layouts and devices round otherwise, so that one draw of some ten thousand falls on another token and the curves
        part there; those of two seeds do not.
        """
        parted = None
        for seed in _SEEDS:
            flags = tuple(self._run.flags(layout, seed=seed))
            found = self._crew.run(Trial(trial.kind, flags, trial.ranks, trial.on_cpu))
            try:
                return compare(found[0], self._reference(seed))
            except Failed as failure:
                parted = parted or failure
        assert parted is not None
        raise parted

    def _reference(self, seed: int) -> Steps:
        if seed not in self._references:
            trial = Trial("curve", tuple(self._run.flags(seed=seed)), ranks=1, on_cpu=True)
            self._references[seed] = self._crew.run(trial)[0]
        return self._references[seed]

    def _gpu(self) -> list[Outcome]:
        checks: dict[str, Callable[[], Found]] = {
            "layouts on GPUs": _no_gpu,  # where there are GPUs, the group "curves" has them one by one
            "ZeRO-2 overlap on = off": self._overlap,
            "nothing waits for the device": self._synchronizations,
            "attention's kernels": self._kernels,
            "speed against others": self._speed,
        }
        if not self._crew.num_gpus:
            return [self._check("gpu", name, _no_gpu) for name in checks]
        del checks["layouts on GPUs"]
        return [self._check("gpu", name, check) for name, check in checks.items()]

    def _overlap(self) -> str:
        ranks = self._crew.num_ranks
        if ranks == 1:
            raise NotTried("one rank (one GPU)")
        layout = Layout(f"DP {ranks}")
        with_overlap, without = (
            self._crew.run(
                Trial("curve", tuple(self._run.flags(layout, overlap_comm=overlap, reduce_bucket_size=_BUCKET)))
            )[0]
            for overlap in (True, False)
        )
        return f"{compare(with_overlap, without, norm_tolerance=1e-5)} of each other, gradient norms within 1e-05"

    def _synchronizations(self) -> str:
        layout = Layout("DP")
        places = self._crew.run(Trial("synchronizations", self._watched_flags(layout)))
        found = sorted({place for of_rank in places for place in of_rank})
        if found:
            raise Failed(f"{len(found)} places of steps 5 to 7 wait for the device: {', '.join(found)}")
        return "steps 5 to 10 under torch.cuda.set_sync_debug_mode"

    def _kernels(self) -> Found:
        (found,) = self._crew.run(Trial("kernels", self._watched_flags(None), ranks=1))
        line = f"{found['attention']}; {found['launches']:,} kernels per step of peer-tiny"
        if "flash" in found["attention"] and not found["flash"]:
            raise Failed(f"{line}, none of which is flash attention", found)
        return line, found

    def _watched_flags(self, layout: Layout | None) -> tuple[str, ...]:
        flags = self._run.flags(layout, precision="bf16")
        place = flags.index("--train-iters") + 1
        return (*flags[:place], str(_STEPS_OF_A_WATCHED_RUN), *flags[place + 1 :])

    def _speed(self) -> Found:
        has_bench = self._crew.exchange(self._bench.is_file())[0]
        if not has_bench:
            raise NotTried(f"{self._bench} is not there: it is part of a checkout")
        found = self._crew.exchange(_run_bench(self._bench, self._run.folder) if self._crew.is_first else None)[0]
        assert found is not None
        if isinstance(found, str):
            raise Failed(found)
        rows = ", ".join(f"{row['row']} {row['ratio']:.2f}" for row in found)
        return f"peer's time over ours: {rows}", {"rows": found}

    def _bandwidth(self) -> list[Outcome]:
        return [self._check("bandwidth", "messages between ranks", self._messages)]

    def _messages(self) -> Found:
        if self._crew.num_ranks == 1:
            raise NotTried("one rank")
        for rank, local_rank, ranks_per_node in self._crew.exchange(self._crew.place):
            if ranks_per_node != self._crew.ranks_per_node:
                raise NotTried("nodes have unequal numbers of ranks")
            if local_rank != rank % ranks_per_node:
                raise NotTried("neighbouring ranks are on different nodes: srun --distribution=block")
        self.bandwidth = self._crew.run(Trial("bandwidth"))[0]
        figures = {
            "within a node": self.bandwidth["intra_bandwidth"],
            "between nodes": self.bandwidth["inter_bandwidth"],
        }
        told = [f"{value / 1e9:.3g} GB/s per rank {where}" for where, value in figures.items() if value is not None]
        if self.bandwidth["latency"] is not None:
            told.append(f"{self.bandwidth['latency'] * 1e6:.3g} us per message")
        return f"{', '.join(told)} ({self.bandwidth['backend']})", self.bandwidth


def _no_gpu() -> str:
    raise NotTried(NO_GPU)


def _no_reference() -> str:
    raise NotTried("there is no curve of one process to compare with")


def _run_bench(script: Path, folder: Path) -> list[dict[str, Any]] | str:
    """Run some rows of the benchmark on the first GPU; give them, or the line that says why not."""
    output = folder / "bench.json"
    command = [sys.executable, str(script), "--json", str(output), "--rows", *_BENCH_ROWS]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {name: value for name, value in os.environ.items() if name not in names and "TORCHELASTIC" not in name}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BENCH_SECONDS, env=environ, cwd=folder, check=False
        )
        if done.returncode == 0:
            return list(json.loads(output.read_text(encoding="utf-8")))
    except subprocess.TimeoutExpired:
        return f"{script} did not end in {_BENCH_SECONDS} s"
    except (OSError, ValueError) as error:
        return f"{script}: {error}"
    said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
    return f"{script} ended with exit code {done.returncode} and said: {said[0][:200]}"
