"""One training run from its command line to its last step: everything around the loop."""

import argparse
import atexit
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from peer_scale.objectives.engine import Engine
from peer_scale.objectives.task import PretrainingTask
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.parallel.cpu_binding import CpuShare, bind_near_gpu
from peer_scale.parallel.environment import ProcessEnvironment, default_num_threads
from peer_scale.parallel.initialization import count_parameters, initialize_weights
from peer_scale.parallel.topology import Topology, build_topology, init_process_group
from peer_scale.pipeline.pair_groups import PairGroups
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.runner import PipelineRunner
from peer_scale.pipeline.search import choose_placement
from peer_scale.samples.examples import Batch
from peer_scale.samples.loader import end_workers, micro_batches
from peer_scale.samples.shares import BatchPlan
from peer_scale.settings.config_file import run_yaml
from peer_scale.settings.resolve import resolve
from peer_scale.settings.run import RunConfig
from peer_scale.storage import last_change, named_if_unwritable, read_json_lines
from peer_scale.training.callbacks.bad_steps import BadSteps
from peer_scale.training.callbacks.checkpointing import Checkpointing
from peer_scale.training.callbacks.closing import ClosingSummary
from peer_scale.training.callbacks.console import ProgressLine
from peer_scale.training.callbacks.profiling import Profiling
from peer_scale.training.callbacks.reporting import MetricsFile, MonitorEvents
from peer_scale.training.callbacks.run_summary import PrometheusFile, RunSummary
from peer_scale.training.callbacks.stopping import StopAfter, StopOnInterrupt, StopOnSignal, StopSignals
from peer_scale.training.callbacks.stragglers import Stragglers
from peer_scale.training.callbacks.validation import Validation
from peer_scale.training.callbacks.watchdog import Watchdog
from peer_scale.training.compilation import check_compiler
from peer_scale.training.complaints import complain
from peer_scale.training.data import Corpus, choose_num_workers, cut_into_samples, open_text, plan_batches
from peer_scale.training.engine import build_engine, check_precision
from peer_scale.training.goodput import Goodput
from peer_scale.training.metering import Meter, device_peak
from peer_scale.training.provenance import RunStart, describe_start, process_began
from peer_scale.training.rank_log import rank_log
from peer_scale.training.run_folders import (
    BAD_STEPS,
    METRICS,
    PROFILES,
    PROMETHEUS,
    RANK_LOGS,
    STARTS,
    SUMMARY,
    RunFolders,
)
from peer_scale.training.runner import Runner, WholeModelRunner
from peer_scale.training.spikes import SpikeWatch
from peer_scale.training.start_checks import SHARED_MEMORY, disk_shortage, shared_memory_shortage
from peer_scale.training.starting_point import StartingPoint, find_sound_start
from peer_scale.training.summary import startup_summary
from peer_scale.training.time_spent import TimeSpent
from peer_scale.training.trainer import Callback, Trainer
from peer_scale.training.update_guard import UpdateGuard
from peer_scale.training.way_back import WayBack

_LAUNCHERS_THAT_ARE_PARENTS = ("torchrun", "deepspeed")  # of the ranks; killed, they leave them alone
_SAMPLES_FOR_UNIGRAMS = 4096


def run_job(args: argparse.Namespace, environment: ProcessEnvironment) -> None:
    """Train as the flags say; raises UserError (on all ranks alike) for bad input."""
    began = process_began()
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
        origin = describe_start(coordinator, device, unix_time=began)
        coordinator.everyone(lambda: check_precision(run.training.precision))
        if notify is not None and device.type == "cuda" and environment.local_world_size > 1:
            shortage = shared_memory_shortage(SHARED_MEMORY, num_ranks=environment.local_world_size, has_gpus=True)
            if shortage is not None:
                notify(shortage)
        train(run, arrange_ranks(run, device), coordinator, origin=origin)
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


def train(
    run: RunConfig,
    topology: Topology,
    coordinator: RankCoordinator,
    watching: Sequence[Callback] = (),
    *,
    origin: RunStart | None = None,
) -> None:
    """Train in the process groups that are there; `watching` are told of each step after the run's own callbacks.

    `origin` says what started the run; it is found out where it is not given.

    Raises:
        UserError, TrainingError: on all ranks alike.
        StoppedEarly: on all ranks alike, where the run was saved before its last step; at a signal on its ranks.
    """
    if run.output.save is not None or run.output.load is not None or run.output.init_from is not None:
        require_supported_offload(run.deepspeed)
    if origin is None:
        origin = describe_start(coordinator, topology.device, unix_time=time.time())
    folders = RunFolders(run.output)
    with StopSignals(active=run.output.exit_signal_handler and run.output.save is not None) as signals:
        try:
            coordinator.first_rank(folders.claim)
            _train(run, topology, coordinator, folders, signals, watching, origin)
        finally:
            folders.release()


def _train(
    run: RunConfig,
    topology: Topology,
    coordinator: RankCoordinator,
    folders: RunFolders,
    signals: StopSignals,
    watching: Sequence[Callback],
    origin: RunStart,
) -> None:
    """Open the text, find where to begin, claim the logs; then train from there."""
    say: Callable[[str], None] = print if topology.is_first_rank else _say_nothing
    spent = TimeSpent(time.time() - origin.unix_time)
    store, tokenizer = coordinator.one_by_one(lambda: open_text(run, show_progress=topology.is_first_rank))
    run = replace(run, model=replace(run.model, vocab_size=tokenizer.vocab_size))
    cpus = bind_near_gpu(topology.device, coordinator)  # only now: text is tokenised on all CPUs
    if cpus is not None and run.num_threads is None:
        torch.set_num_threads(min(torch.get_num_threads(), cpus.num_cores))
    sections = sections_of(run, topology, data_fingerprint=store.fingerprint, tokenizer_digest=tokenizer.digest)
    sections = replace(sections, provenance=replace(sections.provenance, start=origin.as_json()))
    with spent.on("load"):
        start = find_sound_start(run.output, sections, topology.tensor_parallel, folders, coordinator, say)
    if _is_done(run, start, say):
        return
    if start.manifest is not None and not start.only_weights:
        sections = with_split_of(start.manifest, sections)
    corpus = coordinator.everyone(lambda: cut_into_samples(run, store, tokenizer, split_of(sections)))
    settings = run_yaml(run, origin.as_comment())
    coordinator.first_rank(lambda: folders.prepare_logs(start.run, start.step, sections, settings, say))
    coordinator.first_rank(lambda: folders.note_start(origin, start.step))
    job = _Job(run, topology, coordinator, corpus, sections, start, origin, signals, spent, cpus, say)
    with rank_log(None if run.output.log_dir is None else run.output.log_dir / RANK_LOGS, dist.get_rank()):
        _fit(job, watching)


@dataclass(frozen=True)
class _Job:
    """What is known of a run before its model is built."""

    run: RunConfig
    topology: Topology
    coordinator: RankCoordinator
    corpus: Corpus
    sections: Sections
    start: StartingPoint
    origin: RunStart
    signals: StopSignals
    spent: TimeSpent
    cpus: CpuShare | None
    say: Callable[[str], None]


def _fit(job: _Job, watching: Sequence[Callback]) -> None:
    """Build the model, load what it goes on from, and train to the last step or until the run is stopped."""
    run, topology, coordinator, start = job.run, job.topology, job.coordinator, job.start
    placement = place_stages(run) if topology.size("pp") > 1 else None
    task = _new_task(job, placement)
    num_parameters = count_parameters(task, topology.tensor_parallel, topology.group("pp"))
    engine = build_engine(task, run, topology)
    runner: Runner = WholeModelRunner(engine, topology)
    if placement is not None:
        runner = PipelineRunner(engine, topology, placement, PairGroups(topology, placement), run.compute_dtype)
    state = TrainingState(engine, topology, run.model.vocab_size)
    progress = Progress()
    if start.folder is not None and start.manifest is not None:
        with job.spent.on("load"):
            progress = load_checkpoint(
                state, coordinator, start.folder, start.manifest, only_weights=start.only_weights
            )
    peak = device_peak(topology.device, run.compute_dtype)
    num_workers = choose_num_workers(run, job.cpus)
    job.say(startup_summary(run, topology, job.corpus, num_parameters, peak, cpus=job.cpus, num_workers=num_workers))

    if run.output.save is not None and topology.is_first_rank:
        shortage = disk_shortage(run.output.save, num_parameters)
        if shortage is not None:
            complain(shortage)

    plan = plan_batches(run, topology)
    warmup_steps = run.objective.warmup_steps(len(job.corpus.training), run.training.global_batch_size)
    stall = run.output.stall_minutes
    watchdog = Watchdog(
        run.output.log_dir,
        dist.get_rank(),
        dist.get_world_size(),
        limit=None if stall is None else 60 * stall,
    )
    callbacks = _callbacks(job, plan, state, engine, warmup_steps, progress, peak)
    trainer = Trainer(
        run,
        topology,
        coordinator,
        engine,
        runner,
        Meter(run, dist.get_world_size(), peak),
        [watchdog.first, *callbacks, *watching, watchdog.last],
        progress=progress,
        warmup_steps=warmup_steps,
        spent=job.spent,
    )
    with watchdog:
        trainer.fit(
            lambda step: micro_batches(
                job.corpus.training,
                plan,
                first_step=step,
                last_step=run.training.train_iters,
                num_workers=num_workers,
            )
        )
    last, wanted = trainer.progress.step, run.training.train_iters
    if run.output.save is not None and last < wanted:
        raise StoppedEarly(
            f"stopped after step {last} of {wanted}, saved in {run.output.save}: the same command goes on"
        )


def _new_task(job: _Job, placement: Placement | None) -> PretrainingTask:
    """Make this rank's part of the model, with its initial weights."""
    run, topology = job.run, job.topology
    part = placement.stages[topology.rank("pp")] if placement else None
    task = PretrainingTask(run.model, run.objective, topology.tensor_parallel, part)
    initialize_weights(
        task,
        seed=run.seed,
        std=run.model.init_std,
        vocab_size=run.model.vocab_size,
        tensor_parallel=topology.tensor_parallel,
        residual_scale=run.model.residual_init_scale,
        by_width=run.model.width_scaled_init,
    )
    if run.model.unigram_output_bias and job.start.folder is None:
        training = job.corpus.training
        counts = job.coordinator.everyone(lambda: training.token_counts(_SAMPLES_FOR_UNIGRAMS))
        for head in (module for module in task.modules() if isinstance(module, MaskedLMHead)):
            head.begin_with_frequencies(torch.from_numpy(counts))
    if run.training.compile:
        job.coordinator.everyone(lambda: check_compiler(topology.device))
    return task


def place_stages(run: RunConfig) -> Placement:
    """Divide the model into stages: by the run's settings alone, so that all ranks have the same."""
    return choose_placement(
        run.objective.graph(run.model),
        run.pipeline_parallel,
        size=run.sample_size,
        activation_checkpointing=run.training.activation_checkpointing,
    )


def _callbacks(
    job: _Job,
    plan: BatchPlan,
    state: TrainingState,
    engine: Engine,
    warmup_steps: int,
    progress: Progress,
    peak: float | None,
) -> list[Callback]:
    run, topology, output, start = job.run, job.topology, job.run.output, job.start
    goodput = _goodput(job, progress) if topology.is_first_rank else None  # before metrics.jsonl is cut
    goes_on = start.manifest is not None and not start.only_weights
    recent = start.manifest.sections.recent if start.manifest is not None and goes_on else None
    spikes = SpikeWatch(run.training.spike_sigmas, recent)
    checkpointing = _checkpointing(job, state, spikes)
    callbacks: list[Callback] = [_bad_steps(job, plan, state, engine, spikes, checkpointing)]
    callbacks.append(Stragglers(topology, output.log_interval, job.origin.host_of_rank))
    if output.eval_interval is not None and job.corpus.validation is not None:
        callbacks.append(Validation(job.corpus.validation, plan, output.eval_interval, output.eval_iters))
    if topology.is_first_rank:
        callbacks.append(ProgressLine(run, start.step, run.objective.notices(warmup_steps)))
    callbacks += job.coordinator.everyone(lambda: _reporting(job) if topology.is_first_rank else [])
    if output.exit_duration_in_mins is not None:
        callbacks.append(StopAfter(output.exit_duration_in_mins))
    callbacks.append(StopOnSignal(job.signals))
    if checkpointing is not None:
        callbacks.append(checkpointing)
    if goodput is not None:
        callbacks += _closing(job, goodput, peak)
    return [*callbacks, *_profiling(job), StopOnInterrupt(output.save)]


def _bad_steps(
    job: _Job,
    plan: BatchPlan,
    state: TrainingState,
    engine: Engine,
    spikes: SpikeWatch,
    checkpointing: Checkpointing | None,
) -> BadSteps:
    run, coordinator = job.run, job.coordinator

    def batches_of(step: int) -> list[Batch]:
        made = micro_batches(job.corpus.training, plan, first_step=step - 1, last_step=step, num_workers=0)
        return next(made).batches

    save, log_dir = run.output.save, run.output.log_dir
    guard = None
    if run.training.precision != "fp16":
        guard = UpdateGuard(engine, goes_on=run.training.on_nan != "stop")
    way_back = None
    if save is not None and checkpointing is not None:
        way_back = WayBack(save, state, coordinator, checkpointing.settle)
    return BadSteps(
        run,
        guard,
        spikes,
        plan,
        batches_of,
        coordinator,
        folder=log_dir / BAD_STEPS if log_dir is not None and coordinator.is_first_rank else None,
        way_back=way_back,
        skipped_steps=engine.skipped_steps,
    )


def _checkpointing(job: _Job, state: TrainingState, spikes: SpikeWatch) -> Checkpointing | None:
    run, output, start = job.run, job.run.output, job.start
    if output.save is None:
        return None
    resumed = start.saving_in(output.save)
    writer = CheckpointWriter(
        output.save,
        CheckpointFolder(output.save, output.keep_last, output.keep_every, run=start.run, resumed=resumed),
        state,
        job.coordinator,
        job.sections,
        job.corpus.tokenizer,
        in_background=output.async_save,
        retry_after=output.save_retry_seconds,
    )
    return Checkpointing(
        writer,
        output.save_interval,
        saves_start=run.training.on_nan == "rollback" and resumed is None,
        max_failed=output.max_failed_saves,
        spikes=spikes if run.training.on_spike == "skip" else None,
        is_first_rank=job.coordinator.is_first_rank,
    )


def _reporting(job: _Job) -> list[Callback]:
    log_dir = job.run.output.log_dir
    callbacks: list[Callback] = [MonitorEvents(log_dir, job.run.deepspeed, run=job.start.run, step=job.start.step)]
    if log_dir is not None:
        with named_if_unwritable(log_dir, "--log-dir"):
            callbacks.append(MetricsFile(log_dir / METRICS, job.start.step))
    return callbacks


def _goodput(job: _Job, progress: Progress) -> Goodput:
    log_dir = job.run.output.log_dir
    return Goodput(
        None if log_dir is None else log_dir / SUMMARY,
        job.spent,
        began=job.origin.unix_time,
        progress=progress,
        starts=1 if log_dir is None else len(read_json_lines(log_dir / STARTS)),
        last_sign=None if log_dir is None else last_change(log_dir / METRICS),
    )


def _closing(job: _Job, goodput: Goodput, peak: float | None) -> list[Callback]:
    """Give what sums up the run."""
    run, log_dir = job.run, job.run.output.log_dir
    callbacks: list[Callback] = []
    if log_dir is not None:
        callbacks.append(RunSummary(goodput, job.topology.device, peak, run.output.save_interval))
        callbacks.append(PrometheusFile(log_dir / PROMETHEUS, run.name, goodput))
    return [*callbacks, ClosingSummary(run, job.start.step, goodput)]


def _profiling(job: _Job) -> list[Callback]:
    output, rank = job.run.output, dist.get_rank()
    steps = output.profiled_steps
    if steps is None or output.log_dir is None or rank not in output.profile_ranks:
        return []
    return [Profiling(output.log_dir / PROFILES, rank, *steps, done=job.start.step, device=job.topology.device)]


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
