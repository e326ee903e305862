"""Whatever the configuration and the tag: a run that ends well or one message, all in its folder."""

from __future__ import annotations

import contextlib
import shutil

import faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ODD = ["", "x", "nan", "inf", "-1", "0", "1e999", "true", "0x10", "1_0", "None", "½", "\ud800"]


def number(*good: object) -> st.SearchStrategy[str]:
    """Mostly a value that trains in no time, sometimes anything."""
    return st.sampled_from([str(value) for value in good] * 60 + ODD)


FLAGS = {
    "--n-embd": number(8, 12, 16),
    "--n-head": number(1, 2, 4),
    "--n-layer": number(1, 2),
    "--block-size": number(1, 4, 8),
    "--batch-size": number(1, 3),
    "--max-iters": number(1, 2, 5),
    "--eval-interval": number(1, 3, 100),
    "--eval-iters": number(1, 2),
    "--dropout": number(0, 0.5, 0.99, 1),
    "--learning-rate": number(1e-3, 1, 1e-30),
    "--lr-schedule": number("constant", "cosine", "linear", "step", "wsd", "sine"),
    "--warmup-iters": number(0, 2, 50),
    "--min-lr": number(0, 1e-4),
    "--optimizer": number("adamw", "sgd", "adam"),
    "--grad-clip": number(0, 1),
    "--grad-accum-steps": number(1, 2),
    "--weight-decay": number(0, 0.1),
    "--beta1": number(0, 0.9, 1),
    "--beta2": number(0.5, 0.999),
    "--dtype": number("auto", "float32", "bfloat16", "float16"),
    "--device": number("auto", "cpu", "cuda:99", "tpu"),
    "--checkpoint-interval": number(0, 1, 3),
    "--keep-checkpoints": number(1, 2),
    "--patience": number(0, 1),
    "--export": number("best", "last", "worst"),
    "--histogram-interval": number(0, 1),
    "--activation-interval": number(0, 1),
    "--attention-interval": number(0, 1),
    "--embedding-interval": number(0, 1),
    "--sample-interval": number(0, 3),
    "--gradient-norm-interval": number(0, 1),
    "--speed-interval": number(0, 1),
    "--train-split": number(0.5, 0.9),
    "--val-split": number(0.1, 0.3),
    "--seed": number(0, 2**63 - 1, 2**63),
    "--run-tag": st.text(max_size=12) | st.sampled_from(["../..", "/etc", "a/b", "..", "~", "x" * 300, "\0"]),
}
choices = st.fixed_dictionaries({}, optional=FLAGS)


def test_any_configuration_ends_with_0_or_2_and_stays_in_its_folder(tmp_path, capfd, campaign):
    import train
    from utils_alg1.console.script import run_script

    count = {0: 0, 2: 0}
    folders = iter(range(10**6))

    @settings(
        max_examples=400 if campaign.whole else 25, suppress_health_check=list(HealthCheck), database=None
    )
    @given(choices)
    def check(flags: dict[str, str]) -> None:
        folder = faults.new_folder(tmp_path, f"{next(folders):06d}")
        # `--flag=value`, since a value may begin with a dash.
        arguments = [*faults.ARGUMENTS, *(f"{flag}={value}" for flag, value in flags.items())]
        with contextlib.chdir(folder):
            try:
                run_script(lambda: train.main(arguments))
            except SystemExit as exit_:
                code = int(exit_.code or 0)
        errors = capfd.readouterr().err
        assert code in (0, 2), errors
        assert "Traceback" not in errors
        assert errors.count("error: ") == (code == 2)
        count[code] += 1
        made = {path.relative_to(folder).parts[0] for path in folder.iterdir()}
        assert made <= {"text.txt", ".tokens", "runs"}
        runs = [path for path in (folder / "runs").glob("*") if path.name != ".lock"]
        assert len(runs) == (code == 0)
        assert all((run / "artifacts" / "export" / "model.safetensors").is_file() for run in runs)
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        shutil.rmtree(folder)

    check()
    assert min(count.values()) > 0, "both ends must be reached"
    campaign.count(f"configurations and tags: {count[0]} trained, {count[2]} refused", sum(count.values()))
