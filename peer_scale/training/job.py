"""One training run from its command line to its last step: everything around the loop."""

import argparse
import atexit
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from peer_scale.checkpoints.folder import CheckpointFolder
from peer_scale.checkpoints.identity import with_split_of
from peer_scale.checkpoints.loading import load_checkpoint
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import Sections, sections_of, split_of
from peer_scale.checkpoints.state import TrainingState, require_supported_offload
from peer_scale.checkpoints.writer import CheckpointWriter
from peer_scale.errors import StoppedEarly, UserError
from peer_scale.host_memory import keep_freed_memory
from peer_scale.lifetime import end_with_parent, show_stacks_on_signal
from peer_scale.models.heads import MaskedLMHead
from peer_scale.objectives.task import PretrainingTask
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.parallel.cpu_binding import bind_near_gpu
from peer_scale.parallel.environment import ProcessEnvironment, default_num_threads
from peer_scale.parallel.initialization import count_parameters, initialize_weights
from peer_scale.parallel.topology import Topology, build_topology, init_process_group
from peer_scale.pipeline.pair_groups import PairGroups
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.runner import PipelineRunner
from peer_scale.pipeline.search import choose_placement
from peer_scale.samples.loader import end_workers, micro_batches
from peer_scale.samples.shares import BatchPlan
from peer_scale.settings.config_file import run_yaml
from peer_scale.settings.resolve import resolve
from peer_scale.settings.run import OutputConfig, RunConfig
from peer_scale.storage import named_if_unwritable
from peer_scale.training.callbacks.checkpointing import Checkpointing
from peer_scale.training.callbacks.closing import ClosingSummary
from peer_scale.training.callbacks.console import ProgressLine
from peer_scale.training.callbacks.reporting import MetricsFile, MonitorEvents
from peer_scale.training.callbacks.stopping import StopAfter, StopOnInterrupt, StopOnSignal, StopSignals
from peer_scale.training.callbacks.validation import Validation
from peer_scale.training.callbacks.watchdog import Watchdog
from peer_scale.training.compilation import check_compiler
from peer_scale.training.data import Corpus, choose_num_workers, cut_into_samples, open_text, plan_batches
from peer_scale.training.engine import build_engine, check_precision
from peer_scale.training.metering import Meter, device_peak
from peer_scale.training.run_folders import METRICS, RunFolders
from peer_scale.training.runner import Runner, WholeModelRunner
from peer_scale.training.starting_point import StartingPoint, find_sound_start
from peer_scale.training.summary import startup_summary
from peer_scale.training.trainer import Callback, Trainer

_LAUNCHERS_THAT_ARE_PARENTS = ("torchrun", "deepspeed")  # of the ranks; killed, they leave them alone
_SAMPLES_FOR_UNIGRAMS = 4096


def run_job(args: argparse.Namespace, environment: ProcessEnvironment) -> None:
    """Train as the flags say; raises UserError (on all ranks alike) for bad input."""
    notify = (lambda line: print(f"notice: {line}", flush=True)) if environment.rank == 0 else None
    run = resolve(args, environment.world_size, notify=notify)
    num_threads = run.num_threads
    if num_threads is None:
        num_threads = default_num_threads(environment, os.environ)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    device = init_process_group(environment)
    if device.type == "cpu":
        keep_freed_memory()
    atexit.register(end_workers)
    show_stacks_on_signal()
    if environment.launcher in _LAUNCHERS_THAT_ARE_PARENTS:
        end_with_parent(os.getppid(), signal.SIGTERM)
    try:
        coordinator = RankCoordinator()
        coordinator.everyone(lambda: check_precision(run.training.precision))
        train(run, arrange_ranks(run, device), coordinator)
    finally:
        dist.destroy_process_group()


def arrange_ranks(run: RunConfig, device: torch.device) -> Topology:
    """Give the grid that the run asks for, of all ranks of the default group."""
    return build_topology(
        device,
        tensor_parallel=run.tensor_parallel,
        pipeline_parallel=run.pipeline_parallel,
        sequence_parallel=run.sequence_parallel,
    )


def train(run: RunConfig, topology: Topology, coordinator: RankCoordinator, watching: Sequence[Callback] = ()) -> None:
    """Train in the process groups that are there; `watching` are told of each step after the run's own callbacks.

    Raises:
        UserError, TrainingError: on all ranks alike.
        StoppedEarly: on all ranks alike, where the run was saved before its last step; at a signal on its ranks.
    """
    if run.output.save is not None or run.output.load is not None or run.output.init_from is not None:
        require_supported_offload(run.deepspeed)
    folders = RunFolders(run.output)
    with StopSignals(active=run.output.exit_signal_handler and run.output.save is not None) as signals:
        try:
            coordinator.first_rank(folders.claim)
            with _watchdog(run.output) as watchdog:
                _train(run, topology, coordinator, folders, signals, watchdog, watching)
        finally:
            folders.release()


def _train(
    run: RunConfig,
    topology: Topology,
    coordinator: RankCoordinator,
    folders: RunFolders,
    signals: StopSignals,
    watchdog: Watchdog,
    watching: Sequence[Callback],
) -> None:
    say: Callable[[str], None] = print if topology.is_first_rank else _say_nothing
    store, tokenizer = coordinator.one_by_one(lambda: open_text(run, show_progress=topology.is_first_rank))
    run = replace(run, model=replace(run.model, vocab_size=tokenizer.vocab_size))
    cpus = bind_near_gpu(topology.device, coordinator)  # only now: text is tokenised on all CPUs
    if cpus is not None and run.num_threads is None:
        torch.set_num_threads(min(torch.get_num_threads(), cpus.num_cores))
    sections = sections_of(run, topology, data_fingerprint=store.fingerprint, tokenizer_digest=tokenizer.digest)
    tensor_parallel = topology.tensor_parallel
    start = find_sound_start(run.output, sections, tensor_parallel, folders, coordinator, say)
    if _is_done(run, start, say):
        return
    if start.manifest is not None and not start.only_weights:
        sections = with_split_of(start.manifest, sections)
    corpus = coordinator.everyone(lambda: cut_into_samples(run, store, tokenizer, split_of(sections)))
    coordinator.first_rank(lambda: folders.prepare_logs(start.run, start.step, sections, run_yaml(run), say))

    placement = place_stages(run) if topology.size("pp") > 1 else None
    part = placement.stages[topology.rank("pp")] if placement else None
    task = PretrainingTask(run.model, run.objective, tensor_parallel, part)
    initialize_weights(
        task,
        seed=run.seed,
        std=run.model.init_std,
        vocab_size=run.model.vocab_size,
        tensor_parallel=tensor_parallel,
        residual_scale=run.model.residual_init_scale,
        by_width=run.model.width_scaled_init,
    )
    if run.model.unigram_output_bias and start.folder is None:
        counts = coordinator.everyone(lambda: corpus.training.token_counts(_SAMPLES_FOR_UNIGRAMS))
        for head in (module for module in task.modules() if isinstance(module, MaskedLMHead)):
            head.begin_with_frequencies(torch.from_numpy(counts))
    if run.training.compile:
        coordinator.everyone(lambda: check_compiler(topology.device))
    num_parameters = count_parameters(task, tensor_parallel, topology.group("pp"))
    engine = build_engine(task, run, topology)
    runner: Runner = WholeModelRunner(engine, topology)
    if placement is not None:
        runner = PipelineRunner(engine, topology, placement, PairGroups(topology, placement), run.compute_dtype)
    state = TrainingState(engine, topology, run.model.vocab_size)
    progress = Progress()
    if start.folder is not None and start.manifest is not None:
        progress = load_checkpoint(state, coordinator, start.folder, start.manifest, only_weights=start.only_weights)
    peak = device_peak(topology.device, run.compute_dtype)
    num_workers = choose_num_workers(run, cpus)
    say(startup_summary(run, topology, corpus, num_parameters, peak, cpus=cpus, num_workers=num_workers))

    plan = plan_batches(run, topology)
    warmup_steps = run.objective.warmup_steps(len(corpus.training), run.training.global_batch_size)
    trainer = Trainer(
        run,
        topology,
        coordinator,
        engine,
        runner,
        Meter(run, dist.get_world_size(), peak, skipped_steps=engine.skipped_steps),
        [
            watchdog.first,
            *_callbacks(run, topology, coordinator, corpus, plan, sections, state, warmup_steps, start, signals),
            *watching,
            watchdog.last,
        ],
        progress=progress,
        warmup_steps=warmup_steps,
    )
    steps = micro_batches(
        corpus.training,
        plan,
        first_step=progress.step,
        last_step=run.training.train_iters,
        num_workers=num_workers,
    )
    watchdog.begin_training()
    trainer.fit(steps)
    last, wanted = trainer.progress.step, run.training.train_iters
    if run.output.save is not None and last < wanted:
        raise StoppedEarly(
            f"stopped after step {last} of {wanted}, saved in {run.output.save}: the same command goes on"
        )


def _watchdog(output: OutputConfig) -> Watchdog:
    stall = output.stall_minutes
    limit = None if stall is None else 60 * stall
    return Watchdog(output.log_dir, dist.get_rank(), dist.get_world_size(), limit=limit)


def place_stages(run: RunConfig) -> Placement:
    """Divide the model into stages: by the run's settings alone, so that all ranks have the same."""
    return choose_placement(
        run.objective.graph(run.model),
        run.pipeline_parallel,
        size=run.sample_size,
        activation_checkpointing=run.training.activation_checkpointing,
    )


def _callbacks(
    run: RunConfig,
    topology: Topology,
    coordinator: RankCoordinator,
    corpus: Corpus,
    plan: BatchPlan,
    sections: Sections,
    state: TrainingState,
    warmup_steps: int,
    start: StartingPoint,
    signals: StopSignals,
) -> list[Callback]:
    output = run.output
    callbacks: list[Callback] = []
    if output.eval_interval is not None and corpus.validation is not None:
        callbacks.append(Validation(corpus.validation, plan, output.eval_interval, output.eval_iters))
    if topology.is_first_rank:
        callbacks.append(ProgressLine(run, start.step, run.objective.notices(warmup_steps)))
    callbacks += coordinator.everyone(lambda: _reporting(run, start.step) if topology.is_first_rank else [])
    if output.exit_duration_in_mins is not None:
        callbacks.append(StopAfter(output.exit_duration_in_mins))
    callbacks.append(StopOnSignal(signals))
    if output.save is not None:
        kept = CheckpointFolder(
            output.save, output.keep_last, output.keep_every, run=start.run, resumed=start.saving_in(output.save)
        )
        writer = CheckpointWriter(
            output.save, kept, state, coordinator, sections, corpus.tokenizer, in_background=output.async_save
        )
        callbacks.append(Checkpointing(writer, output.save_interval))
    if topology.is_first_rank:
        callbacks.append(ClosingSummary(run, start.step))
    return [*callbacks, StopOnInterrupt(output.save)]


def _reporting(run: RunConfig, step: int) -> list[Callback]:
    log_dir = run.output.log_dir
    callbacks: list[Callback] = [MonitorEvents(log_dir, run.deepspeed)]
    if log_dir is not None:
        with named_if_unwritable(log_dir, "--log-dir"):
            callbacks.append(MetricsFile(log_dir / METRICS, step))
    return callbacks


def _is_done(run: RunConfig, start: StartingPoint, say: Callable[[str], None]) -> bool:
    """Say whether there is nothing left to do; UserError where more has been done than was asked for."""
    wanted = run.training.train_iters
    if start.step > wanted:
        raise UserError(f"--train-iters {wanted}: {start.folder} is of step {start.step} already; give more steps")
    if start.step == wanted:
        say(f"all {wanted} steps are done already: {start.folder}; a greater --train-iters goes on")
    return start.step == wanted


def _say_nothing(_: str) -> None:
    pass
