"""Every benchmark runs without a peer and prints its table. (What the figures are is no test's business.)"""

from __future__ import annotations

import os
import sys

import pytest
from conftest import PROJECT, run_process

FOLDER = PROJECT / "benchmarks"
HELPERS = {"common.py", "peers.py"}
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in HELPERS)
# What the plain suite has time for.
QUICK = ("checkpoint.py", "optimizers.py")
QUICK_FLAGS = {"scaling.py": ["--picture", "scaling.png"]}


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    yield common
    del sys.modules["common"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_prints_its_table(script, workdir, campaign):
    if script not in QUICK and not campaign.whole:
        pytest.skip("takes some seconds: pytest --campaign")
    flags = QUICK_FLAGS.get(script, [])

    result = run_process(f"benchmarks/{script}", "--quick", *flags, timeout=300, cwd=workdir)

    assert result.code == 0, result.err
    where, header, rule, *rows = result.out.splitlines()
    assert " cores" in where and "torch" in where
    assert set(rule) == set("|- ")
    assert rows
    for row in [header, rule, *rows]:
        assert row.startswith("| ") and row.endswith(" |")
        assert len(row) == len(header)
    assert not set(os.listdir()) - {"scaling.png"}, "it leaves nothing behind"


def test_a_picture_of_the_growth_is_drawn(workdir, common):
    from scaling import draw

    rows = [
        {"what changes": axis, "to": value, "tok/s": 10.0 * value, "peak memory, MB": 5.0}
        for axis in ("n_embd", "batch_size")
        for value in (1, 2)
    ]
    draw(rows, workdir / "x.png")

    assert (workdir / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_is_in_the_readme_with_its_command(script):
    assert f"python benchmarks/{script}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_turns_are_taken_forwards_and_backwards(common):
    taken = []

    seconds = common.interleave({name: lambda name=name: taken.append(name) for name in "abc"}, 3)

    assert "".join(taken) == "abccbaabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_the_median_over_the_rounds(common):
    assert common.ratio([2, 30, 8], [1, 10, 2]) == 3


def test_a_table_is_markdown_with_a_dash_for_what_was_not_measured(common, capsys):
    common.table([{"who": "ours", "tok/s": 12345.6}, {"who": "theirs", "x": 0.12345, "n": 1000}])

    assert capsys.readouterr().out.splitlines() == [
        "| who    | tok/s  | x     | n     |",
        "| ------ | ------ | ----- | ----- |",
        "| ours   | 12,346 | -     | -     |",
        "| theirs | -      | 0.123 | 1,000 |",
    ]


def test_a_peer_is_loaded_by_its_file(common, workdir):
    (workdir / "model.py").write_text("class GPT:\n    size = 3\n")

    assert common.load(workdir / "model.py", "a_peer").GPT.size == 3
    assert sys.modules.pop("a_peer").GPT.size == 3


def test_a_child_tells_what_it_found_and_its_own_peak(common, workdir):
    code = "x = bytearray(int(sys.argv[1])); x[::4096] = x[::4096]; report(found=7)"

    small = common.child(code, 1, folder=workdir)
    large = common.child(code, 50_000_000, folder=workdir)

    assert small["found"] == large["found"] == 7
    assert large["peak"] - small["peak"] > 40_000_000


def test_a_child_that_fails_says_what_it_said(common, workdir):
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        common.child("1 / 0", folder=workdir)
