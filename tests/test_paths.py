"""Paths and commands: the home folder, names that are not UTF-8, scripts started from another folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, QUIET_TRACKERS, TEXT, TINY, printed_config, run_process, runner

from utils_alg1.base.files import read_json_object
from utils_alg1.base.scripts import command, script, shipped
from utils_alg1.base.text import shell_quote
from utils_alg1.console.command_line import database_url
from utils_alg1.run_directory import list_runs

TRAIN = [*TINY, *QUIET_TRACKERS, "--quiet"]


@pytest.fixture
def compare(capsys):
    import compare as script

    return runner(script.main, capsys)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a text in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_a_path_from_every_source_may_begin_with_the_home_folder(workdir, home, train, sample, compare):
    values = {"runs_dir": "~/runs", "data_path": "~/text.txt", "val_data": "~/text.txt"}
    (home / "own.yaml").write_text(yaml.safe_dump(values | {"output": "~/model.safetensors"}))
    assert train("--config=~/own.yaml", *TRAIN).code == 0
    (run,) = list_runs(home / "runs")
    assert (home / "model.safetensors").is_file()
    assert read_json_object(run / "meta/full_config.json")["parameters"]["runs_dir"] == str(home / "runs")
    assert train(f"--resume=~/runs/{run.name}", "--max-iters=8", "--quiet").code == 0
    flags = ["--runs-dir=~/more", "--data=~/text.txt", "--output=~/second.safetensors"]
    assert train(*TRAIN, *flags, "--init-from=~/model.safetensors").code == 0
    assert (home / "second.safetensors").is_file() and len(list_runs(home / "more")) == 1
    (home / "prompt.txt").write_text("The")
    for source in ("--run=~/runs/" + run.name, "--model=~/model.safetensors", "--runs-dir=~/runs"):
        result = sample(source, "--prompt-file=~/prompt.txt", "--max-new-tokens=3")
        assert (result.code, result.out[:3]) == (0, "The")
    assert sample("--runs-dir=~/runs", "--score=~/text.txt").code == 0
    assert run.name in compare("--runs-dir=~/runs").out
    assert list(workdir.iterdir()) == []


def test_a_run_under_a_path_that_is_not_utf8_can_be_read_again(text_file, train, sample, compare):
    folder = os.fsdecode(b"caf\xe9")
    Path(folder).mkdir()
    text_file.rename(Path(folder, "text.txt"))
    flags = [f"--runs-dir={folder}/runs"]
    assert train(*TRAIN, *flags, f"--data={folder}/text.txt", f"--output={folder}/model").code == 0
    (run,) = list_runs(f"{folder}/runs")
    record = read_json_object(run / "meta/full_config.json")
    assert record["parameters"]["data_path"] == f"{folder}/text.txt"
    assert train("--resume=latest", *flags, "--max-iters=8", "--quiet").code == 0
    assert train(f"--config={run.absolute()}/meta/full_config.json", "--quiet").code == 0
    assert len(list_runs(f"{folder}/runs")) == 2
    assert sample(*flags, "--max-new-tokens=1").code == 0
    assert compare(*flags).out.count(" done") == 2
    assert (run / "eval/report.html").is_file()


def test_presets_of_the_checkout_are_found_from_another_folder(workdir, train):
    out = train("--config", "configs/laptop", "--print-config").out
    assert printed_config(out)["n_embd"] == (128, str(PROJECT / "configs/laptop/model.json"))
    (workdir / "configs/laptop").mkdir(parents=True)
    (workdir / "configs/laptop/model.json").write_text('{"n_embd": 32}')
    out = train("--config", "configs/laptop", "--print-config").out
    assert printed_config(out)["n_embd"] == (32, "configs/laptop/model.json")
    assert shipped("configs/search.yaml") == PROJECT / "configs/search.yaml"
    assert shipped("configs/nothing") == Path("configs/nothing")
    assert shipped("../configs/laptop") == Path("../configs/laptop")
    result = train("--config", "configs/lapto")
    assert "did you mean configs/laptop?" in result.err


def test_a_preset_is_named_without_its_folder(workdir, train):
    out = train("--config", "fast", "--print-config").out
    assert printed_config(out) == printed_config(train("--config", "configs/fast", "--print-config").out)
    assert printed_config(out)["n_layer"] == (1, str(PROJECT / "configs/fast/model.json"))
    (workdir / "configs/fast").mkdir(parents=True)
    (workdir / "configs/fast/model.json").write_text('{"n_embd": 32}')
    out = train("--config", "fast", "--print-config").out
    assert printed_config(out)["n_embd"] == (32, "configs/fast/model.json")
    (workdir / "fast").write_text('{"n_embd": 16}')
    assert printed_config(train("--config", "fast", "--print-config").out)["n_embd"] == (16, "fast")
    assert "--config gpu: no such file or folder" in train("--config", "./gpu").err
    assert "did you mean configs/laptop?" in train("--config", "lapto").err


def test_the_url_of_a_database_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert database_url("sqlite:///~/x.db") == "sqlite:////home/me/x.db"
    for url in ("sqlite:///x~.db", "sqlite:////tmp/x.db", "postgresql://me:~@host/db", "x.db"):
        assert database_url(url) == url


@pytest.mark.parametrize("name", [b"caf\xe9", b"it's \\ \xff\xfe f\xe9e.txt", b"a b", b"caf\xc3\xa9"])
def test_a_name_that_is_not_utf8_is_quoted_so_that_a_shell_reads_it_back(name):
    quoted = shell_quote(os.fsdecode(name)).encode()  # it can be printed
    done = subprocess.run(["bash", "-c", b"printf %s " + quoted], stdout=subprocess.PIPE, check=True)
    assert done.stdout == name


def test_the_commands_of_a_run_under_a_path_that_is_not_utf8_can_be_pasted(text_file):
    result = run_process("train.py", *TINY, "--no-aim", "--data=text.txt", "--runs-dir=b\udcff")
    assert result.code == 0
    commands = dict(line.split(maxsplit=1) for line in result.out.splitlines() if "$'" in line)
    (run,) = list_runs(os.fsdecode(b"b\xff"))
    assert commands["sample"].endswith(rf"inference.py --run $'b\xff/{run.name}'")
    assert commands["curves"].startswith(r"tensorboard --logdir=$'b\xff' --port")
    sampled = subprocess.run(
        ["bash", "-c", commands["sample"].replace("python", sys.executable, 1) + " --max-new-tokens 3"]
    )
    assert sampled.returncode == 0


def test_commands_name_the_script_as_it_was_started(monkeypatch, workdir):
    for started, expected in (
        ("train.py", "train.py"),
        ("./inference.py", "./train.py"),
        ("/opt/my alg1/search.py", "'/opt/my alg1/train.py'"),
        ("/usr/bin/pytest", "train.py"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert (script("train.py"), command("train.py")) == (expected, f"python {expected}")
    result = run_process("inference.py")
    assert f"hint: start one: python {PROJECT}/train.py, or name" in result.err
    result = run_process("train.py", "--batch-size=0")
    assert f"hint: python {PROJECT}/train.py --help explains" in result.err


def test_what_a_run_prints_can_be_pasted_in_the_folder_where_it_was_started(text_file):
    result = run_process("train.py", *TINY, *QUIET_TRACKERS, "--data", text_file)
    (run,) = list_runs("runs")
    assert f"\nsample    python {PROJECT}/inference.py --run {run}\n" in result.out
    assert f"\ncontinue  python {PROJECT}/train.py --resume {run} --max-iters 12\n" in result.out
