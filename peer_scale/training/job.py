"""One training run from its command line to its last step: everything around the loop."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from peer_scale.checkpoints import folder
from peer_scale.checkpoints.identity import check_identity, layout_changes
from peer_scale.checkpoints.loading import load_checkpoint
from peer_scale.checkpoints.manifest import Manifest
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import Sections, sections_of
from peer_scale.checkpoints.state import TrainingState, require_supported_offload
from peer_scale.checkpoints.writer import CheckpointWriter
from peer_scale.host_memory import keep_freed_memory
from peer_scale.objectives.engine import Engine
from peer_scale.objectives.task import PretrainingTask
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.parallel.environment import ProcessEnvironment, default_num_threads
from peer_scale.parallel.initialization import count_parameters, initialize_weights
from peer_scale.parallel.topology import Topology, build_topology, init_process_group
from peer_scale.pipeline.runner import PipelineRunner, num_backward_calls
from peer_scale.pipeline.schedule import Schedule, build_schedule
from peer_scale.pipeline.search import choose_placement
from peer_scale.samples.loader import BatchPlan, micro_batches
from peer_scale.settings.config_file import run_yaml
from peer_scale.settings.resolve import resolve
from peer_scale.settings.run import RunConfig
from peer_scale.storage import require_writable_folder, write_atomically
from peer_scale.training.callbacks.checkpointing import Checkpointing
from peer_scale.training.callbacks.closing import ClosingSummary
from peer_scale.training.callbacks.console import ProgressLine
from peer_scale.training.callbacks.reporting import MetricsFile, MonitorEvents
from peer_scale.training.callbacks.stopping import StopAfter, StopOnSignal
from peer_scale.training.callbacks.validation import Validation
from peer_scale.training.data import Corpus, open_data
from peer_scale.training.engine import build_engine, check_precision
from peer_scale.training.metering import Meter, device_peak
from peer_scale.training.runner import Runner, WholeModelRunner
from peer_scale.training.summary import startup_summary
from peer_scale.training.trainer import Callback, Trainer


def run_job(args: argparse.Namespace, environment: ProcessEnvironment) -> None:
    """Train as the flags say; raises UserError (on all ranks alike) for bad input."""
    notify = (lambda line: print(f"notice: {line}", flush=True)) if environment.rank == 0 else None
    run = resolve(args, environment.world_size, notify=notify)
    check_precision(run.training.precision)
    num_threads = run.num_threads
    if num_threads is None:
        num_threads = default_num_threads(environment, os.environ)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    device = init_process_group(environment)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        train(run, arrange_ranks(run, device), RankCoordinator())
    finally:
        dist.destroy_process_group()


def arrange_ranks(run: RunConfig, device: torch.device) -> Topology:
    """The grid that the run asks for, of all ranks of the default group."""
    return build_topology(
        device,
        tensor_parallel=run.tensor_parallel,
        pipeline_parallel=run.pipeline_parallel,
        sequence_parallel=run.sequence_parallel,
    )


def train(run: RunConfig, topology: Topology, coordinator: RankCoordinator) -> None:
    """Train in the process groups that are there; UserError and TrainingError come on all ranks alike."""
    say: Callable[[str], None] = print if topology.is_first_rank else _say_nothing
    coordinator.first_rank(lambda: _check_folders(run))
    corpus = coordinator.one_by_one(lambda: open_data(run, show_progress=topology.is_first_rank))
    run = replace(run, model=replace(run.model, vocab_size=corpus.tokenizer.vocab_size))
    sections = sections_of(
        run, topology, data_fingerprint=corpus.store.fingerprint, tokenizer_digest=corpus.tokenizer.digest
    )
    found = coordinator.first_rank(lambda: _find_checkpoint(run, topology, sections, say))

    pipeline = plan_pipeline(run) if topology.size("pp") > 1 else None
    part = pipeline.placement.stages[topology.rank("pp")] if pipeline else None
    tensor_parallel = topology.tensor_parallel
    task = PretrainingTask(run.model, run.objective, tensor_parallel, part)
    initialize_weights(
        task,
        seed=run.seed,
        std=run.model.init_std,
        vocab_size=run.model.vocab_size,
        tensor_parallel=tensor_parallel,
    )
    num_parameters = count_parameters(task, tensor_parallel, topology.group("pp"))
    engine, runner = _engine_and_runner(task, run, topology, pipeline)
    state = TrainingState(engine, topology, run.model.vocab_size)
    progress = load_checkpoint(state, coordinator, *found) if found else Progress()
    peak = device_peak(topology.device, run.compute_dtype)
    say(startup_summary(run, topology, corpus, num_parameters, peak))

    plan = BatchPlan(
        run.training.micro_batch_size, run.training.global_batch_size, topology.rank("dp"), topology.size("dp")
    )
    warmup_steps = run.objective.warmup_steps(len(corpus.training), run.training.global_batch_size)
    trainer = Trainer(
        run,
        topology,
        engine,
        runner,
        Meter(run, dist.get_world_size(), peak),
        _callbacks(run, topology, coordinator, corpus, plan, sections, state, progress, warmup_steps),
        progress=progress,
        warmup_steps=warmup_steps,
    )
    steps = micro_batches(
        corpus.training,
        plan,
        first_step=progress.step,
        last_step=run.training.train_iters,
        num_workers=run.data.num_workers,
    )
    trainer.fit(steps)


def _engine_and_runner(
    task: PretrainingTask, run: RunConfig, topology: Topology, pipeline: Schedule | None
) -> tuple[Engine, Runner]:
    if pipeline is None:
        engine = build_engine(task, run, topology)
        return engine, WholeModelRunner(engine, topology)
    instructions = pipeline.stages[topology.rank("pp")]
    engine = build_engine(task, run, topology, backward_calls=num_backward_calls(instructions))
    return engine, PipelineRunner(engine, topology, pipeline.placement, instructions, run.compute_dtype)


def plan_pipeline(run: RunConfig) -> Schedule:
    """Place and schedule one step: of the run's settings alone, so that all ranks have the same."""
    placement = choose_placement(
        run.objective.graph(run.model),
        run.pipeline_parallel,
        size=run.sample_size,
        activation_checkpointing=run.training.activation_checkpointing,
    )
    return build_schedule("two_pass", placement, run.num_micro_batches)


def _callbacks(
    run: RunConfig,
    topology: Topology,
    coordinator: RankCoordinator,
    corpus: Corpus,
    plan: BatchPlan,
    sections: Sections,
    state: TrainingState,
    progress: Progress,
    warmup_steps: int,
) -> list[Callback]:
    output = run.output
    callbacks: list[Callback] = []
    if output.eval_interval is not None and corpus.validation is not None:
        callbacks.append(Validation(corpus.validation, plan, output.eval_interval, output.eval_iters))
    if topology.is_first_rank:
        callbacks.append(ProgressLine(run, progress.step, run.objective.notices(warmup_steps)))
        callbacks.append(MonitorEvents(output.log_dir, run.deepspeed))
        if output.log_dir is not None:
            callbacks.append(MetricsFile(output.log_dir / "metrics.jsonl", progress.step))
            write_atomically(output.log_dir / "run.yaml", run_yaml(run).encode())
    if output.exit_duration_in_mins is not None:
        callbacks.append(StopAfter(output.exit_duration_in_mins))
    if output.exit_signal_handler:
        callbacks.append(StopOnSignal())
    if output.save is not None:
        kept = folder.CheckpointFolder(output.save, output.keep_last, output.keep_every)
        writer = CheckpointWriter(
            output.save, kept, state, coordinator, sections, corpus.tokenizer, in_background=output.async_save
        )
        callbacks.append(Checkpointing(writer, output.save_interval))
    if topology.is_first_rank:
        callbacks.append(ClosingSummary(run, progress.step))
    return callbacks


def _check_folders(run: RunConfig) -> None:
    for path, flag in ((run.output.save, "--save"), (run.output.log_dir, "--log-dir")):
        if path is not None:
            require_writable_folder(path, flag)
    if run.output.save is not None or run.output.load is not None:
        require_supported_offload(run.deepspeed)


def _find_checkpoint(
    run: RunConfig, topology: Topology, sections: Sections, say: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    if run.output.load is None:
        return None
    found = folder.newest(run.output.load)
    if found is None:
        say(f"--load {run.output.load}: no committed checkpoint there; starting fresh")
        return None
    path, manifest = found
    check_identity(path, manifest, sections, topology.tensor_parallel)
    if manifest.sections.imported is not None:
        say(f"starting from {path}: weights of {', '.join(manifest.sections.imported.values())}")
        return found
    changes = layout_changes(manifest, sections)
    step = manifest.sections.progress.step
    say(f"resuming from {path} after step {step}" + (f" under another layout ({changes})" if changes else ""))
    return found


def _say_nothing(_: str) -> None:
    pass
