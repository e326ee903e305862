"""The job of a run: parameters, text, device and starting point, all checked before anything is created.

PyTorch is imported after the parameters are checked, or to read what --resume or --init-from names.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import DataConfig, Parameters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.scripts import command
from utils_alg1.base.text import shell_quote
from utils_alg1.console.command_line import Options
from utils_alg1.console.script import importing
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from model import BigramLanguageModel
    from utils_alg1.data.corpus import Corpus
    from utils_alg1.run_directory import RunDirectory
    from utils_alg1.training.checkpoint import Checkpoint
    from utils_alg1.training.distributed import Distributed
    from utils_alg1.training.runtime import Runtime

NANOGPT_HINTS = {  # values of nanoGPT's --init_from
    "resume": "to continue a run: --resume latest",
    "scratch": "leave --init-from out: a run starts from scratch",
}


@dataclass
class Job:
    """What to train. The main process prepares the job and broadcasts it to the others.

    Attributes:
        corpus, runtime: the text and the device; each process opens its own (see `open_local`).
        run, checkpoint: what --resume names; the directory, locked, in the main process only.
        initial: the model that --init-from names.
        finish: take no further step: write the results of the checkpoint.
        config_files: the configuration files that were read, with their bytes; in the main process only.
        serve_tensorboard: whether to serve TensorBoard meanwhile; in the main process only.
    """

    params: Parameters
    corpus: Corpus
    runtime: Runtime
    run: RunDirectory | None = None
    checkpoint: Checkpoint | None = None
    initial: BigramLanguageModel | None = None
    finish: bool = False
    config_files: dict[Path, bytes] = field(default_factory=dict)
    serve_tensorboard: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that is broadcast: without what belongs to one process alone."""
        own = ("run", "config_files", "serve_tensorboard")
        return {name: value for name, value in vars(self).items() if name not in own}

    def open_local(self, dist: Distributed, console: Console) -> None:
        """Open `corpus` and `runtime` in this process, unless it is the main process, which has them.

        The arithmetic stays that of the main process, also on a machine with another kind of processor.

        Raises:
            Alg1Error: the text on this machine is not that of the main process.
        """
        if dist.is_main:
            return
        from utils_alg1.data.corpus import find_corpus, open_corpus
        from utils_alg1.training.runtime import start_runtime

        self.runtime = start_runtime(self.params, dist, dataclasses.asdict(self.runtime.arithmetic))
        of_main, files = self.corpus, [text.files for text in self.corpus.texts]
        if all(path.exists() for text in files for path in text.paths):
            corpus = open_corpus(*files)
        else:  # on another machine
            corpus = find_corpus(self.params.data, console.say)
        for text, expected in zip(corpus.texts, of_main.texts, strict=True):
            if text.sha256 != expected.sha256:
                raise Alg1Error(f"{text.name}: not the text of the main process", "copy that text here")
        self.corpus = corpus.with_vocabulary(of_main.tokenizer.vocabulary)


def prepare(options: Options, dist: Distributed, console: Console) -> Job | None:
    """Read and check all that a run needs, in the main process; None after --print-config.

    Raises:
        Alg1Error: a parameter, a file, the device or the text is wrong; nothing has been created.
    """
    sources = ConfigLoader(options)
    with contextlib.ExitStack() as after_failure:
        run, checkpoint, initial = _read_start(options, sources, console)
        if run is not None:
            after_failure.enter_context(run)  # which releases its lock
        sizes = {} if initial is None else _sizes(initial)
        params = sources.resolve(checkpoint.metadata["parameters"] if checkpoint else None, sizes)
        if options.print_config:
            console.configuration(params)
            return None
        with importing():
            from utils_alg1.data.corpus import find_corpus
            from utils_alg1.data.sources import name_text
            from utils_alg1.report.results import check_output
            from utils_alg1.training import resume
            from utils_alg1.training.runtime import check_memory, start_runtime

        check_output(params.train.output)
        runtime = start_runtime(params, dist, checkpoint.metadata["arithmetic"] if checkpoint else None)
        try:
            name_text(params, console.say)
            corpus = find_corpus(params.data, console.say)
        except Alg1Error as error:
            if checkpoint is not None:
                flags = "--data PATH" + (" or --val-data PATH" if params.data.val_data else "")
                error.hint = f"put the text of the run there, or name where it lies now: {flags}"
                if options.finish:  # the weights are there all the same
                    sample = f"{command('inference.py')} --run {shell_quote(str(checkpoint.path.parents[2]))}"
                    error.hint += f"; without it, its newest checkpoint can be sampled: {sample}"
            raise
        corpus.check_block_size(params.model.block_size, params.data.train_split, params.data.val_split)
        vocabulary, note = corpus.tokenizer.vocabulary, ""
        if checkpoint is not None:
            resume.check_resumable(checkpoint, params, corpus.sha256, dist)
            vocabulary = checkpoint.metadata["vocabulary"]
        if initial is not None:
            source, new_characters = str(options.init_from), params.data.new_characters
            resume.check_sizes(source, params.model, sizes)
            vocabulary, note = resume.initial_vocabulary(initial, source, corpus.tokenizer, new_characters)
        params.model.check_vocab_size(len(vocabulary))
        check_memory(params, len(vocabulary), runtime.device)
        corpus = corpus.with_vocabulary(vocabulary)
        corpus.tokenize()  # only now, as all is checked
        if note:
            console.say(note)
        learned = (initial.vocabulary if initial else None) or ()
        remark_on_texts(corpus, params.data, console, learned)
        after_failure.pop_all()
    job = Job(params, corpus, runtime, run, checkpoint, initial, options.finish)
    job.config_files = sources.files
    job.serve_tensorboard = options.serve_tensorboard
    return job


def remark_on_texts(corpus: Corpus, data: DataConfig, console: Console, learned: Iterable[str]) -> None:
    """Print what a person should know of the texts before they are trained on; see `Corpus.warnings`."""
    for line in corpus.remarks():
        console.say(line)
    if unused := data.unused_splits():
        console.warn(f"not used, as val_data is given: {', '.join(unused)}")
    for line in corpus.warnings(data.train_split, learned):
        console.warn(line)


def _read_start(
    options: Options, sources: ConfigLoader, console: Console
) -> tuple[RunDirectory | None, Checkpoint | None, BigramLanguageModel | None]:
    """Read what --resume (the locked run, and its checkpoint) or --init-from (a model) names.

    Raises:
        Alg1Error: a parameter is wrong by itself; or the run or file is not there, in use, damaged, or has no
            checkpoint.
    """
    if options.resume is None and options.init_from is None:
        return None, None, None
    # Nothing is known of the run yet, but wrong words should not have to wait until its checkpoint is read.
    sources.check_names_and_types()
    with importing():
        from utils_alg1.training.resume import load_model_file, reopen_run

    if options.resume is not None:
        return *reopen_run(sources.runs_dir, options.resume, console), None
    init_from = str(options.init_from)
    if init_from in NANOGPT_HINTS and not Path(init_from).exists():
        raise Alg1Error(f"--init-from {init_from}: must be a file of weights", NANOGPT_HINTS[init_from])
    return None, None, load_model_file(Path(init_from), console.say)


def _sizes(initial: BigramLanguageModel) -> dict[str, Any]:
    """Return the parameters of the initial model that its weights depend on."""
    from utils_alg1.training.resume import shapes_weights

    return {name: value for name, value in dataclasses.asdict(initial.config).items() if shapes_weights(name)}
