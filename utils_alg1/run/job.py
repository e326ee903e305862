"""The job of a run: parameters, text, device and starting point, all checked before anything is created."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import Parameters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.console.command_line import Options
from utils_alg1.console.script import importing
from utils_alg1.run.start import Start, find_start
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from utils_alg1.data.corpus import Corpus
    from utils_alg1.training.distributed import Distributed
    from utils_alg1.training.runtime import Runtime


@dataclass
class Job:
    """What to train. The main process prepares the job and broadcasts it to the others.

    Attributes:
        start: what the run starts from.
        text_path, text_sha256: the text, and the SHA-256 of its bytes.
        corpus, runtime: the text's tokens and the device; each process has its own (see `open_local`).
        config_files: the configuration files that were read, with their bytes; in the main process only.
        serve_tensorboard: whether to serve TensorBoard meanwhile; in the main process only.
    """

    params: Parameters
    start: Start
    text_path: Path
    text_sha256: str
    corpus: Corpus
    runtime: Runtime
    config_files: dict[Path, bytes] = field(default_factory=dict)
    serve_tensorboard: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """The state that is broadcast: without what belongs to this process, or to the main process alone."""
        start = dataclasses.replace(self.start, run=None)
        shared = {"params": self.params, "start": start}
        return shared | {"text_path": self.text_path, "text_sha256": self.text_sha256}

    def open_local(self, dist: Distributed, console: Console) -> None:
        """Open `corpus` and `runtime` in this process, unless it is the main process, which has them.

        Raises:
            Alg1Error: the text on this machine is not that of the main process.
        """
        if dist.is_main:
            return
        from utils_alg1.data.corpus import open_corpus
        from utils_alg1.data.sources import find_corpus

        self.runtime = _start_runtime(self.params, self.start, dist)
        path = self.text_path
        if not path.exists():  # on another machine
            path = find_corpus(self.params.data.data_path, console.say)
        self.corpus = open_corpus(path)
        if self.corpus.sha256 != self.text_sha256:
            raise Alg1Error(f"{path}: not the text of the main process", "copy that text here")


def prepare(options: Options, dist: Distributed, console: Console) -> Job | None:
    """Read and check all that a run needs, in the main process; None after --print-config.

    Raises:
        Alg1Error: a parameter, a file, the device or the text is wrong; nothing has been created.
    """
    sources = ConfigLoader(options)
    start = find_start(options, sources, console)
    with contextlib.ExitStack() as after_failure:
        if start.run is not None:
            after_failure.enter_context(start.run)
        params = sources.resolve(start.parameters, start.sizes)
        if options.print_config:
            console.configuration(params)
            return None
        job = _check(params, start, sources.files, options.serve_tensorboard, dist, console)
        after_failure.pop_all()
    return job


def _check(
    params: Parameters,
    start: Start,
    config_files: dict[Path, bytes],
    serve_tensorboard: bool,
    dist: Distributed,
    console: Console,
) -> Job:
    """Check parameters against --output, the device, the text and what the run starts from."""
    with importing():
        from utils_alg1.data.corpus import check_block_size, scan_corpus, text_warning
        from utils_alg1.report.results import check_output
        from utils_alg1.training import resume
        from utils_alg1.training.runtime import check_memory

    check_output(params.train.output)
    runtime = _start_runtime(params, start, dist)
    path = resume.find_text(params.data.data_path, start.checkpoint is not None, console.say)

    text = scan_corpus(path)
    split = params.data.train_split, params.data.val_split
    check_block_size(path, text.n_characters, params.model.block_size, *split)
    params.model.check_vocab_size(text.tokenizer.vocab_size)
    check_memory(params, text.tokenizer.vocab_size, runtime.device)
    if start.checkpoint is not None:
        resume.check_resumable(start.checkpoint, params, text.sha256, dist.world_size)
    if start.initial is not None:
        resume.check_initial(
            start.initial, start.initial_path, params.model, start.sizes or {}, text.tokenizer
        )
    corpus = text.tokenize()
    if warning := text_warning(path, text.tokenizer):
        console.warn(warning)
    return Job(params, start, path, corpus.sha256, corpus, runtime, config_files, serve_tensorboard)


def _start_runtime(params: Parameters, start: Start, dist: Distributed) -> Runtime:
    from utils_alg1.training.runtime import start_runtime

    return start_runtime(params.train, params.flops_per_step(), dist, start.compiled_before)
