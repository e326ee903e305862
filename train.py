"""Train a character-level GPT.

    python train.py                                     the reference model on data/input.txt
    python train.py --data book.txt --max-iters 2000    your own text
    python train.py --config configs/                   a folder of settings, or a file of them
    python train.py --print-config                      every value and where it came from
    python train.py --resume latest                     continue an interrupted run, to the same bytes
    python train.py --init-from model.safetensors       start from trained weights
    torchrun --standalone --nproc_per_node=2 train.py   two processes, on two GPUs or CPU cores

Everything of a run lies in runs/YYYY-MM-DD_NNN_tag/. Afterwards: python inference.py
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from parameters import due
from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.console.command_line import Options, parse_command_line
from utils_alg1.console.script import importing, run_script
from utils_alg1.console.signals import StopSignals
from utils_alg1.training.distributed import Processes, start_processes
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from parameters import Parameters
    from utils_alg1.data.corpus import Corpus
    from utils_alg1.tracking.observer import Observer
    from utils_alg1.training.checkpoint import CheckpointStore
    from utils_alg1.training.progress import Progress
    from utils_alg1.training.resume import Job, Start
    from utils_alg1.training.runtime import Runtime
    from utils_alg1.training.trainer import Trainer
    from utils_alg1.utils_config_loader import Sources


def main(argv: list[str] | None = None) -> int:
    with start_processes() as processes:
        return lead(argv, processes) if processes.first else follow(processes)


def lead(argv: list[str] | None, processes: Processes) -> int:
    """The whole script, as the only process or the first of several."""
    # 1. Command line. The heavy packages are imported after it, so that --help answers at once.
    options = parse_command_line(argv)
    console = Console(options.quiet, options.verbose)
    sources = ConfigLoader.read(options)
    params = None
    if options.starts_from_weights:
        sources.check()  # the rest once it is known what the run starts from
    else:
        params = sources.resolve()
    if params and options.print_config:
        console.configuration(params)
        return DONE
    with contextlib.closing(console), contextlib.ExitStack() as stack:
        try:
            return run_phases(options, sources, params, console, stack, processes)
        except Exception as error:
            console.log_failure(error)
            raise


def run_phases(
    options: Options,
    sources: Sources,
    params: Parameters | None,
    console: Console,
    stack: contextlib.ExitStack,
    processes: Processes,
) -> int:
    """Phases 2 to 14; what must be closed at the end, however it comes, is put on the stack.

    `params` are known by now, unless they depend on the weights that the run starts from.
    """
    with importing():
        from utils_alg1.data import corpus as corpus_module
        from utils_alg1.report import page as page_module
        from utils_alg1.report import pictures as pictures_module
        from utils_alg1.report import results as results_module
        from utils_alg1.report import summary as summary_module
        from utils_alg1.tracking import observer as observer_module
        from utils_alg1.tracking.metrics_file import cut_metrics
        from utils_alg1.tracking.trackers import start_trackers
        from utils_alg1.training import checkpoint as checkpoint_module
        from utils_alg1.training import resume as resume_module
        from utils_alg1.training import runtime as runtime_module
        from utils_alg1.utils_run_manager import create_run
        from utils_tensorboard.server import TensorBoardServer

    # 2. Configurations, checked as a whole and against the text before anything is created.
    start = resume_module.find_start(options.resume, options.init_from, sources.runs_dir, console)
    if start.run:
        stack.enter_context(start.run)
    params = params or sources.resolve(start.parameters, start.sizes)
    if options.print_config:
        console.configuration(params)
        return DONE
    splits = params.data.train_split, params.data.val_split
    results_module.check_output(params.train.output)
    runtime = runtime_module.start_runtime(
        params.train, params.flops_per_step(), processes, start.compiled_before
    )
    text_path = start.find_text(params.data.data_path, console.say)

    def check_text(n_characters: int, vocab_size: int) -> None:
        corpus_module.check_block_size(text_path, n_characters, params.model.block_size, *splits)
        params.model.check_vocab_size(vocab_size)
        runtime_module.check_memory(params, vocab_size, runtime.device)

    corpus = corpus_module.open_corpus(text_path, check_text)
    start.check(params, corpus, processes.world_size)
    if odd := corpus_module.doubt(corpus):
        console.warn(odd)
    processes.share(resume_module.Job(params, start.without_run(), corpus.path, corpus.sha256))

    # 3. Run id, and 4. run directory; a resumed run has both.
    tag = params.train.run_tag
    run = start.run or stack.enter_context(create_run(params.train.runs_dir, tag))
    console.log_to(run.log_path)

    # 5. Metadata.
    origin = results_module.write_records(run, params, sources.files, corpus, runtime)

    # 6. Aim, and 7. TensorBoard: both start in the background, fed by one fan-out.
    state = None
    if start.checkpoint:
        state = start.checkpoint.metadata["trackers"]
        checkpoint_module.set_newer_aside(start.checkpoint, console.say)
        cut_metrics(run.metrics_path, start.checkpoint.progress.step, console.warn)
    hparams = params.flat() | {"vocab_size": corpus.tokenizer.vocab_size}
    trackers = stack.enter_context(start_trackers(run, params, hparams, origin, console.warn, state))
    before_leaving = [console.restore_terminal]
    if options.serve_tensorboard:
        port = params.tensorboard.port
        server = TensorBoardServer(run.path.parent, port, console.say, console.warn)
        before_leaving.append(stack.enter_context(server).kill)

    # 8. Tokens, 9. ModelConfig, 10. model.
    trainer, progress = build_trainer(params, start, corpus, runtime, console)
    newest_step = progress.step if start.checkpoint else None
    store = checkpoint_module.CheckpointStore(run.checkpoint_dir, params.train.keep_checkpoints, newest_step)
    console.block(summary_module.describe_start(run, params, corpus, trainer, progress.step))

    # 11. The loop.
    about = {"run_id": run.run_id, "parameters": params.flat(), "corpus_sha256": corpus.sha256}
    observer = observer_module.Observer(trainer, trackers, params.tensorboard, console.warn)
    before_leaving.append(lambda: console.interrupted(summary_module.last_words(store, run, processes)))

    def leave() -> None:
        for act in before_leaving:
            act()

    notice = ["stopping after this step"]
    stops = StopSignals(lambda: notice[0], console.interrupted, leave)
    signals = stack.enter_context(stops)
    run.begun = True
    try:
        with runtime_module.memory_guard(params), processes.lost_connection(), store:
            loop(trainer, progress, observer, store, about, signals, console)
    except Alg1Error as error:
        raise summary_module.with_the_way_on(error, store, run, processes) from error
    if signals.received and progress.step < params.train.max_iters:
        way_on = summary_module.resume_command(run, processes)
        console.remind(f"stopped at step {progress.step}; go on with", way_on)
        return 128 + signals.received

    # 12. Export.
    notice[0] = "finishing the results"
    exported = results_module.export_weights(trainer, progress, store, run, params, console)
    samples = results_module.draw_samples(trainer.model, params.train.seed)
    results_module.write_results(run, progress, trainer, exported, samples)
    pictures_module.try_loss_curve(run, console)
    attended = pictures_module.try_attention_picture(run, trainer, console)
    page_module.try_page(run, samples, attended, console)
    results_module.copy_export(run, params.train.output)

    # 13. Clean up: trackers, server, lock.
    trackers.flush(progress.step)
    shown_in = trackers.working
    stack.close()

    # 14. Summary.
    ending = summary_module.describe_end(run, params, progress, exported, shown_in, processes)
    console.summary(ending, samples[0])
    return DONE


def follow(processes: Processes) -> int:
    """What every process but the first does: its share of each step, told by the first, keeping nothing."""
    from utils_alg1.data.corpus import open_corpus
    from utils_alg1.data.sources import find_corpus
    from utils_alg1.tracking import observer as observer_module
    from utils_alg1.tracking.metrics_file import Tracker
    from utils_alg1.tracking.trackers import Trackers
    from utils_alg1.training import checkpoint as checkpoint_module
    from utils_alg1.training import runtime as runtime_module

    job: Job | None = processes.share(None)
    if job is None:  # the first had nothing to train
        return DONE
    params, text_path = job.params, job.text_path
    console = Console(quiet=True)
    try:
        runtime = runtime_module.start_runtime(
            params.train, params.flops_per_step(), processes, job.start.compiled_before
        )
        if not text_path.exists():  # on a machine of its own
            text_path = find_corpus(params.data.data_path, console.say)
        corpus = open_corpus(text_path)
        if corpus.sha256 != job.sha256:
            raise Alg1Error(f"{text_path}: not the text of the first process", "copy that text here")
        trainer, progress = build_trainer(params, job.start, corpus, runtime, console)
        store = checkpoint_module.NoCheckpoints()
        silent = Trackers(Tracker(), {})
        observer = observer_module.Observer(trainer, silent, params.tensorboard, console.warn)
        signals = StopSignals(lambda: "stopping after this step")
        with signals, processes.lost_connection(), runtime_module.memory_guard(params):
            loop(trainer, progress, observer, store, {}, signals, console)
    except Alg1Error as error:
        message = f"process {processes.rank} of 0 to {processes.world_size - 1}: {error.message}"
        raise Alg1Error(message, error.hint, error.exit_code) from error
    return DONE if signals.received is None else 128 + signals.received


def build_trainer(
    params: Parameters, start: Start, corpus: Corpus, runtime: Runtime, console: Console
) -> tuple[Trainer, Progress]:
    """The model with what the run starts from, and everything that a step needs."""
    from model import BigramLanguageModel
    from utils_alg1.training import backward as backward_module
    from utils_alg1.training import progress as progress_module
    from utils_alg1.training import runtime as runtime_module
    from utils_alg1.training import seeds
    from utils_alg1.training import trainer as trainer_module

    # Memory-mapped, so that a text larger than memory serves too.
    tokens = corpus.split(params.data.train_split, params.data.val_split)
    config = dataclasses.replace(params.model, vocab_size=corpus.tokenizer.vocab_size)
    with runtime_module.memory_guard(params), runtime.processes.lost_connection():
        seeds.seed_initial_weights(params.train.seed)
        model = BigramLanguageModel(config)
        if start.initial:
            model.load_state_dict(start.initial.state_dict())
        model.vocabulary = corpus.tokenizer.vocabulary
        model.to(runtime.device)
        backward = backward_module.find_backward(model, runtime, console.say)
        trainer = trainer_module.Trainer(model, backward, tokens, params.train, runtime)
        trainer.settle()
        if start.checkpoint is None:
            return trainer, progress_module.Progress()
        start.checkpoint.load_trainer(trainer)
        return trainer, start.checkpoint.progress


def loop(
    trainer: Trainer,
    progress: Progress,
    observer: Observer,
    store: CheckpointStore,
    about: dict[str, Any],
    signals: StopSignals,
    console: Console,
) -> None:
    """Evaluate, save, take a step; until max_iters, a signal or lost patience."""
    config, trackers = trainer.config, observer.trackers
    console.begin_progress(progress.step, config.max_iters, trainer.tokens_per_step)
    trainer.clock.start(progress)
    while True:
        step = progress.step
        last = step >= config.max_iters
        if progress.evaluated() or last or due(step, config.eval_interval):
            speed = trainer.clock.lap(progress)
            if not progress.evaluated():  # a resumed run has just done that
                progress.add(trainer.evaluate(step))
            e = progress.evaluation
            assert e is not None
            trackers.log_evaluation_metrics(e.train_loss, e.val_loss, e.learning_rate, step)
            console.evaluation(
                step, e.train_loss, e.val_loss, e.learning_rate, progress.best_step == step, speed
            )
            trainer.clock.lap(progress)

        mine = 15 if trainer.runtime.processes.orphaned else signals.received or 0
        agreed = trainer.runtime.processes.largest(int(mine))
        if agreed:
            signals.received = agreed
        done = bool(agreed) or last or progress.out_of_patience(config.patience)
        worth_saving = done or progress.best_step == step or due(step, config.checkpoint_interval)
        if done:
            trainer.clock.lap(progress)
        if worth_saving and store.newest_step != step:
            trackers.flush(step)
            store.save(trainer, progress, about | {"trackers": trackers.state()})
        observer.observe(step)  # after the flush, which would wait for its pictures
        if done:
            store.wait()
            return
        store.check()

        loss = trainer.compute_gradients(step)
        observer.log_training_step(loss, step)
        trainer.update(step)
        progress.step += 1
        console.progress(progress.step, loss)


if __name__ == "__main__":
    run_script(main)
