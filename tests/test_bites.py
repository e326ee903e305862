"""The suite bites: with each guard of a run's safety removed, it fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import PROJECT


@dataclass
class Guard:
    """A guard, how to take it out of a file, and the tests that must notice."""

    name: str
    file: str
    code: str
    without: str
    tests: str


GUARDS = [
    Guard(
        "fsync of the file",
        "utils_alg1/base/files.py",
        "            os.fsync(descriptor)\n        finally:",
        "            pass\n        finally:",
        "tests/test_checkpoint.py -k synced",
    ),
    Guard(
        "fsync of the folder",
        "utils_alg1/base/files.py",
        "        os.fsync(folder)  # a renamed file survives a power loss only after this\n",
        "        pass\n",
        "tests/test_checkpoint.py -k synced",
    ),
    Guard(
        "temporary file and rename",
        "utils_alg1/base/files.py",
        '    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")\n',
        "    temporary = path\n",
        "tests/test_faults_kill.py -k any_file_call",
    ),
    Guard(
        "digest of tensor files",
        "utils_alg1/network/tensor_file.py",
        'about["sha256"] == digest(arrays, metadata)',
        'bool(about["sha256"])',
        "tests/test_faults_damage.py -k damaged_weights",
    ),
    Guard(
        "seed of each step",
        "utils_alg1/training/seeds.py",
        'text = f"{seed}/{purpose}/{step}/{micro_batch}".encode()',
        'text = f"{seed}/{torch.randint(2**40, ()).item()}".encode()',
        "tests/test_checkpoint.py -k change_no_byte",
    ),
    Guard(
        "arithmetic of a resumed run",
        "utils_alg1/training/runtime.py",
        "arithmetic = keep_arithmetic(before, params, device, processor)",
        "arithmetic = choose_arithmetic(params, device, processor)",
        "tests/test_checkpoint.py -k another_processor",
    ),
    Guard(
        "seeds as earlier versions derived them",
        "utils_alg1/training/seeds.py",
        'text = f"{seed}/{purpose}/{step}/{micro_batch}".encode()',
        'text = f"{seed}-{purpose}/{step}/{micro_batch}".encode()',
        "tests/test_compatibility.py -k stopped_run_resumes",
    ),
    Guard(
        "query, key and value as earlier versions ordered them",
        "utils_alg1/network/weights.py",
        '("query", "key", "value")',
        '("key", "query", "value")',
        "tests/test_compatibility.py -k weights_of_its_checkpoint",
    ),
    Guard(
        "names of tensors as earlier versions had them in a checkpoint",
        "utils_alg1/training/checkpoint.py",
        'f"{kind}.{name}": tensor',
        'f"{name}.{kind}": tensor',
        "tests/test_compatibility.py -k stopped_run_resumes",
    ),
    Guard(
        "lock of a run",
        "utils_alg1/base/locks.py",
        "        lock.acquire()\n",
        "        pass\n",
        "tests/test_checkpoint.py -k in_use",
    ),
    Guard(
        "cut of the metrics",
        "utils_alg1/run/run.py",
        "                cut_metrics(run.metrics_path, checkpoint.progress.step, console.warn)\n",
        "",
        "tests/test_checkpoint.py -k every_row_once",
    ),
    Guard(
        "cut of the samples",
        "utils_alg1/run/run.py",
        "                cut_samples(run.samples_path, checkpoint.progress.step)\n",
        "",
        "tests/test_report.py -k not_interrupted",
    ),
    Guard(
        "end of a trial whose search is gone",
        "utils_alg1/search/trials.py",
        "environment_of_child(os.environ) | variables",
        "{**os.environ} | variables",
        "tests/test_search.py -k whose_search_is_killed",
    ),
    Guard(
        "purge of TensorBoard",
        "utils_alg1/tracking/trackers.py",
        "None if state is None else flushed_step",
        "None",
        "tests/test_tensorboard.py -k one_clean_curve",
    ),
    Guard(
        "lock of a run, in the processes of its trackers",
        "utils_alg1/tracking/tracker_process.py",
        "    release_inherited_files(keep={connection.fileno()})\n",
        "",
        "tests/test_trackers.py -k parent_is_killed",
    ),
    Guard(
        "end of a tracker that hangs and has no parent any more",
        "utils_alg1/tracking/tracker_process.py",
        "        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()\n",
        "",
        "tests/test_trackers.py -k outlive",
    ),
    Guard(
        "check of loss and gradient",
        "utils_alg1/training/trainer.py",
        "if not math.isfinite(mean_loss) or",
        "if False and",
        "tests/test_training.py -k finite",
    ),
    Guard(
        "older checkpoint where the newest is damaged",
        "utils_alg1/training/checkpoint.py",
        '            warn(f"{error.message}; trying an older one")\n',
        "            raise\n",
        "tests/test_checkpoint.py -k damaged_newest",
    ),
    Guard(
        "exclusive transactions of a search",
        "utils_alg1/search/storage.py",
        "    if is_sqlite:  # otherwise",
        "    if False:  # otherwise",
        "tests/test_search.py -k out_of_the_queue",
    ),
    Guard(
        "an interrupted trial is queued again",
        "utils_alg1/search/trials.py",
        "                optuna.storages.RetryHeartbeatStaleTrialCallback()(study, trial)\n",
        "                pass\n",
        "tests/test_search.py -k ctrl_c",
    ),
    Guard(
        "no trial beyond the last place",
        "utils_alg1/search/trials.py",
        "if self.stopping or self.n_taken(before=trial.number) >= self.n_trials:",
        "if self.stopping:",
        "tests/test_search.py -k last_place",
    ),
]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_without_a_guard_the_suite_fails(guard, tmp_path, campaign):
    text = (PROJECT / guard.file).read_text()
    assert text.count(guard.code) == 1, "the guard is written otherwise by now"
    if not campaign.whole:
        pytest.skip("seconds for each guard: pytest --campaign")
    copy = tmp_path / "project"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info"))
    (copy / guard.file).write_text(text.replace(guard.code, guard.without))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *guard.tests.split(),
    ]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stdout[-2000:]
    assert " failed" in result.stdout and " error" not in result.stdout.splitlines()[-1]
    campaign.count("guard removed, and the suite failed", 1)
