"""What a run starts from: a checkpoint of its own (--resume), weights of another (--init-from), or nothing.

PyTorch is imported only for the first two: a new run has its parameters checked before that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.problems import raise_problems
from utils_alg1.console.command_line import Options
from utils_alg1.console.script import importing
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from model import BigramLanguageModel
    from utils_alg1.run_directory import RunDirectory
    from utils_alg1.training.checkpoint import Checkpoint

NANOGPT_HINTS = {  # values of nanoGPT's --init_from
    "resume": "to continue a run: --resume latest",
    "scratch": "leave --init-from out: a run starts from scratch",
}


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        run, checkpoint: of the run that --resume names. The run is locked; `prepare` releases it if it fails,
            afterwards MainRun does.
        initial: the model that --init-from names, and initial_path, its file.
    """

    run: RunDirectory | None = None
    checkpoint: Checkpoint | None = None
    initial: BigramLanguageModel | None = None
    initial_path: str = ""

    @property
    def parameters(self) -> dict[str, Any] | None:
        """The parameters of the resumed run."""
        return self.checkpoint.parameters if self.checkpoint else None

    @property
    def sizes(self) -> dict[str, Any] | None:
        """The parameters of the initial model that its weights depend on."""
        if self.initial is None:
            return None
        free = ("dropout", "vocab_size", "zero_init")
        sizes = dataclasses.asdict(self.initial.config)
        return {name: value for name, value in sizes.items() if name not in free}

    @property
    def compiled_before(self) -> bool | None:
        """Whether the steps so far were compiled; None for a new run."""
        return self.checkpoint.metadata.get("compiled") if self.checkpoint else None


def find_start(options: Options, sources: ConfigLoader, console: Console) -> Start:
    """Read what --resume or --init-from names.

    Raises:
        Alg1Error: a parameter is wrong by itself; or the run or file is not there, in use, damaged, or has no
            checkpoint.
    """
    if options.resume is None and options.init_from is None:
        return Start()
    # Nothing is known of the run yet, but wrong words should not have to wait until its checkpoint is read.
    raise_problems(sources.merge(resumed={} if options.resume is not None else None)[1])
    with importing():
        from utils_alg1.training.resume import load_model_file, reopen_run

    if options.resume is not None:
        return Start(*reopen_run(sources.runs_dir, options.resume, console))
    init_from = str(options.init_from)
    if init_from in NANOGPT_HINTS and not Path(init_from).exists():
        raise Alg1Error(f"--init-from {init_from}: must be a file of weights", NANOGPT_HINTS[init_from])
    return Start(initial=load_model_file(Path(init_from)), initial_path=init_from)
