"""How the code is laid out: short functions, imports that go down, nothing that an installation exposes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import PROJECT

FILES = sorted([*PROJECT.glob("*.py"), *PROJECT.glob("utils_*/**/*.py")])
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["tool"]
LONGEST_FUNCTION = 60  # lines
WRITTEN_OUT = {"loss_and_gradients"}  # the backward pass of the whole network, which reads best in one piece
LONGEST_SCRIPT = 200
# An import for each contract, and the contract that forbids it.
VIOLATIONS = [
    ("train.py", "import inference", "Imports go down"),
    ("utils_alg1/report/page.py", "import utils_alg1.search.space", "Imports go down"),
    ("utils_alg1/search/space.py", "import utils_alg1.report.page", "Imports go down"),
    ("utils_alg1/tracking/trackers.py", "import utils_alg1.report.page", "Imports go down"),
    ("utils_alg1/training/trainer.py", "import utils_alg1.tracking.observer", "Imports go down"),
    ("utils_alg1/utils_run_manager.py", "import utils_alg1.training.seeds", "Imports go down"),
    ("utils_alg1/utils_output.py", "import utils_alg1.utils_run_manager", "Imports go down"),
    ("data.py", "import model", "Imports go down"),
    ("model.py", "import data", "Imports go down"),
    ("utils_alg1/run_directory.py", "import utils_alg1.utils_config_loader", "Imports go down"),
    ("utils_alg1/network/decoder.py", "import model", "Imports go down"),
    ("utils_alg1/console/signals.py", "import utils_alg1.run_directory", "Imports go down"),
    ("utils_alg1/data/corpus.py", "import utils_alg1.network.rotary", "Imports go down"),
    ("utils_tensorboard/server.py", "import utils_alg1.console.terminal", "Imports go down"),
    ("utils_aim/tracker.py", "import utils_alg1.tracking.metrics_file", "Imports go down"),
    ("config.py", "import data", "Imports go down"),
    ("parameters.py", "import utils_alg1.run_directory", "Imports go down"),
    ("utils.py", "import utils_alg1.data.corpus", "Imports go down"),
    ("utils_alg1/base/text.py", "import utils", "Imports go down"),
    ("utils_alg1/base/errors.py", "import utils_alg1.base.files", "No circles within a package"),
    ("utils_tensorboard/writer.py", "import utils_tensorboard.logger", "No circles within a package"),
    ("utils_aim/pictures.py", "import utils_aim.tracker", "No circles within a package"),
    ("utils_alg1/training/trainer.py", "import utils_aim.instructions", "Training knows no tracker"),
    ("utils_alg1/report/page.py", "import utils_tensorboard.writer", "Trackers are made in one place"),
]
SAMPLE = [
    "import utils_alg1.tracking.observer",
    "import utils_aim.instructions",
    "import utils_tensorboard.writer",
]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_is_longer_than_sixty_lines(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in WRITTEN_OUT:
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{name_of(path)}: {node.name}"


def test_the_training_script_is_at_most_two_hundred_lines():
    assert len((PROJECT / "train.py").read_text("utf-8").splitlines()) <= LONGEST_SCRIPT


def test_an_installation_brings_no_module(tmp_path):
    """The scripts run from the checkout; elsewhere `import utils` is that of another project."""
    assert SETTINGS["setuptools"] == {"packages": [], "py-modules": []}
    names = [name.partition(".")[0] for name in SETTINGS["importlinter"]["root_packages"]]
    code = (
        "import importlib.util, sys\n"
        "found = [importlib.util.find_spec(name) for name in sys.argv[1:]]\n"
        "print(*(spec.origin for spec in found if spec), sep='\\n')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, encoding="utf-8"
    )
    assert [path for path in done.stdout.split("\n") if path.startswith(str(PROJECT))] == []


def test_every_folder_of_modules_is_a_package():
    for folder in {path.parent for path in FILES} - {PROJECT}:
        assert (folder / "__init__.py").exists(), name_of(folder)


def test_every_module_has_its_place_in_the_layers():
    modules = {path.stem for path in PROJECT.glob("*.py")} | {path.name for path in PROJECT.glob("utils_*/")}
    linter = SETTINGS["importlinter"]
    assert set(linter["root_packages"]) == modules
    layers = " ".join(linter["contracts"][0]["layers"])
    inside = {
        f"utils_alg1.{path.stem}"
        for path in (PROJECT / "utils_alg1").iterdir()
        if path.suffix == ".py" or path.is_dir()
    }
    inside -= {"utils_alg1.__init__", "utils_alg1.__pycache__"}
    assert set(layers.translate(str.maketrans("|:", "  ")).split()) == modules - {"utils_alg1"} | inside


def lint_imports(project: Path) -> subprocess.CompletedProcess[str]:
    """Run .ci/lint-imports of a copy of the project."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(project / ".ci" / "lint-imports")],
        env=os.environ | {"PATH": path, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_imports_keep_the_contracts():
    result = lint_imports(PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout
    assert "\n.ci/lint-imports\n" in (PROJECT / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize(
    ("file", "line", "contract"), VIOLATIONS, ids=[f"{file}: {line}" for file, line, _ in VIOLATIONS]
)
def test_an_import_against_a_contract_is_noticed(file, line, contract, tmp_path, campaign):
    if not campaign.whole and line not in SAMPLE:
        pytest.skip("half a second for each: pytest --campaign")
    for path in [*FILES, PROJECT / "pyproject.toml", PROJECT / ".ci" / "lint-imports"]:
        copy = tmp_path / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    code = (tmp_path / file).read_text("utf-8")
    (tmp_path / file).write_text(f"{code}\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{contract} BROKEN" in result.stdout
    assert line.split()[-1].rpartition(".")[2] in result.stdout.split("Broken contracts")[1]
    campaign.count("import against a contract, and the linter noticed", 1)
