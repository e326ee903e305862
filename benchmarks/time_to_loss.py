"""Wall time of the whole program to a validation loss on tiny Shakespeare, beside nanoGPT.

    python benchmarks/time_to_loss.py --data input.txt --nanogpt PATH
    python benchmarks/time_to_loss.py --data input.txt --config configs/best-cpu --goal 1.4697

ALG1 runs `python train.py --config PRESET`, trackers, evaluations and export included, without a token cache.
nanoGPT runs its train.py with the flags that its README gives for a CPU, in a copy of the checkout; preparing
its data is a separate row, not part of the ratio. The loss on all of the val text is measured for both as
train.py measures its export: the mean over the last tenth of the text, in sequences of block_size characters
that do not overlap.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PROJECT, interleave, load, machine, parser, ratio, run, silence, table, text_or_docs

NANOGPT_FLAGS = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12"
    " --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
QUICK_FLAGS = "--max-iters 2 --warmup-iters 0 --eval-iters 1 --batch-size 1 --block-size 8 --no-aim".split()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    options.add_argument("--data", help="the file of tiny Shakespeare (default: Python's documentation)")
    options.add_argument("--config", default=str(PROJECT / "configs" / "fast"), help="of ALG1 (configs/fast)")
    options.add_argument("--goal", type=float, default=1.88, help="the loss to reach (1.88)")
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--threads", type=int, default=0, help="of both; 0: each one's own choice")
    args = options.parse_args()
    if args.quick:
        args.threads = args.threads or 1
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contestants: dict[str, Ours | NanoGPT] = {"ALG1": Ours(args, folder)}
        if args.nanogpt:
            contestants["nanoGPT"] = NanoGPT(args, folder)
        seconds = interleave(contestants, args.rounds)
        rows: list[dict[str, Any]] = []
        for who, times in seconds.items():
            model, loss = contestants[who].result()
            rows.append(
                {
                    "who": who,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "seconds": statistics.median(times),
                    "x nanoGPT": ratio(seconds["nanoGPT"], times) if args.nanogpt else None,
                    "its own val loss": f"{contestants[who].own_loss:.4f}",
                    "loss on all of the val text": f"{loss:.4f}",
                    f"at most {args.goal}": "yes" if loss <= args.goal else "no",
                }
            )
        if args.nanogpt:
            rows.append({"who": "nanoGPT, its data", "seconds": contestants["nanoGPT"].preparing})
        table(rows)


class Ours:
    """A run of train.py in its own folder."""

    preparing = 0.0

    def __init__(self, args: Any, folder: Path):
        self.folder = folder / "alg1"
        self.folder.mkdir()
        self.text = text_or_docs(args.data, self.folder)
        script = str(PROJECT / "train.py")
        config = str(Path(args.config).resolve())
        self.command = [sys.executable, script, "--config", config, "--data", str(self.text)]
        if args.quick:
            self.command += QUICK_FLAGS
        self.own_loss: float | None = None

    def __call__(self) -> None:
        for old in (self.text.parent / ".tokens", self.folder / "runs"):
            shutil.rmtree(old, ignore_errors=True)
        run(self.command, self.folder)

    def result(self) -> tuple[Any, float]:
        """Return the model of the export, and its loss on the validation text."""
        from utils_alg1.run_directory import RunFolder, find_run
        from utils_alg1.training.resume import load_model_file

        run = RunFolder(find_run(str(self.folder / "runs")))
        model = load_model_file(run.export_path, print)
        self.own_loss = float(model.provenance["val_loss"])
        return model, json.loads(run.final_path.read_text())["export_val_loss"]


class NanoGPT:
    """A run of nanoGPT's train.py in a copy of its checkout."""

    def __init__(self, args: Any, folder: Path):
        self.folder = folder / "nanoGPT"
        shutil.copytree(args.nanogpt, self.folder, ignore=shutil.ignore_patterns(".git"))
        data = self.folder / "data" / "shakespeare_char"
        shutil.copy(text_or_docs(args.data, folder), data / "input.txt")
        (data / "requests.py").touch()  # prepare.py imports it to download the text, which is here already
        began = time.perf_counter()
        run([sys.executable, str(data / "prepare.py")], self.folder)
        self.preparing = time.perf_counter() - began
        flags = list(NANOGPT_FLAGS)
        if args.quick:
            flags += ["--max_iters=2", "--eval_interval=1", "--eval_iters=1", "--batch_size=2"]
        self.command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]
        self.own_loss: float | None = None

    def __call__(self) -> None:
        run(self.command, self.folder)

    def result(self) -> tuple[Any, float]:
        """Return the model of its best checkpoint, and its loss on the validation text."""
        import numpy as np
        import torch

        from utils_alg1.training.evaluation import measure
        from utils_alg1.training.runtime import Runtime

        path = self.folder / "out-shakespeare-char" / "ckpt.pt"
        checkpoint = torch.load(path, weights_only=True)
        self.own_loss = float(checkpoint["best_val_loss"])
        model_py = load(self.folder / "model.py", "nanogpt_model")
        with silence():
            model = model_py.GPT(model_py.GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
        tokens = np.fromfile(self.folder / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16)
        return model, measure(model, tokens, Runtime()).loss


if __name__ == "__main__":
    main()
