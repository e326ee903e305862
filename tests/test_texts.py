"""--data and --val-data: one file or many, packed or not, a held-out text; the same bytes train the same."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
import subprocess
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import QUIET_TRACKERS, TEXT, TINY, lasting_metrics
from hypothesis import given
from hypothesis import strategies as st

import data
from utils_alg1.data import sources, text_files, texts
from utils_alg1.data.corpus import open_corpus
from utils_alg1.data.sources import find_text
from utils_alg1.data.text_files import BOM, TextFiles
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.run_directory import RunFolder, list_runs
from utils_tensorboard import logger

HALF = len(TEXT) // 2


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def tokens_of(files: TextFiles | Path) -> str:
    corpus = open_corpus(files)
    return corpus.tokenizer.decode(corpus.tokens.tolist())


def newest_run() -> RunFolder:
    return RunFolder(list_runs("runs")[-1].absolute())


def result_of(run: RunFolder) -> tuple[dict, bytes, dict]:
    """What a run has trained: its weights, its losses, and how it records its text."""
    tensors = {name: tensor.numpy().tobytes() for name, tensor in read_tensors(run.export_path)[0].items()}
    record = json.loads(run.record_path.read_bytes())["corpus"]
    return tensors, lasting_metrics(run.metrics_path), record


# --- which files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("books", ["books/1.txt", "books/10.txt", "books/2.TXT", "books/b.txt.gz"]),
        ("books/", ["books/1.txt", "books/10.txt", "books/2.TXT", "books/b.txt.gz"]),
        ("books/*.txt", ["books/1.txt", "books/10.txt"]),
        ("books/*", ["books/1.txt", "books/10.txt", "books/2.TXT", "books/b.txt.gz", "books/c.md"]),
        ("books/**/*.txt", ["books/1.txt", "books/10.txt", "books/deeper/d.txt"]),
        ("books/[!1]*.md", ["books/c.md"]),
        ("it[1].txt", ["it[1].txt"]),
        ("books/c.md", ["books/c.md"]),
    ],
)
def test_a_folder_or_a_pattern_names_its_files_in_the_order_of_their_names(workdir, name, expected):
    for path in ("2.TXT", "1.txt", "10.txt", "b.txt.gz", "c.md", ".hidden.txt", "deeper/d.txt"):
        write(f"books/{path}", "some text")
    write("it[1].txt", "a name that is a pattern too")
    Path("books/folder.txt").mkdir()

    assert [str(path) for path in sources.find_text(name).paths] == expected


def test_a_home_folder_is_found_in_a_path_and_in_a_pattern(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    write("books/a.txt", "some text")

    for name in ("~/books", "~/books/*.txt", "~/books/a.txt"):
        assert sources.find_text(name).paths == (workdir / "books/a.txt",)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        (
            "empty",
            "empty: this folder has no .txt or .txt.gz file",
            "put a text there, or name another: --data PATH",
        ),
        ("full", "full: this folder has no .txt or .txt.gz file", "--data 'full/**/*.txt'"),
        ("notes", "notes: this folder has no .txt or .txt.gz file", "--data 'notes/*.md'"),
        ("none/*.txt", "--data none/*.txt: no file matches this pattern", "how the names of the files end"),
        ("twins", "twins/a.txt and twins/a.txt.gz: the same text would be read twice", "move one of them"),
        ("twins/*", "twins/a.txt and twins/a.txt.gz: the same text would be read twice", "move one of them"),
        ("blank", "blank: its 2 files are empty", "give it some text"),
    ],
)
def test_what_names_no_text_says_what_to_do(train, workdir, name, message, hint):
    Path("empty").mkdir()
    for path in ("notes/a.md", "notes/b.md", "notes/c.rst", "twins/a.txt", "twins/a.txt.gz"):
        write(path, "some text")
    write("full/of/folders.txt", "some text")
    write("blank/a.txt", ""), write("blank/b.txt", "\ufeff")

    result = train("--data", name, *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    assert result.err.splitlines()[0] == f"error: {message}"
    assert hint in result.err.splitlines()[1]
    assert not Path("runs").exists()


def test_a_pattern_without_quotes_and_two_files_are_told_how_it_is_done(train, workdir):
    write("books/a.txt", TEXT), write("books/b.txt", TEXT)

    several = train("--data", "books/a.txt", "books/b.txt", *TINY, *QUIET_TRACKERS)
    twice = train("--data", "books/a.txt", "--data=books/b.txt", as_typed=True)

    assert several.code == twice.code == 2
    assert several.err.splitlines()[0] == (
        "error: --data takes one value, and was given 2: 'books/a.txt' 'books/b.txt'"
    )
    assert twice.err.splitlines()[0] == (
        "error: --data is given 2 times: --data books/a.txt, --data books/b.txt"
    )
    for result in (several, twice):
        (pattern,) = re.findall("a pattern in quotes: --data ('.*?')", result.err)
        assert train("--data", *shlex.split(pattern), *TINY, *QUIET_TRACKERS).code == 0


def test_a_pattern_that_matches_other_files_too_is_not_offered(train, workdir):
    Path("texts").mkdir()
    for name in ("train", "val", "notes"):
        Path(f"texts/{name}.txt").write_text("to be or not to be")
    result = train("--data", "texts/train.txt", "texts/val.txt", *TINY)
    assert result.code == 2
    assert "several texts are their folder, or a pattern in quotes: --data 'books/*.txt'" in result.err


# --- the same bytes train the same --------------------------------------------------------------------


@given(
    pieces=st.lists(st.text(st.sampled_from("ab\r\né日🙂\ufeff"), max_size=9), min_size=1, max_size=4),
    boms=st.lists(st.booleans(), min_size=4, max_size=4),
    packed=st.lists(st.booleans(), min_size=4, max_size=4),
    chunk=st.integers(1, 9) | st.just(1 << 22),
)
def test_many_files_are_one_text_and_its_digest_tells_it_apart(tmp_path_factory, pieces, boms, packed, chunk):
    folder = tmp_path_factory.mktemp("texts")
    expected, digested = "", b""
    for i, (piece, bom, pack) in enumerate(zip(pieces, boms, packed, strict=False)):
        piece = piece.removeprefix("\ufeff")
        content = (BOM if bom else b"") + piece.encode()
        (folder / f"{i}.txt").write_bytes(gzip.compress(content) if pack else content)
        expected += piece
        digested += content if i == 0 else piece.encode()
    if not expected:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", chunk)
        text = open_corpus(sources.find_text(str(folder))).text
        again = tokens_of(sources.find_text(str(folder)))

    assert again == expected
    assert text.n_characters == len(expected)
    assert text.sha256 == hashlib.sha256(digested).hexdigest()
    assert text.vocabulary == sorted(set(expected))
    assert text.first == [expected.index(character) for character in text.vocabulary]
    assert text.n_crlf == expected.count("\r\n")
    assert text.n_cr == expected.count("\r") - text.n_crlf


def test_one_file_many_and_packed_ones_train_to_the_same_bytes(train, workdir):
    write("text.txt", TEXT)
    write("text.txt.gz", TEXT)
    write("folder/1.txt", TEXT[:HALF]), write("folder/2.txt.gz", TEXT[HALF:])
    write("packed-without-a-suffix", TEXT).write_bytes(gzip.compress(TEXT.encode()))
    ways = ["text.txt", "text.txt.gz", "folder", "folder/*", "packed-without-a-suffix"]

    results = []
    for way in ways:
        result = train("--data", way, *TINY, *QUIET_TRACKERS)
        assert result.code == 0 and result.err == "", result.err
        results.append(result_of(newest_run()))

    for way, (tensors, metrics, record) in zip(ways, results, strict=True):
        assert (tensors, metrics) == results[0][:2]
        files = 2 if way.startswith("folder") else 1
        sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
        expected = {"path": way, "files": files, "sha256": sha256, "characters": len(TEXT), "vocab_size": 48}
        assert record == expected
    assert f"text     folder/*: 2 files, {len(TEXT):,} characters, vocabulary of 48" in (
        train("--data", "folder/*", *TINY, *QUIET_TRACKERS).out
    )


def test_a_folder_is_found_again_by_a_resume_and_refused_when_it_has_changed(train, workdir):
    write("books/1.txt", TEXT[:HALF]), write("books/2.txt", TEXT[HALF:])
    assert train("--data", "books", *TINY, *QUIET_TRACKERS).code == 0

    longer = train("--resume", "latest", "--max-iters", 8)
    assert longer.code == 0, longer.err
    write("books/3.txt", "one more")
    changed = train("--resume", "latest", "--max-iters", 10)
    Path("books").rename("shelf")
    gone = train("--resume", "latest", "--max-iters", 10)
    os.remove("shelf/3.txt")
    moved = train("--resume", "latest", "--max-iters", 10, "--data", "shelf/*.txt")

    assert changed.code == 2
    assert changed.err.splitlines()[0] == "error: books: this is not the text that the run was trained on"
    assert gone.code == 2
    assert gone.err.splitlines() == [
        "error: books: no such text file",
        "hint: put the text of the run there, or name where it lies now: --data PATH",
    ]
    assert moved.code == 0, moved.err


def test_the_order_of_the_files_is_part_of_the_text(workdir):
    write("a/1.txt", "first"), write("a/2.txt", "second")
    write("b/1.txt", "second"), write("b/2.txt", "first")

    assert tokens_of(sources.find_text("a")) == "firstsecond"
    assert tokens_of(sources.find_text("b")) == "secondfirst"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) // 2], "ended before the end-of-stream marker"),
        (lambda content: content[:-8] + b"\0\0\0\0" + content[-4:], "CRC check failed"),
        (lambda content: content[:12] + b"\xff" * 30 + content[42:], "Error -3 while decompressing"),
        (lambda content: content + b"rest", "Not a gzipped file"),
    ],
)
def test_damaged_gzip_is_told(train, workdir, damage, reason):
    Path("text.txt.gz").write_bytes(damage(gzip.compress(TEXT.encode())))

    result = train("--data", "text.txt.gz", *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    assert result.err.startswith("error: text.txt.gz: damaged gzip: ")
    assert reason in result.err
    assert result.err.endswith("\nhint: get it again, whole\n")
    assert os.listdir() == ["text.txt.gz"]


def test_many_packed_files_are_never_in_memory_as_a_whole(workdir, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1 << 16)
    size = 16 << 20
    Path("books").mkdir()
    for name in "ab":
        packed = gzip.compress(b"0123456789abcdef" * (size // 32), compresslevel=1)
        Path(f"books/{name}.txt.gz").write_bytes(packed)
    peaks = []
    for _ in ("tokenized", "from the cache"):
        tracemalloc.start()
        train_data, val_data, _ = data.load_data("books", val_data="books/b.txt.gz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert isinstance(train_data, np.memmap)
        assert (len(train_data), len(val_data)) == (size, size // 2)

    assert max(peaks) < size / 3


@pytest.mark.parametrize(
    ("held_out", "both"),
    [
        ("folder/2.txt", "folder/2.txt"),
        ("folder/../folder/2.txt", "folder/../folder/2.txt"),
        ("copy.txt", "copy.txt"),
        ("link", "link/2.txt"),
        ("other.txt", None),
    ],
)
def test_a_held_out_file_that_is_trained_on_is_told(workdir, held_out, both):
    for name in ("folder", "link"):
        Path(name).mkdir()
    write("folder/1.txt", "abcd" * 50), write("folder/2.txt", "bcda" * 40), write("copy.txt", "bcda" * 40)
    write("other.txt", "bcad" * 40)
    Path("link/2.txt").symlink_to("../folder/2.txt")

    warnings = open_corpus(find_text("folder"), find_text(held_out)).warnings(0.9)

    expected = f"{both}: it is trained on too, so the val loss does not tell of new text"
    assert warnings == ([expected] if both else [])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\r\nb\r\n", "its lines end with CR LF"),
        ("a\r\nb\nc\r\nd", "2 of its lines end with CR LF"),
        ("a\r\nb\rc", "1 of its lines end with CR LF"),
    ],
)
def test_how_many_lines_end_with_cr_lf_is_told_where_not_all_do(workdir, text, told):
    write("text.txt", text)

    (remark,) = open_corpus("text.txt").remarks()

    assert remark.startswith(f"text.txt: {told}, which the samples will have too")
    assert ("to change that" in remark) is ("\rc" not in text)


# --- a held-out text ----------------------------------------------------------------------------------


def test_with_a_held_out_text_all_of_the_other_is_for_training(workdir):
    write("text.txt", "abcab" * 20), write("other.txt", "bcd" * 10)

    train_data, val_data, tokenizer = data.load_data("text.txt", val_data="other.txt")

    assert tokenizer.vocabulary == list("abcd")
    assert tokenizer.decode(train_data.tolist()) == "abcab" * 20
    assert tokenizer.decode(val_data.tolist()) == "bcd" * 10


def test_tokens_of_each_vocabulary_are_cached_beside_each_other(workdir, monkeypatch):
    write("text.txt", "abcab" * 20), write("same.txt", "cab" * 10), write("more.txt", "bcd" * 10)
    written = []
    write_tokens = texts._write_tokens
    monkeypatch.setattr(
        texts, "_write_tokens", lambda text, *rest: written.append(text.name) or write_tokens(text, *rest)
    )
    for held_out in (None, "same.txt", "more.txt", None, "same.txt", "more.txt"):
        train_data, _, tokenizer = data.load_data("text.txt", 1.0, val_data=held_out)
        assert tokenizer.decode(train_data.tolist()) == "abcab" * 20

    assert written == ["text.txt", "same.txt", "more.txt", "text.txt"]


def train_held_out(train, *more: object) -> None:
    write("text.txt", TEXT), write("held.txt.gz", TEXT[:400])
    result = train("--data", "text.txt", "--val-data", "held.txt.gz", *TINY, *QUIET_TRACKERS, *more)
    assert result.code == 0, result.err


def test_a_run_with_a_held_out_text_records_it_and_says_so(train, workdir):
    write("text.txt", TEXT), write("held.txt", TEXT[:400])

    result = train("--data", "text.txt", "--val-data", "held.txt", *TINY, *QUIET_TRACKERS)

    assert result.code == 0 and result.err == "", result.err
    assert "\nval      held.txt: 400 characters; all of the text is for training\n" in result.out
    _, _, record = result_of(newest_run())
    sha256 = hashlib.sha256(TEXT[:400].encode()).hexdigest()
    assert record["held_out"] == {"path": "held.txt", "files": 1, "sha256": sha256, "characters": 400}
    page = (newest_run().eval_dir / "report.html").read_text(encoding="utf-8")
    assert sha256 in page and "held.txt, 400 characters" in page


def test_the_held_out_text_is_what_is_evaluated_on(train, workdir, monkeypatch):
    import utils_alg1.training.trainer as trainer_module

    lengths = set()
    create = trainer_module.Trainer.__init__

    def keep_lengths(self, model, data, *rest):
        lengths.add(tuple(map(len, data)))
        create(self, model, data, *rest)

    monkeypatch.setattr(trainer_module.Trainer, "__init__", keep_lengths)
    train_held_out(train)
    train_held_out(train, "--train-split", 1.0)

    assert lengths == {(len(TEXT), 400)}


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ([], None),
        (["--train-split", "1"], None),
        (["--val-split", "0.2"], "warning: not used, as val_data is given: val_split = 0.2"),
        (
            ["--train-split", "0.95", "--val-split", "0.5"],
            "warning: not used, as val_data is given: train_split = 0.95, val_split = 0.5",
        ),
    ],
)
def test_splits_that_a_held_out_text_makes_useless_are_told(train, workdir, flags, warning):
    write("text.txt", TEXT), write("held.txt", TEXT[:400])

    result = train("--data", "text.txt", "--val-data", "held.txt", *TINY, *QUIET_TRACKERS, *flags)

    assert result.code == 0
    assert result.err == (f"{warning}\n" if warning else "")


def test_a_train_split_of_the_whole_text_needs_a_held_out_one(train, workdir):
    write("text.txt", TEXT)

    result = train("--data", "text.txt", "--train-split", 1, *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    assert result.err.startswith(
        "error: train_split = 1 and val_split = 0.1 make 1.1, more than the whole text"
    )
    assert "; val_data names another one for validation (train_split from --train-split)" in result.err


@pytest.mark.parametrize(
    ("text", "held_out", "message", "hint"),
    [
        (
            "abcd" * 99,
            "abc",
            "held.txt: 3 characters are too few for block_size = 8",
            "--block-size 2 at most",
        ),
        (
            "abc",
            "abcd" * 99,
            "text.txt: 3 characters are too few for block_size = 8",
            "--block-size 2 at most",
        ),
        (
            "abcd" * 99,
            "a",
            "held.txt: 1 characters are too few for block_size = 8, and for any other",
            "use a longer text: it needs two characters",
        ),
        ("abcd" * 99, "", "held.txt: the file is empty", "give it some text"),
        ("abcd" * 99, None, "held.txt: no such text file", "check the path of --val-data"),
    ],
)
def test_a_held_out_text_that_does_not_fit_is_refused(train, workdir, text, held_out, message, hint):
    write("text.txt", text)
    if held_out is not None:
        write("held.txt", held_out)

    result = train("--data", "text.txt", "--val-data", "held.txt", *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    assert result.err.splitlines()[0] == f"error: {message}"
    assert hint in result.err.splitlines()[1]
    assert not Path("runs").exists()


def test_a_resume_with_a_held_out_text_ends_with_the_same_bytes(train, workdir):
    train_held_out(train, "--max-iters", 8)
    whole = result_of(newest_run())
    train_held_out(train, "--max-iters", 4)
    Path("held.txt.gz").rename("moved.gz")

    resumed = train("--resume", "latest", "--max-iters", 8, "--val-data", "moved.gz")

    assert resumed.code == 0, resumed.err
    assert result_of(newest_run())[:2] == whole[:2]


@pytest.mark.parametrize(
    ("with_one", "then", "message", "hint"),
    [
        (
            True,
            ["--val-data", "text.txt"],
            "val_data = 'text.txt': the run has another held-out text",
            "--val-data",
        ),
        (
            False,
            ["--val-data", "text.txt"],
            "val_data = 'text.txt': the run has no held-out text",
            "leave val_data",
        ),
        (True, ["--config", "none.yaml"], "val_data = null: the run has another held-out text", "--val-data"),
        (True, ["--val-data", "gone.txt"], "gone.txt: no such text file", "--data PATH or --val-data PATH"),
    ],
)
def test_a_resume_with_another_held_out_text_is_refused(train, workdir, with_one, then, message, hint):
    write("none.yaml", "val_data: null\n")
    if with_one:
        train_held_out(train)
    else:
        write("text.txt", TEXT)
        assert train("--data", "text.txt", *TINY, *QUIET_TRACKERS).code == 0

    result = train("--resume", "latest", "--max-iters", 9, *then)

    assert result.code == 2
    assert result.err.splitlines()[0] == f"error: {message}"
    assert hint in result.err.splitlines()[1]


def test_only_runs_with_the_same_val_part_are_compared(train, workdir, capsys):
    import compare

    for more in ([], ["--seed", 2], ["--val-split", 0.05], ["--val-split", 0.05, "--seed", 2]):
        write("text.txt", TEXT)
        assert train("--data", "text.txt", *TINY, *QUIET_TRACKERS, *more).code == 0
    train_held_out(train)
    train_held_out(train, "--seed", 2)
    capsys.readouterr()

    compare.main(["--json"])
    rows = json.loads(capsys.readouterr().out)

    parts = [(row["text"], row["val_text"], row["val_split"]) for row in rows if row["best"]]
    assert parts == [("text.txt", "held.txt.gz", 0.1), ("text.txt", None, 0.05), ("text.txt", None, 0.1)]
    compare.main([])
    table = capsys.readouterr().out.splitlines()
    assert "val_text" in table[0]
    assert table[-1] == "* the lowest on its val part"


# --- characters that cannot be learned, line ends -----------------------------------------------------


@pytest.mark.parametrize(
    ("text", "held_out", "warning"),
    [
        ("abcd" * 99, None, None),
        (
            "abcd" * 99 + "é",
            None,
            "characters not in the part for training, which this run cannot learn (1 of 5): 'é'",
        ),
        ("é" + "abcd" * 99, None, None),
        (
            "abcd" * 99 + "XYZ",
            None,
            "characters not in the part for training, which this run cannot learn (3 of 7): 'X'",
        ),
        ("abcd" * 99 + "é", "abcdé" * 9, None),
        ("abcd" * 99, "abcdéß" * 9, "characters in held.txt only, which this run cannot learn (2 of 6): 'ß'"),
        ("abcd" * 99, "abcd" * 99, "held.txt: the held-out text is the text that is trained on"),
        ("ab\rcd" * 99, None, "text.txt: 99 line ends of CR alone, as on old Macs; to change that: tr "),
        ("ab\r\ncd\r" * 99, None, "text.txt: 99 line ends of CR alone, as on old Macs; to change that: sed "),
    ],
)
def test_what_is_rarely_meant_in_a_text_is_one_warning(train, workdir, text, held_out, warning):
    write("text.txt", text)
    flags = [] if held_out is None else ["--val-data", write("held.txt", held_out)]

    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS, *flags)

    assert result.code == 0
    assert result.err.startswith(f"warning: {warning}" if warning else "")
    assert result.err.count("\n") == (warning is not None)


@pytest.mark.parametrize(("end", "expected"), [("\r\n", "stdout"), ("\r", "stderr")])
def test_the_command_for_other_line_ends_makes_them_lf(train, workdir, end, expected):
    write("text.txt", TEXT.replace("\n", end))

    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS)

    line = next(line for line in (result.out if end == "\r\n" else result.err).splitlines() if "CR" in line)
    command, new = re.search("to change that: (.*); then use (.*)$", line).groups()
    subprocess.run(["sh", "-c", command], check=True)
    assert Path(new).read_bytes() == TEXT.encode()


def test_the_command_for_mixed_line_ends_merges_no_lines(workdir):
    write("text.txt", "a\r\nb\rc\nd\r\n\r\ne")

    (warning,) = (line for line in open_corpus("text.txt").warnings(1.0) if "CR alone" in line)

    command, new = re.search("to change that: (.*); then use (.*)$", warning).groups()
    subprocess.run(["sh", "-c", command], check=True)
    assert Path(new).read_bytes() == b"a\nb\nc\nd\n\ne"


def test_cr_lf_is_one_line_that_is_no_warning(train, workdir):
    write("text.txt", TEXT.replace("\n", "\r\n"))

    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS)

    assert result.err == ""
    assert result.out.count("CR LF") == 1
    assert result.out.startswith(
        "text.txt: its lines end with CR LF, which the samples will have too; to change"
    )


def test_tensorboard_shows_every_line_end_as_one():
    shown = []
    events: Any = SimpleNamespace(add_text=lambda tag, text, step: shown.append((tag, text, step)))

    logger._log(events, "texts", {"samples": "a\r\nb\rc\nd"}, 7)

    assert shown == [("Samples", "    a\n    b\n    c\n    d", 7)]
