"""Every preset that ships loads, holds nothing that is a default already, and trains."""

from __future__ import annotations

import re
import shutil

import pytest
from conftest import PROJECT, QUIET_TRACKERS, printed_config

from parameters import specs
from utils_alg1.console.command_line import Options
from utils_alg1.utils_config_loader import ConfigLoader

PRESETS = sorted(path.name for path in (PROJECT / "configs").iterdir() if path.is_dir())


def load(preset: str) -> dict[str, object]:
    return ConfigLoader.load_configs(PROJECT / "configs" / preset)


def test_the_presets_are_these():
    assert PRESETS == ["best-cpu", "fast", "gpu", "laptop"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_loads_and_differs_from_the_defaults(preset, workdir):
    folder = PROJECT / "configs" / preset
    params = ConfigLoader(Options(config=str(folder))).resolve()
    values, flat = load(preset), params.flat()
    assert values and params.problems() == []
    for name, value in values.items():
        spec = specs()[name]
        assert flat[name] == spec.type(value), name
        assert flat[name] != spec.default, f"{name} is the default already"
        assert params.origins[name].startswith(str(folder)), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains(preset, train, text_file, workdir, monkeypatch):
    """Some steps of it, on less: the sizes of the 6-layer model are not for a test."""
    from utils_alg1.report import page, results

    monkeypatch.setattr(page, "write_report", lambda *_: None)  # pictures take most of the time
    monkeypatch.setattr(results, "SAMPLE_LENGTH", 4)
    sizes = "--n-embd 24 --n-layer 1 --block-size 16 --batch-size 2"
    length = "--max-iters 11 --warmup-iters 5 --eval-interval 10 --eval-iters 1 --device cpu --threads 1"
    arguments = ["--config", PROJECT / "configs" / preset, "--data", text_file, *QUIET_TRACKERS]
    result = train(*arguments, *sizes.split(), *length.split())
    assert result.code == 0, result.err
    assert "reached   step 11" in result.out


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_in_the_readme(preset):
    readme = (PROJECT / "README.md").read_text()
    assert re.search(rf"^\| `--config configs/{preset}`", readme, re.M)


def test_a_preset_is_copied_with_the_folder_it_lies_in(workdir, train, text_file):
    """A sub-folder of configs/ is a preset, and no part of configs/ itself."""
    shutil.copytree(PROJECT / "configs", workdir / "configs")
    values = ConfigLoader.load_configs()
    assert {name for name in values if name != "_comment" and values[name] != specs()[name].default} == set()
    shown = printed_config(train("--print-config", "--config", "configs/fast").out)
    assert shown["n_layer"] == (1, "configs/fast/model.json")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_edited_in_the_folder_changes_no_preset(preset, workdir):
    shutil.copytree(PROJECT / "configs", workdir / "configs")
    folder = f"configs/{preset}"
    before = ConfigLoader(Options(config=folder)).resolve().flat()
    (workdir / "configs/train.yaml").write_text("beta1: 0.5\npatience: 7\n")
    assert ConfigLoader().resolve().changed() == {"beta1": 0.5, "patience": 7}
    assert ConfigLoader(Options(config=folder)).resolve().flat() == before
