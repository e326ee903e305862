"""The run as the training loop sees it: it logs, saves checkpoints, and tells when to stop.

The main process has a `MainRun`, all others a `Run`, which writes nothing.

What Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 does while a run trains (console/signals.py has the handlers): the
first one prints "stopping after this step". At the next `stop_requested` all processes agree on it; the
loop in train.py saves a checkpoint and returns; the command to resume is printed, and the exit code is 128
+ the signal. A second one ends the process at once, after `_before_exit`; the newest checkpoint stays
valid.
After the loop, a signal only prints "finishing the results"; in `close` it raises, which ends a wait for the
server or a tracker. Before the loop it raises too, and the new run directory is removed.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator

from utils_alg1.base.errors import Alg1Error
from utils_alg1.console.signals import StopSignals
from utils_alg1.report import page, results, summary
from utils_alg1.run.job import Job
from utils_alg1.tracking.metrics_file import cut_metrics
from utils_alg1.tracking.observer import Observer
from utils_alg1.tracking.samples_file import cut_samples
from utils_alg1.tracking.trackers import start_trackers
from utils_alg1.training.checkpoint import CheckpointMetadata, CheckpointStore, quarantine_newer
from utils_alg1.training.distributed import Distributed
from utils_alg1.training.evaluation import Measurement
from utils_alg1.training.progress import Evaluation
from utils_alg1.training.runtime import memory_guard
from utils_alg1.training.trainer import Trainer
from utils_alg1.utils_output import Console
from utils_alg1.utils_run_manager import create_run, kept_origins, write_records
from utils_tensorboard.server import serve_tensorboard


class Run:
    """A run on a process that keeps nothing."""

    trainer: Trainer  # set by `training`

    def __init__(self, job: Job, dist: Distributed):
        self.job, self.dist = job, dist
        self.stop_signal = 0  # the signal that the processes have agreed to stop at
        self._signals = StopSignals()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close trackers, server, signal handlers and lock. A second call does nothing."""
        self._stack.close()

    @contextlib.contextmanager
    def training(self, trainer: Trainer) -> Iterator[None]:
        """The context of the training loop. From here to `close` a signal is a request to stop.

        Raises:
            Alg1Error: out of memory (exit code 3), or another process is gone (exit code 4).
        """
        self.trainer = trainer
        self._stack.enter_context(self._signals)
        trainer.clock.start(trainer.progress)
        with memory_guard("for the model", trainer.model.config), self.dist.connection_guard():
            yield

    def stop_requested(self) -> bool:
        """Return whether any process was asked to stop: all get the same answer from the same call."""
        ends = self.dist.parent_died or self.trainer.out_of_time
        own = self._signals.received or (signal.SIGTERM if ends else 0)
        self.stop_signal = self.dist.all_reduce_max(own)
        return self.stop_signal > 0

    def log_evaluation(self, evaluation: Evaluation) -> None:
        """Print and track an evaluation."""

    def save_checkpoint(self) -> None:
        """Save a checkpoint of this step, unless there is one."""

    def log_model(self) -> None:
        """Track what is due of the model: speed, activations, attention, embeddings, a sample."""

    def log_step(self, loss: float) -> None:
        """Track the loss and what is due of the gradients of a step, before its update."""

    @property
    def stopped_early(self) -> bool:
        """Whether a signal ended the training before it was finished."""
        return self.stop_signal > 0 and not self.trainer.finished

    def print_resume_command(self) -> None:
        """Print how to continue a run that stopped early."""

    def export(self) -> None:
        """Take part in measuring the export, which the main process writes, with the results."""
        self._measure()

    def _measure(self) -> Measurement:
        """Measure the exported weights, which the main process has: all processes take part.

        Raises:
            Alg1Error: the loss is not finite or out of memory (exit code 3), or another process is gone (4).
        """
        with self.dist.connection_guard():
            self.dist.copy_from_main(flat.tensor for flat in self.trainer.optimizer.flats)
            return self.trainer.measure()

    def print_summary(self) -> None:
        """Print what was reached, and what to type next. Call it after `close`: a tracker may fail there."""


class MainRun(Run):
    """The run on the main process: it holds the directory, checkpoints, trackers, signals and console."""

    def __init__(self, job: Job, dist: Distributed, console: Console):
        super().__init__(job, dist)
        self.console = console
        self._stop_notice = "stopping after this step"
        self._signals = StopSignals(lambda: self._stop_notice, console.interrupted, self._before_exit)
        self._server: subprocess.Popen | None = None

    def __enter__(self) -> MainRun:
        job, params, console = self.job, self.job.params, self.console
        with contextlib.ExitStack() as stack:
            # 3. Run id, and 4. run directory; a resumed run has both.
            run = job.run or create_run(params.train.runs_dir, params.train.run_tag)
            self.directory = stack.enter_context(run)
            console.log_to(run.log_path)

            # 5. Metadata.
            step, runtime = job.checkpoint.progress.step if job.checkpoint else 0, job.runtime.describe()
            saved = job.checkpoint.metadata["origins"] if job.checkpoint else {}
            self._origins = kept_origins(params, run, saved)
            files, corpus = job.config_files, job.corpus
            origin = write_records(run, params, self._origins, files, corpus, runtime, step)

            # 6. Aim, and 7. TensorBoard: both start in the background.
            state = None
            if checkpoint := job.checkpoint:
                state = checkpoint.metadata["trackers"]
                quarantine_newer(checkpoint, console.say)
                cut_metrics(run.metrics_path, checkpoint.progress.step, console.warn)
                cut_samples(run.samples_path, checkpoint.progress.step)
            hparams = params.flat() | {"vocab_size": job.corpus.tokenizer.vocab_size}
            trackers = start_trackers(run, params, hparams, origin, self._warn, state)
            self.trackers = stack.enter_context(trackers)
            if job.serve_tensorboard:
                port = params.tensorboard.port
                server = serve_tensorboard(run.path.parent, port, console.say, console.warn)
                self._server = stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Close. Raises Alg1Error (exit code 4) in place of an error due to the directory being gone."""
        is_gone = self._is_gone  # `close` may remove it too
        self.close()
        if is_gone and isinstance(error[1], Alg1Error | OSError):
            raise summary.gone(self.directory, self.dist) from error[1]

    @property
    def _is_gone(self) -> bool:
        """Whether the run's directory was moved or deleted."""
        return not self.directory.record_path.exists()

    def _warn(self, message: str) -> None:
        """Print a warning of a tracker or the observer, unless the run is gone: one error tells that."""
        if not self._is_gone:
            self.console.warn(message)

    @contextlib.contextmanager
    def training(self, trainer: Trainer) -> Iterator[None]:
        """See Run.training. Raises Alg1Error (exit code 4) also if a checkpoint could not be written.

        The hint of every error says how to continue from the newest checkpoint.
        """
        params, progress = self.job.params, trainer.progress
        self.console.block(summary.describe_start(self.directory, params, self.job.corpus, trainer))
        newest_step = progress.step if self.job.checkpoint else None
        folder, keep = self.directory.checkpoint_dir, params.train.keep_checkpoints
        self.store = CheckpointStore(folder, keep, newest_step)
        if trainer.evaluations_changed and not trainer.finished:
            self.console.warn(summary.changed_evaluations_warning(progress))
        self.observer = Observer(trainer, self.trackers, params.tensorboard, self._warn)
        try:
            with super().training(trainer), self.store:
                self.directory.is_new = False
                self.console.begin_progress(progress.step, params.train.max_iters, trainer.tokens_per_step)
                yield
                self.store.wait()
        except Alg1Error as error:
            raise summary.add_resume_hint(error, self.store.newest, self.directory, self.dist) from error
        self._stop_notice = "finishing the results"

    def _before_exit(self) -> None:
        """On a second signal: end the server, print how to continue."""
        if self._server is not None:
            self._server.kill()
        notice = summary.resume_notice(self.store.newest_step, self.directory, self.dist)
        self.console.interrupted(notice)

    def log_evaluation(self, evaluation: Evaluation) -> None:
        e = evaluation
        self.observer.log_evaluation(e)
        best = self.trainer.progress.best_step == e.step
        self.console.evaluation(e.step, e.train_loss, e.val_loss, e.learning_rate, best, self.trainer.speed)

    def save_checkpoint(self) -> None:
        if self.store.newest_step == self.trainer.step:
            return
        self.trackers.flush(self.trainer.step)
        self.trainer.clock.measure(self.trainer.progress)
        about: CheckpointMetadata = {
            "run_id": self.directory.run_id,
            "parameters": self.job.params.flat(),
            "origins": self._origins,
            "corpus_sha256": self.job.corpus.sha256,
            "trackers": self.trackers.state(),
        }
        self.store.save(self.trainer, about)

    def log_model(self) -> None:
        self.observer.log_model(self.trainer.step)

    def log_step(self, loss: float) -> None:
        """See Run.log_step. Raises Alg1Error if the last checkpoint could not be written (exit code 4)."""
        self.store.raise_if_failed()
        self.observer.log_step(loss, self.trainer.step)
        self.console.progress(self.trainer.step + 1, loss)

    def print_resume_command(self) -> None:
        step, limit = self.trainer.step, self.job.params.train.max_seconds
        reason = f" after {limit:g} seconds (max_seconds)" if self.trainer.out_of_time else ""
        command = summary.resume_command(self.directory, self.dist)
        self.console.remind(f"stopped at step {step}{reason}; continue with", command)
        self.console.remind("or end it here, with its export and report", f"{command} --finish")

    def export(self) -> None:
        run, params, console = self.directory, self.job.params, self.console
        self._exported = results.export_weights(self.trainer, self.store, run, params, console)
        if warning := summary.untrained_warning(self._exported, self.trainer.progress, params):
            console.warn(warning)
        self._measured = self._measure()
        self._samples = results.write_results(run, self.trainer, self._exported, self._measured)
        page.write_report(run, self.trainer, self._samples, console)
        results.copy_export(run, params.train.output)
        self.trackers.flush(self.trainer.step)
        self.trackers.patient = True

    def print_summary(self) -> None:
        run, params, progress = self.directory, self.job.params, self.trainer.progress
        ending = summary.describe_end(run, params, progress, self._exported, self._measured)
        commands = summary.next_commands(run, params, progress, self.trackers.working_names, self.dist)
        self.console.summary(ending, self._samples[0], commands)
