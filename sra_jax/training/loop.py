"""A run from its config to its last checkpoint: everything that happens around the train step."""

import contextlib
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from sra_jax import config as config_lib
from sra_jax import files, remote
from sra_jax.data import classes, pipeline
from sra_jax.data import registry as datasets
from sra_jax.data.captions import embedded
from sra_jax.data.dataset import Dataset
from sra_jax.distributed import compilation_cache, processes, sharding
from sra_jax.distributed.devices import check_devices, memory_bytes
from sra_jax.errors import RunError, UserError
from sra_jax.methods.health import Watch, health
from sra_jax.methods.registry import noisier_teachers
from sra_jax.runs import CONFIG, class_names, environment, latent_means, wandb_log
from sra_jax.runs import checkpoints as checkpoints_lib
from sra_jax.runs import metrics as metrics_lib
from sra_jax.runs.checkpoints import UNCHECKED, Checkpoints
from sra_jax.runs.state import TrainState, sampled
from sra_jax.runs.warm_start import start_from
from sra_jax.sampling import pictures
from sra_jax.sampling.generation import Generator
from sra_jax.training import fitting
from sra_jax.training.clock import Clock
from sra_jax.training.evaluation import TrainingEvaluation
from sra_jax.training.profiler import FOLDER as PROFILE
from sra_jax.training.profiler import Profiler
from sra_jax.training.program import Program, abstract_batch, build
from sra_jax.training.step import Metrics

PREVIEW_SEED = 0


def train(config: ConfigDict, workdir: Path, allow_config_change: bool = False) -> None:
    """Train, or go on training what the workdir holds, until the config's last step.

    Args:
      config: a recipe with its overrides.
      workdir: made where it does not exist, or gs://bucket/run; holds config.json, checkpoints/, samples/,
        metrics.jsonl and tensorboard/.
      allow_config_change: go on although the saved config differs in what shapes the run.

    Raises:
      UserError: before any work, where config, data or workdir cannot work, or another run is using the workdir.
      RunError: the loss or the state is no longer finite, or a file cannot be written.
      Preempted, Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    """
    began = time.perf_counter()
    check_devices()
    config_lib.check(config, jax.device_count(), sharding.platform(jax.devices()[0]))
    wandb_log.check(config.log.wandb)
    config_lib.check_workers(config.data.workers, os.cpu_count() or 1)
    compilation_cache.use(config.compilation_cache)
    workdir = remote.path(workdir)
    make_workdir(workdir)
    with _claimed(workdir) as lock, processes.Watch(workdir / ".processes"):
        _train(config, workdir, allow_config_change, lock, began)


def _train(
    config: ConfigDict, workdir: Path, allow_config_change: bool, lock: files.Lock | None, began: float
) -> None:
    say = print if jax.process_index() == 0 else _silent
    started = holds_run(config, workdir, allow_config_change, say)
    processes.wait_for_all("workdir")  # before any of them writes there
    dataset = datasets.training_set(config)
    learned = class_names.read(workdir, config.data.num_classes) if started else None
    classes.check_same(learned, dataset.class_names, "the training set")
    check_teacher(config)
    steps = config_lib.total_steps(config, len(dataset.source))

    history = metrics_lib.read(workdir) if jax.process_index() == 0 else []
    checkpoints = Checkpoints(workdir, keep=config.keep, keep_every=config.keep_every)
    try:
        finished = max(checkpoints.steps(), default=0) >= steps
        memory = None if finished else memory_of(config)
        if jax.process_index() == 0 and not finished:
            wandb_log.check_account(config.log.wandb)
        aside = None
        if memory:  # before anything is compiled: these find out which weights or images are missing
            latent_means.keep(config, dataset, workdir)
            cheapest = fitting.cheapest(config)
            mesh = _mesh(cheapest)
            aside = beside(cheapest, mesh, workdir, dataset)
        config, program, compiled = fitted(config, dataset, steps, memory, say)
        if aside and program.mesh != mesh:
            aside = None  # they lie on the devices as another mesh would have them
        state = begin(config, program, checkpoints, workdir, say, started)
        _write_config(config, workdir, dataset)
        if int(state.step) >= steps:
            say(f"nothing to do: step {int(state.step)} of {steps} is saved; --config.steps={2 * steps} trains on")
        else:
            latent_means.keep(config, dataset, workdir)
            _describe(config, program, dataset, steps, say)
            _advise(config, dataset, say)
            _say_kept(config, say)
            clock = Clock(config, began, history, int(state.step))
            with processes.Preemption() as preemption, _out_of_memory(config, dataset, steps, memory, checkpoints):
                aside = aside or beside(config, program.mesh, workdir, dataset)
                _run(
                    config, program, compiled, checkpoints, state, dataset, steps, workdir, preemption, lock, clock,
                    [record for record in history if record["step"] <= int(state.step)], *aside,
                )  # fmt: skip
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        checkpoints.wait()
        raise RunError(
            f"{what}; {checkpoints.newest()}. Make room or mend the disk, and start the same command again"
        ) from error
    finally:
        checkpoints.close()
    _say_where(config, workdir, say)


def memory_of(config: ConfigDict) -> int | None:
    """Bytes that a step may use on a device; None where neither the config nor the device says."""
    return round(config.device_memory * 1e9) or memory_bytes()


def fitted(
    config: ConfigDict, dataset: Dataset, steps: int, memory: int | None, say: Callable[..., None]
) -> tuple[ConfigDict, Program, jax.stages.Compiled | None]:
    """The config with nothing left open, its program and, where the memory is known, its compiled step.

    Raises:
      UserError: the step does not fit into the memory, and what would.
    """
    if memory is None:
        config = fitting.cheapest(config)
        return config, build(config, _mesh(config), dataset, steps), None
    attempt = _attempt(dataset, steps, memory)
    if not fitting.is_open(config):
        found = attempt(config)
        if not found.fits:
            raise UserError(_what_fits(config, dataset, steps, memory, found.peak))
        return config, *found.result
    say("compiling the step, to see what fits")
    chosen, found = fitting.choose(
        config, jax.device_count(), memory, attempt, say, slices=sharding.slice_count(), gpu=sharding.is_gpu()
    )  # fmt: skip
    return chosen, *found.result


def _mesh(config: ConfigDict) -> Mesh:
    return sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))


def _attempt(dataset: Dataset, steps: int, memory: int) -> Callable[[ConfigDict], fitting.Attempt]:
    """Builds and compiles a config; `result` is the program and its compiled step."""

    def attempt(config: ConfigDict) -> fitting.Attempt:
        program = build(config, _mesh(config), dataset, steps)
        found = fitting.compile_step(program, abstract_batch(dataset, config.batch_size, program.mesh), memory)
        return dataclasses.replace(found, result=(program, found.result))

    return attempt


def _what_fits(config: ConfigDict, dataset: Dataset, steps: int, memory: int, peak: int | None) -> str:
    """One line on a step that does not fit: what it needs, and the flags with which it would fit."""
    needs = f"the step needs {fitting.gigabytes(peak) if peak else 'more than there is'} a device"
    there = f"out of memory: {needs}, of {fitting.gigabytes(memory)}"
    try:
        chosen, found = fitting.choose(
            fitting.opened(config), jax.device_count(), memory, _attempt(dataset, steps, memory), _silent, below=peak,
            slices=sharding.slice_count(), gpu=sharding.is_gpu(),
        )  # fmt: skip
    except UserError as error:
        return f"{there}; {error}"
    settings = {key: fitting.value(chosen, key) for key in fitting.KEYS}
    takes = f" ({fitting.gigabytes(found.peak)})" if found.peak else ""
    return f"{there}; this fits{takes}: {fitting.flags(settings)}"


@contextlib.contextmanager
def _out_of_memory(
    config: ConfigDict, dataset: Dataset, steps: int, memory: int | None, checkpoints: Checkpoints
) -> Iterator[None]:
    """A `RunError` of one line in the place of what the compiler or a device says when the memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not fitting.is_out_of_memory(error):
            raise
        checkpoints.wait()
        found = _attempt(dataset, steps, memory or sys.maxsize)(config)
        limit = memory or found.peak or sys.maxsize
        raise RunError(
            f"{_what_fits(config, dataset, steps, limit, found.peak)}. {checkpoints.newest()}"
        ) from error


def check_teacher(config: ConfigDict) -> None:
    """Raises `UserError` where the method would show its teacher a noisier input than its student."""
    methods, process = config_lib.methods_of(config), config_lib.process_of(config)
    if not methods.teaching:
        return
    noisier = noisier_teachers(methods, process, config_lib.transformer_of(config), jax.random.key(config.seed))
    if noisier.any():
        raise UserError(
            f"method.name={methods.name!r} with process.name={config.process.name!r} shows the teacher a noisier input "
            f"than the student ({float(noisier.mean()):.0%} of tokens): time must grow with the noise"
        )


def _silent(*_: Any) -> None:
    """Processes other than the first print nothing."""


def make_workdir(workdir: Path) -> None:
    """Make the folder where it is not there.

    Raises:
      UserError: it cannot be written, or holds something else under a name that a run uses.
    """
    if remote.is_address(workdir):
        checkpoints_lib.check_writable("--workdir", workdir)
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write_test_{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose a folder that you may write to"
        ) from error
    for name in (CONFIG, metrics_lib.FILE, environment.FILE):
        files.check_plain(workdir / name)
    for name in ("checkpoints", "damaged_checkpoints", "samples", "evaluation", metrics_lib.EVENTS):
        files.check_plain(workdir / name, folder=True)


@contextlib.contextmanager
def _claimed(workdir: Path) -> Iterator[files.Lock | None]:
    """The workdir's lock, which process 0 holds for all; the others get None.

    Raises:
      UserError: on every process, where another run holds it.
    """
    with contextlib.ExitStack() as stack:
        lock, refusal = None, None
        if jax.process_index() == 0:
            try:
                lock = stack.enter_context(files.locked(workdir, "choose another --workdir"))
            except UserError as error:
                refusal = error
        if not processes.all_agree(refusal is None):
            raise refusal or UserError(f"--workdir={workdir} is another run's: see the message of process 0")
        yield lock


def holds_run(config: ConfigDict, workdir: Path, allow_config_change: bool, say: Callable[..., None]) -> bool:
    """Whether the workdir holds a run of this config, checked to be the same.

    Raises:
      UserError: the folder holds something else, another config's run, or one of an environment with other numbers.
    """
    if not (workdir / CONFIG).exists():
        if (workdir / "checkpoints").exists() and any((workdir / "checkpoints").iterdir()):
            raise UserError(f"--workdir={workdir} holds checkpoints but no {CONFIG}; choose another --workdir")
        return False
    saved = config_lib.read(workdir / CONFIG)
    tracked, wanted = ({one.name for one in config_lib.profiles_of(each)} for each in (saved, config))
    if tracked != wanted:
        raise UserError(
            f"--workdir={workdir} holds a run with ema.profiles={saved.ema.profiles!r}, not {config.ema.profiles!r}: "
            "an average of the past cannot begin later. Use its own, or begin a new run with --config.init_from"
        )
    changed = config_lib.differences(saved, config)
    if changed and not allow_config_change:
        raise UserError(
            f"--workdir={workdir} holds a run of another config; it differs in\n  " + "\n  ".join(changed)
            + "\nUse another --workdir, the same values, or --allow_config_change to go on with the new ones"
        )  # fmt: skip
    settings, others = environment.differences(workdir)
    if settings and not allow_config_change:
        raise UserError(
            f"--workdir={workdir} holds a run that was trained under other settings of JAX, which change its numbers:"
            "\n  " + "\n  ".join(settings) + "\nSet the environment as it was (JAX_ENABLE_X64=0 and the like), or "
            "--allow_config_change to go on with this one"
        )
    if settings or others:
        say("going on in another environment than before: " + "; ".join(settings + others))
    return True


def _write_config(config: ConfigDict, workdir: Path, dataset: Dataset) -> None:
    if jax.process_index() == 0:
        files.write_text(workdir / CONFIG, config_lib.to_json(config) + "\n")
        class_names.write(workdir, dataset.class_names)
        environment.write(workdir)


def begin(
    config: ConfigDict, program: Program, checkpoints: Checkpoints, workdir: Path, say: Callable[..., None],
    started: bool,
) -> TrainState:
    """The state to go on from: the newest checkpoint that can be read, or a new one."""
    found = checkpoints.restore_newest(program.state)
    if found is None:
        if started:
            say(f"no checkpoint in {workdir} yet: starting at step 0")
        if jax.process_index() == 0:
            metrics_lib.keep_until(workdir, 0)
        state = program.init(jax.random.key(config.seed))
        if config.init_from:
            state, message = start_from(config, state)
            say(message)
        return state
    for message in found.damaged:
        say(f"{message}; it now lies in {workdir / 'damaged_checkpoints'}, and the one before it is used")
    step = found.meta["step"]
    if jax.process_index() == 0:
        metrics_lib.keep_until(workdir, step)
    if not found.checked:
        say(f"the checkpoint of step {step} {UNCHECKED}; the next ones will have them")
    say(f"resuming {workdir} at step {step}")
    return found.state


def _advise(config: ConfigDict, dataset: Dataset, say: Callable[..., None]) -> None:
    if dataset.stable_diffusion is not None:
        for method in config_lib.methods_of(config):
            if advice := method.advice(dataset.stable_diffusion):
                say(advice)


def _say_kept(config: ConfigDict, say: Callable[..., None]) -> None:
    if not config.keep_every and any(one.width is not None for one in config_lib.profiles_of(config)):
        say(
            f"keep_every=0: power functions of other lengths can be made from the newest {config.keep} checkpoints only"
        )


def _describe(config: ConfigDict, program: Program, dataset: Dataset, steps: int, say: Callable[..., None]) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(program.state.params["model"]))
    say(
        f"{config.name}: {count / 1e6:.2f}M parameters, {len(dataset.source):,} examples, {steps:,} steps of "
        f"{config.batch_size} on {jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    )
    if dataset.null is None:
        say(classes.described(dataset.num_classes, dataset.class_names))
    if dataset.left_out:
        say(f"left out of {config.data.path}: {dataset.left_out}")


def _say_where(config: ConfigDict, workdir: Path, say: Callable[..., None]) -> None:
    prompt = f' --prompt="{config.sampling.preview_prompts[0]}"' if config_lib.tells_captions(config) else ""
    sample = (
        f"python tools/sample.py --workdir={workdir}{prompt} --num_samples=1000 --output=samples.npz --grid=grid.png"
    )
    samples = sorted((workdir / "samples").glob("step_*.png"))
    say(
        f"done. In {workdir}:\n"
        f"  checkpoints/    the newest {config.keep}: params, EMA, optimizer, position in the data\n"
        f"  samples/        {samples[-1].name if samples else 'no previews were asked for'}\n"
        f"  metrics.jsonl   one line every {config.log_every} steps; tensorboard/ holds the same\n"
        f"  config.json     the recipe as it was run\n"
        f"sample from it: {sample}"
    )


def _run(
    config: ConfigDict, program: Program, compiled: jax.stages.Compiled | None, checkpoints: Checkpoints,
    state: TrainState, dataset: Dataset, steps: int, workdir: Path, preemption: processes.Preemption,
    lock: files.Lock | None, clock: Clock, records: Sequence[Mapping[str, float]], previews: "Previews | None",
    evaluation: TrainingEvaluation | None,
) -> None:
    """The hot loop. The host runs ahead of the devices: it waits for them only to log, to preview and to save."""
    first = int(state.step)
    mesh = program.mesh
    read = {
        "batch_size": config.batch_size, "seed": config.seed, "rows": sharding.process_rows(mesh, config.batch_size)
    }  # fmt: skip
    stream = pipeline.batches(dataset.source, **read, start=first, workers=config.data.workers)
    bar = tqdm(
        total=steps, initial=first, desc="compiling", unit="step", disable=jax.process_index() != 0,
        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )  # fmt: skip
    embed = embedded(dataset.text, mesh, config_lib.DTYPES[config.dtype])
    if compiled is None:
        compiled = program.train_step.lower(program.state, abstract_batch(dataset, config.batch_size, mesh)).compile()
    writer = metrics_lib.Writer(workdir, _further(config, workdir)) if jax.process_index() == 0 else None
    profiler = Profiler(config, workdir / PROFILE)
    journal = Journal(
        config, clock, writer, bar, checkpoints, records,
        lambda step: pipeline.non_finite(dataset.source, **read, batch=step - 1),
    )  # fmt: skip

    def save(step: int) -> None:
        journal.read()  # a state is saved only once its losses are known to be finite
        if writer:
            writer.sync()  # the log reaches at least as far as the checkpoints
        if lock:
            lock.check()
        position = {"next_batch": step}  # all the state that the stream of batches has
        with clock.part("saving"):
            checkpoints.save(state, {"step": step, "config": config.to_dict(), "data": position})

    bar.set_description("training")
    batch = None
    preemption.begin()
    try:
        for step in range(first, steps):
            try:
                with clock.part("data"):
                    batch = embed(sharding.put_batch(next(stream), mesh))
            except pipeline.WorkerLost as lost:
                if jax.process_count() == 1 and step > first and step % config.checkpoint_every:
                    save(step)
                    checkpoints.wait()
                raise RunError(f"{lost}. {checkpoints.newest()}; the same command goes on from there") from lost
            profiler.before(step + 1)
            # nothing moves between host and devices unasked
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, metrics = compiled(state, batch)
            journal.add(step + 1, metrics)
            if profiler.after(step + 1, metrics):
                journal.read()
                bar.write(f"steps {step + 2 - config.profile.steps} to {step + 1} are traced in {workdir / PROFILE}")
                journal.restart_clock()
            bar.update()
            last, leaving = step + 1 == steps, preemption.due(step + 1)
            if last or leaving or (step + 1) % config.checkpoint_every == 0:
                save(step + 1)
            if leaving and not last:
                checkpoints.wait()
                raise preemption.notice(f"step {step + 1} of {steps} is saved")
            if previews and (last or (step + 1) % config.sample_every == 0):
                journal.read()
                picture = previews.write(sampled(config, state), step + 1)
                if writer:
                    writer.image(step + 1, "samples", picture)
                journal.restart_clock()
            if evaluation and (last or (step + 1) % config.evaluation.every == 0):
                journal.read()
                measured = evaluation.measure(sampled(config, state), step + 1)
                if writer:
                    writer.write(step + 1, measured)
                journal.restart_clock()
        checkpoints.wait()
    finally:
        profiler.close()
        stream.close()
        batch = None
        gc.collect()  # only then JAX gives the last batch back, which may lie in memory that workers share
        bar.close()
        if writer:
            writer.close()


def beside(
    config: ConfigDict, mesh: Mesh, workdir: Path, dataset: Dataset
) -> "tuple[Previews | None, TrainingEvaluation | None]":
    """What a run makes besides its steps, where its config asks for it.

    Raises:
      UserError: weights or images for it are missing.
    """
    previews = Previews(config, mesh, workdir) if config.sample_every else None
    evaluation = (
        TrainingEvaluation(config, mesh, workdir, dataset.class_names) if config.evaluation.every else None
    )  # fmt: skip
    return previews, evaluation


def _further(config: ConfigDict, workdir: Path) -> list[wandb_log.Writer]:
    """Where metrics are written beside the workdir."""
    if not config.log.wandb:
        return []
    return [wandb_log.Writer(config.log.wandb, config.name, workdir, config.to_dict())]


class Journal:
    """Metrics on their way from the devices to the file, read one step late so that the devices never wait.

    Args:
      config: the run's.
      clock: of the run.
      writer: of the file, on process 0.
      bar: shows what is written.
      checkpoints: whose last save an error message names.
      records: what the run has logged before.
      non_finite: `non_finite(step)` names the examples of a step that hold NaN or infinite values.
    """

    def __init__(
        self, config: ConfigDict, clock: Clock, writer: metrics_lib.Writer | None, bar: tqdm, checkpoints: Checkpoints,
        records: Sequence[Mapping[str, float]], non_finite: Callable[[int], list[str]],
    ):
        self._config, self._clock, self._writer, self._bar = config, clock, writer, bar
        self._checkpoints = checkpoints
        self._watch = Watch(config_lib.methods_of(config), records)
        self._non_finite = non_finite
        self._pending: list[tuple[int, Metrics]] = []
        self._due = False
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what is not training."""
        self._clock.restart()

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a dispatched step; read the older ones where a logged step is among them."""
        if self._due:
            self.read()
        logged = step % self._config.log_every == 0
        self._pending.append((step, metrics if logged else {k: metrics[k] for k in ("loss", "grad_norm")}))
        self._due = logged

    def read(self) -> None:
        """Wait for all that was added, check it and write the logged steps.

        Raises:
          RunError: a loss or gradient is not finite, or the last save has failed.
        """
        pending, self._pending, self._due = self._pending, [], False
        with self._clock.part("device"):
            values = jax.device_get([metrics for _, metrics in pending])
        self._clock.tick(len(pending))
        for (step, _), metrics in zip(pending, values, strict=True):
            for name in ("loss", "grad_norm"):
                if not np.isfinite(metrics[name]):
                    self._stop(name, metrics[name], step)
            if step % self._config.log_every == 0:
                with self._clock.part("logging"):
                    self._write(step, metrics)
                self.restart_clock()
                self._checkpoints.check()

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        record = {name: float(value) for name, value in sorted(metrics.items()) if name != "samples"}
        samples = metrics["samples"]
        record |= health(samples)
        warnings = self._watch.look({"step": step, **record}, samples)
        record |= dict.fromkeys(warnings, 1.0)
        record |= self._clock.report()
        terms = {name.removesuffix("/loss"): value for name, value in record.items() if name.endswith("/loss")}
        if "loss_alignment" in record:
            terms["alignment"] = record["loss_alignment"]
        shown = {name: f"{value:.4f}" for name, value in {"denoising": record["loss_denoising"], **terms}.items()}
        self._bar.set_postfix(shown, refresh=False)
        if self._writer:
            for warning in warnings.values():
                self._bar.write(f"warning: {warning}", file=sys.stderr)
            self._writer.write(step, record)

    def _stop(self, name: str, value: float, step: int) -> None:
        self._checkpoints.wait()
        if damaged := self._non_finite(step):
            raise RunError(
                f"{name} is {value} at step {step}, because the training set holds NaN or infinite values there: "
                f"{'; '.join(damaged)}. tools/prepare_latents.py --verify names all such examples"
            )
        raise RunError(
            f"{name} is {value} at step {step}; {self._checkpoints.newest()}. Only finite states are saved, nothing "
            "of the later steps was. A lower optimizer.learning_rate, optimizer.clip_norm=1, or dtype=float32 usually "
            "helps"
        )


class Previews:
    """samples/step_*.png: one row a class or prompt, from the EMA, with the config's sampler and guidance."""

    def __init__(self, config: ConfigDict, mesh: Mesh, workdir: Path):
        sampling = config.sampling
        self._columns = sampling.preview_per_class
        if config_lib.tells_captions(config):
            rows: Sequence[int | str] = sampling.preview_prompts
        else:
            rows = range(min(sampling.preview_classes, config.data.num_classes))
        self._labels = [label for label in rows for _ in range(self._columns)]
        self._generator = Generator(
            config, mesh, datasets.decoder(config.data), batch_size=len(self._labels), seed=PREVIEW_SEED,
            means=latent_means.read(config, workdir),
        )  # fmt: skip
        self._folder = workdir / "samples"

    def write(self, ema: Mapping[str, Any], step: int) -> np.ndarray:
        """Make the grid of this step, write it (process 0) and return it, (H,W,C) uint8."""
        batches = self._generator.images({"model": ema["model"]}, len(self._labels), self._labels)
        images = np.concatenate([images for images, _ in batches])
        picture = pictures.grid(images, self._columns)
        if jax.process_index() == 0:
            files.write_png(self._folder / f"step_{step:07d}.png", picture)
        return picture
