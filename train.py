"""Train a character-level GPT.

    python train.py                                     the reference model on data/input.txt
    python train.py --data book.txt --max-iters 2000    your own text
    python train.py --config configs/laptop             a preset: a folder of settings, or a file of them
    python train.py --print-config                      every value and where it came from
    python train.py --resume latest                     continue an interrupted run, on CPUs to the same bytes
    python train.py --resume latest --finish            export and report what it has, without training on
    python train.py --init-from model.safetensors       start from trained weights
    torchrun --standalone --nproc_per_node=2 train.py   two processes, on two GPUs or CPU cores

Everything of a run lies in runs/YYYY-MM-DD_NNN_tag/. Afterwards: python inference.py

The program has fourteen phases, numbered below. Under torchrun every process runs it, and only the main
process writes files and prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils_alg1.base.errors import DONE
from utils_alg1.console.command_line import Options, parse_command_line, prints_only
from utils_alg1.console.script import run_script
from utils_alg1.run.job import prepare
from utils_alg1.training.distributed import init_distributed
from utils_alg1.utils_output import Console

if TYPE_CHECKING:  # PyTorch is imported after the parameters are checked, so that --help answers at once
    from utils_alg1.run.job import Job
    from utils_alg1.run.run import Run
    from utils_alg1.training.distributed import Distributed
    from utils_alg1.training.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    with init_distributed(prints_only(argv)) as dist:
        # 1. Command line.
        options = parse_command_line(argv) if dist.is_main else Options(quiet=True)
        with Console(options.quiet, options.verbose) as console:
            # 2. Configuration, text and device: all is checked before anything is created.
            job = dist.broadcast(prepare(options, dist, console) if dist.is_main else None)
            if job is None:  # after --print-config
                return DONE
            job.open_local(dist, console)
            # 3. Run id, 4. run directory, 5. metadata, 6. Aim, 7. TensorBoard: see MainRun.__enter__.
            with open_run(job, dist, console) as run:
                trainer = build_trainer(job, console)
                train(trainer, run)
                return finish(run)


def open_run(job: Job, dist: Distributed, console: Console) -> Run:
    """Return the run, which the main process keeps, and the others take part in."""
    from utils_alg1.run.run import MainRun, Run

    return MainRun(job, dist, console) if dist.is_main else Run(job, dist)


def build_trainer(job: Job, console: Console) -> Trainer:
    """Return the model with its data and optimizer, in the state that the run starts from."""
    import dataclasses

    from model import BigramLanguageModel
    from utils_alg1.training.runtime import memory_guard
    from utils_alg1.training.seeds import seed_initial_weights
    from utils_alg1.training.trainer import Trainer

    # 8. Tokens: memory-mapped, so that a text larger than memory can be trained on.
    corpus, runtime = job.corpus, job.runtime
    data = corpus.split(job.params.data.train_split, job.params.data.val_split)

    # 9. ModelConfig.
    config = dataclasses.replace(job.params.model, vocab_size=corpus.tokenizer.vocab_size)

    # 10. Model.
    with memory_guard("for the model", config), runtime.dist.connection_guard():
        seed_initial_weights(job.params.train.seed)
        model = BigramLanguageModel(config)
        model.vocabulary = corpus.tokenizer.vocabulary
        if job.initial:
            model.start_from(job.initial)
        model.to(runtime.device)
        trainer = Trainer(model, data, job.params.train, runtime, console.say)
        trainer.warm_up_ddp()
        if job.checkpoint:
            job.checkpoint.load_trainer(trainer)
        trainer.ends_here = job.finish
    return trainer


def train(trainer: Trainer, run: Run) -> None:
    """11. The loop: evaluate, save, take a step; until max_iters, a signal, or no better evaluations."""
    with run.training(trainer):
        while True:
            if trainer.eval_due:
                run.log_evaluation(trainer.evaluate())
            done = run.stop_requested() or trainer.finished
            if done or trainer.save_due:
                run.save_checkpoint()
            run.log_model()  # after the checkpoint, whose flush would wait for these pictures
            if done:
                return
            loss = trainer.forward_backward()
            run.log_step(loss)
            trainer.optimizer_step()


def finish(run: Run) -> int:
    """Write the results and print what to do next. Return the exit code."""
    if run.stopped_early:
        run.print_resume_command()
        return 128 + run.stop_signal
    # 12. Export and results.
    run.export()
    # 13. Clean up: trackers, server, lock.
    run.close()
    # 14. Summary.
    run.print_summary()
    return DONE


if __name__ == "__main__":
    run_script(main)
