"""data.py: from a text file to batches, through the cache, and what a bad file says."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, QUIET_TRACKERS, TINY
from hypothesis import example, given
from hypothesis import strategies as st

import data
from utils_alg1.base.errors import Alg1Error, disk_error
from utils_alg1.data import corpus as corpus_module
from utils_alg1.data import sources, text_files, texts

BOM = b"\xef\xbb\xbf"


@contextlib.contextmanager
def without_privileges():
    """An ordinary user's permissions for this process, where it is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user can enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        folder.chmod(0o777)


@pytest.fixture
def forbid_tokenizing(monkeypatch):
    def forbid():
        def fail(*_):
            raise AssertionError("tokenized again")

        monkeypatch.setattr(texts, "_write_tokens", fail)

    return forbid


def decoded(path: Path) -> str:
    train_data, val_data, tokenizer = data.load_data(str(path))
    return tokenizer.decode([*train_data.tolist(), *val_data.tolist()])


def message_of(path: object) -> str:
    with pytest.raises(Alg1Error) as raised:
        data.load_data(str(path))
    assert raised.value.exit_code == 2
    return raised.value.message


def found(*arguments, **options) -> Path:
    """The only file of a text."""
    (path,) = sources.find_training_text(*arguments, **options).paths
    return path


# --- batches ------------------------------------------------------------------------------------------


@given(
    block_size=st.integers(1, 40),
    spare=st.integers(0, 40),
    batch_size=st.integers(1, 9),
    split=st.sampled_from(["train", "val"]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32, np.int64]),
    seed=st.integers(0, 2**32),
)
@example(block_size=8, spare=0, batch_size=3, split="val", dtype=np.uint8, seed=0)
def test_every_sequence_is_a_slice_of_its_split_and_y_is_one_ahead(
    block_size, spare, batch_size, split, dtype, seed
):
    length = block_size + 1 + spare
    part = np.arange(length, dtype=dtype)
    other = np.full(200, 255, dtype=dtype)
    splits = (part, other) if split == "train" else (other, part)

    x, y = data.get_batch(
        split, *splits, block_size, batch_size, generator=torch.Generator().manual_seed(seed)
    )

    assert x.shape == y.shape == (batch_size, block_size)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x, x[:, :1] + torch.arange(block_size))
    assert torch.equal(y, x + 1)
    assert x.min() >= 0 and y.max() < length


def test_every_start_is_drawn_the_first_and_the_last_too():
    part = np.arange(12, dtype=np.uint8)

    x, _ = data.get_batch("train", part, part[:0], 8, 500, generator=torch.Generator().manual_seed(1))

    assert sorted(set(x[:, 0].tolist())) == [0, 1, 2, 3]


def test_the_generator_alone_decides_the_batch():
    part = np.arange(250, dtype=np.uint8)

    def batch(seed, global_seed):
        torch.manual_seed(global_seed)
        return data.get_batch("train", part, part, 8, 16, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(batch(1, 2), batch(1, 3))
    assert not torch.equal(batch(1, 2), batch(4, 2))


def test_one_generator_draws_one_batch_after_another():
    part = np.arange(250, dtype=np.uint8)
    generator = torch.Generator().manual_seed(1)

    first, second = (data.get_batch("train", part, part, 8, 16, "cpu", generator)[0] for _ in range(2))

    assert not torch.equal(first, second)


def test_arrays_and_tensors_serve_alike():
    part = np.arange(100, dtype=np.uint8)

    def batch(part):
        return data.get_batch("val", part, part, 8, 4, generator=torch.Generator().manual_seed(7))

    for one, other in zip(batch(part), batch(torch.from_numpy(part)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("length", "hint"),
    [(8, "use --block-size 7 at most"), (2, "use --block-size 1 at most"), (1, "use a longer text")],
)
def test_a_split_that_is_too_short_says_so(length, hint):
    enough, short = np.zeros(100, dtype=np.uint8), np.zeros(length, dtype=np.uint8)

    with pytest.raises(Alg1Error) as raised:
        data.get_batch("val", enough, short, 8, 1)

    assert raised.value.message == f"the val split has {length} characters, too few for block_size = 8"
    assert raised.value.hint == hint


def test_an_unknown_split_is_refused():
    part = np.zeros(100, dtype=np.uint8)
    with pytest.raises(ValueError, match="split must be train or val, not 'test'"):
        data.get_batch("test", part, part, 8, 1)


# --- text -> tokens -----------------------------------------------------------------------------------

FILE_TEXT = st.text(
    st.characters(codec="utf-8") | st.sampled_from("ab\r\n\ufeff\0é日🙂\u0301"), min_size=1, max_size=60
)


@given(text=FILE_TEXT, bom=st.booleans(), chunk=st.integers(1, 9) | st.just(1 << 22))
@example(text="日本🙂é\r\n", bom=True, chunk=1)
@example(text="\ufeffa\ufeff", bom=True, chunk=3)
@example(text="a\r\nb\rc\n", bom=False, chunk=2)
@example(text="".join(map(chr, range(300))), bom=True, chunk=4)
def test_any_text_is_encoded_as_plain_python_does_it(text, bom, chunk):
    content = (BOM if bom else b"") + text.encode()
    plain = content.decode().removeprefix("\ufeff")
    vocabulary = sorted(set(plain))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", chunk)
        path = Path(folder) / "text.txt"
        path.write_bytes(content)
        if not plain:
            assert message_of(path) == f"{path}: the file is empty"
            return

        corpus = corpus_module.open_corpus(path)

        assert corpus.tokens.tolist() == [vocabulary.index(character) for character in plain]
        assert corpus.tokenizer.vocabulary == vocabulary
        assert corpus.text.sha256 == hashlib.sha256(content).hexdigest()


def test_a_bom_is_dropped_at_the_start_only_and_newlines_are_kept(workdir):
    Path("text.txt").write_bytes(BOM + b"a\r\nb\rc\n" + BOM + b"d" * 20)

    assert decoded(Path("text.txt")) == "a\r\nb\rc\n\ufeff" + "d" * 20


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (255, np.uint8),
        (256, np.uint8),
        (257, np.uint16),
        (65_536, np.uint16),
        (65_537, np.uint32),
    ],
)
def test_tokens_take_the_smallest_unsigned_type(workdir, vocab_size, expected):
    characters = [chr(point) for point in range(vocab_size + 2048) if not 0xD800 <= point < 0xE000]
    text = "".join(characters[:vocab_size])
    Path("text.txt").write_bytes(text.encode())

    train_data, val_data, tokenizer = data.load_data("text.txt")

    assert train_data.dtype == val_data.dtype == expected
    assert tokenizer.vocab_size == vocab_size
    assert [*train_data.tolist(), *val_data.tolist()] == list(range(vocab_size))


@pytest.mark.parametrize(
    ("splits", "lengths"),
    [
        ((), (900, 100)),
        ((0.5,), (500, 500)),
        ((0.5, 0.1), (500, 100)),
        ((0.9, 0.1), (900, 100)),
        ((0.7, 0.3), (700, 300)),
    ],
)
def test_the_splits_are_the_beginning_and_the_end_of_the_text(workdir, splits, lengths):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    Path("text.txt").write_text(text, encoding="utf-8")

    train_data, val_data, tokenizer = data.load_data("text.txt", *splits)

    assert (len(train_data), len(val_data)) == lengths
    assert tokenizer.decode(train_data.tolist()) == text[: lengths[0]]
    assert tokenizer.decode(val_data.tolist()) == text[-lengths[1] :]


def test_a_text_is_never_in_memory_as_a_whole(workdir, monkeypatch):
    size = 16 << 20
    Path("text.txt").write_bytes(b"0123456789abcdef" * (size // 16))
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1 << 16)
    peaks = []
    for _ in ("tokenized", "from the cache"):
        tracemalloc.start()
        train_data, val_data, _ = data.load_data("text.txt")
        data.get_batch("train", train_data, val_data, 8, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert isinstance(train_data, np.memmap)
        assert len(train_data) + len(val_data) == size

    assert max(peaks) < size / 2


# --- bad files ----------------------------------------------------------------------------------------


def make_nothing(path):
    pass


def make_loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("it", Path.touch, "it: the file is empty"),
        ("it", lambda path: path.write_bytes(BOM), "it: the file is empty"),
        ("it", Path.mkdir, "it: this folder has no .txt or .txt.gz file"),
        ("it", os.mkfifo, "it is not a file that can be read twice"),
        ("it", make_nothing, "it: no such text file"),
        ("it", make_loop, f"it: cannot be read: {os.strerror(errno.ELOOP)}"),
        ("there/it", make_nothing, "there/it: no such text file"),
        ("x" * 300, make_nothing, f"{'x' * 300}: cannot be read: {os.strerror(errno.ENAMETOOLONG)}"),
    ],
    ids=["empty", "bom", "folder", "fifo", "missing", "loop", "no folder", "long name"],
)
def test_what_is_no_text_file_says_what_it_is(train, workdir, name, make, message):
    make(Path(name))

    result = train("--data", name, *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    assert result.err.splitlines()[0] == f"error: {message}"
    assert "runs" not in os.listdir()


def test_a_file_that_may_not_be_read_says_why(open_folder):
    path = open_folder / "text.txt"
    path.write_text("some text")
    path.chmod(0)

    with without_privileges():
        message = message_of(path)

    assert message == f"{path}: cannot be read: {os.strerror(errno.EACCES)}"


def test_a_folder_that_may_not_be_entered_says_why(open_folder):
    folder = open_folder / "closed"
    folder.mkdir(mode=0)

    with without_privileges():
        message = message_of(folder / "text.txt")

    assert message == f"{folder / 'text.txt'}: cannot be read: {os.strerror(errno.EACCES)}"


def test_a_text_that_changes_while_it_is_read_is_refused(workdir, monkeypatch):
    path = Path("text.txt")
    path.write_text("abc" * 50)
    scan_text = texts.scan_text

    def change_afterwards(files):
        seen = scan_text(files)
        path.write_text("abcz" * 50)
        return seen

    monkeypatch.setattr(texts, "scan_text", change_afterwards)

    assert message_of(path) == "text.txt: it changed while it was read"
    monkeypatch.setattr(texts, "scan_text", scan_text)
    assert decoded(path) == "abcz" * 50


# --- too short ----------------------------------------------------------------------------------------


def test_the_largest_block_that_fits_trains_and_one_more_does_not(train, workdir):
    Path("text.txt").write_text("abcdefgh" * 5)

    refused = train("--data", "text.txt", *TINY, *QUIET_TRACKERS, "--block-size", 4)

    assert refused.code == 2
    assert refused.err.splitlines() == [
        "error: text.txt: 40 characters are too few for block_size = 4: 4 of them are for validation",
        "hint: use a longer text, or --block-size 3 at most",
    ]
    assert not Path("runs").exists()
    trained = train("--data", "text.txt", *TINY, *QUIET_TRACKERS, "--block-size", 3)
    assert trained.code == 0, trained.err


def test_a_text_too_short_for_any_block_says_so(train, workdir):
    Path("text.txt").write_text("abcdefgh")

    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    assert result.err.splitlines() == [
        "error: text.txt: 8 characters are too few for block_size = 8, and for any other: 1 of them are for"
        " validation",
        "hint: use a longer text: each of train_split and val_split needs two characters",
    ]


@given(length=st.integers(1, 200), train_split=st.floats(0.01, 0.99), block_size=st.integers(1, 60))
def test_check_block_size_agrees_with_get_batch(length, train_split, block_size):
    files = text_files.TextFiles.of("x")
    corpus = corpus_module.Corpus(texts.Text(files, "", ["a"], [0], length, n_crlf=0, n_cr=0))
    corpus.tokens = np.zeros(length, dtype=np.uint8)
    val_split = 1 - train_split

    def draws():
        splits = corpus.split(train_split, val_split)
        try:
            for name in ("train", "val"):
                data.get_batch(name, *splits, block_size, 1)
        except Alg1Error:
            return False
        return True

    def passes():
        try:
            corpus.check_block_size(block_size, train_split, val_split)
        except Alg1Error:
            return False
        return True

    assert passes() == draws()


# --- the cache ----------------------------------------------------------------------------------------


def cache_files() -> tuple[Path, Path]:
    (tokens,) = Path(texts.CACHE_FOLDER).glob("*.bin")
    (about,) = Path(texts.CACHE_FOLDER).glob("*.json")
    return tokens, about


def test_the_second_load_reads_the_cache(text_file, forbid_tokenizing):
    first = corpus_module.open_corpus(text_file)
    assert len(first.tokens)
    forbid_tokenizing()

    second = corpus_module.open_corpus(text_file)

    assert np.array_equal(first.tokens, second.tokens)
    assert first.tokenizer.vocabulary == second.tokenizer.vocabulary
    assert sorted(path.suffix for path in Path(texts.CACHE_FOLDER).iterdir()) == [".bin", ".json"]


def test_only_the_first_use_of_the_tokens_writes_anything(text_file):
    before = os.listdir()
    corpus = corpus_module.open_corpus(text_file)
    assert os.listdir() == before
    assert corpus.text.n_characters == len(corpus.tokens) == len(text_file.read_text())
    assert texts.CACHE_FOLDER in os.listdir()


def test_tokens_that_are_in_the_cache_need_the_text_no_more(text_file):
    first = corpus_module.open_corpus(text_file).tokens
    second = corpus_module.open_corpus(text_file)
    text_file.unlink()
    assert second.text.n_characters == len(first)
    assert np.array_equal(second.tokens, first)


def test_the_cache_goes_with_the_content_not_with_the_name(text_file, forbid_tokenizing):
    text = decoded(text_file)
    forbid_tokenizing()

    assert decoded(text_file.rename("renamed.txt")) == text


def test_changed_content_of_the_same_size_and_time_is_tokenized_anew(workdir):
    path = Path("text.txt")
    path.write_text("abcd" * 10)
    before = path.stat()
    assert decoded(path) == "abcd" * 10

    path.write_text("abdc" * 10)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert decoded(path) == "abdc" * 10


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(**changes):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))

    return change


def edit_found(**changes):
    def change(path):
        about = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(about | {"found": about["found"] | changes}))

    return change


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        ("tokens", flip_last_byte),
        ("tokens", cut_last_byte),
        ("tokens", cut_in_half),
        ("tokens", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
        ("tokens", lambda path: path.write_bytes(b"")),
        ("tokens", lambda path: path.write_bytes(bytes(len(path.read_bytes())))),
        ("tokens", Path.unlink),
        ("about", Path.unlink),
        ("about", lambda path: path.write_bytes(b"")),
        ("about", lambda path: path.write_bytes(b"\xff\xfe\x00")),
        ("about", lambda path: path.write_text("[]")),
        ("about", cut_in_half),
        ("about", edit(format=2)),
        ("about", edit_found(vocabulary=list("abd"))),
        ("about", edit_found(vocabulary=None)),
        ("about", edit_found(n_characters=7)),
        ("about", edit(found={})),
        ("about", edit(sha256="0" * 64)),
    ],
)
def test_a_damaged_cache_is_rebuilt(workdir, monkeypatch, which, damage):
    path = Path("text.txt")
    text = "abcdcb" * 10
    path.write_text(text)
    decoded(path)
    whole = [file.read_bytes() for file in cache_files()]
    damage(cache_files()[which == "about"])
    name = "_write_tokens" if which == "tokens" else "scan_text"
    made, times = getattr(texts, name), []
    monkeypatch.setattr(texts, name, lambda *args: times.append(1) or made(*args))

    assert decoded(path) == text
    assert decoded(path) == text
    assert len(times) == 1
    assert [file.read_bytes() for file in cache_files()] == whole


def test_the_cache_is_read_whatever_the_locale(workdir):
    Path("text.txt").write_text("é日🙂" * 20, encoding="utf-8")
    decoded(Path("text.txt"))
    script = (
        "from utils_alg1.data import corpus, texts; texts._write_tokens = texts.scan_text = None;"
        "corpus.open_corpus('text.txt').tokenizer.vocabulary == sorted('é日🙂') or exit(1)"
    )
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(PROJECT),
    }

    done = subprocess.run(
        [sys.executable, "-c", script.encode("ascii", "backslashreplace").decode()],
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr


def test_a_text_in_a_read_only_folder_is_tokenized_and_nothing_is_left(open_folder):
    path = open_folder / "text.txt"
    path.write_text("abcd" * 10)
    open_folder.chmod(0o555)

    with without_privileges():
        text = decoded(path)

    assert text == "abcd" * 10
    assert os.listdir(open_folder) == ["text.txt"]


@pytest.mark.parametrize("failing", ["mkdir", "open"])
def test_a_cache_that_cannot_be_made_costs_nothing_but_time(workdir, monkeypatch, failing):
    path = Path("text.txt")
    path.write_text("abcd" * 10)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        if failing == "mkdir":
            patch.setattr(Path, "mkdir", refuse)
        else:
            patch.setattr(texts, "atomic_file", refuse)
        train_data, val_data, tokenizer = data.load_data("text.txt")

    assert isinstance(train_data, np.memmap)
    assert tokenizer.decode([*train_data, *val_data]) == "abcd" * 10
    assert not list(workdir.glob(f"{texts.CACHE_FOLDER}/*"))


def test_a_full_disk_while_the_cache_is_written_leaves_no_half_of_it(workdir, monkeypatch):
    path = Path("text.txt")
    path.write_text("abcd" * 10)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 8)
    write_all, calls = texts.write_all, []

    def fill_up(descriptor, tokens):
        calls.append(tokens)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, tokens)

    monkeypatch.setattr(texts, "write_all", fill_up)

    assert decoded(path) == "abcd" * 10
    assert os.listdir(texts.CACHE_FOLDER) == []


@pytest.mark.parametrize("failing", ["atomic_file", "write_atomically"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_failed_write_of_the_cache_is_one_warning_and_a_read_only_folder_none(
    text_file, train, monkeypatch, failing, number
):
    def fail(path, *_):
        assert path.parent.name == texts.CACHE_FOLDER
        error = OSError(number, os.strerror(number))
        raise disk_error(f"write {path}", error) from error

    monkeypatch.setattr(texts, failing, fail)
    result = train(*TINY, *QUIET_TRACKERS, "--quiet", "--data", "text.txt", "--max-iters", 1)
    warning = (
        f"warning: text.txt cannot be cached in .tokens: {os.strerror(number)}; every start reads it anew\n"
    )
    assert result.code == 0
    assert result.err.count(warning) == result.err.count("cached") == (number not in texts.READ_ONLY)


def test_tokens_that_cannot_be_mapped_in_the_cache_are_in_a_temporary_file(workdir, monkeypatch):
    Path("text.txt").write_text("abcd" * 10)
    memmap = np.memmap

    def refuse(file, *arguments):
        if isinstance(file, Path):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return memmap(file, *arguments)

    monkeypatch.setattr(np, "memmap", refuse)
    assert decoded(Path("text.txt")) == "abcd" * 10


def test_without_a_place_for_the_tokens_the_error_is_the_disks(workdir, monkeypatch):
    Path("text.txt").write_text("abcd" * 10)

    def fill_up(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(texts, "write_all", fill_up)

    with pytest.raises(Alg1Error) as raised:
        data.load_data("text.txt")

    reason = os.strerror(errno.ENOSPC)
    assert raised.value.message == f"cannot write the tokens of text.txt to a temporary file: {reason}"
    assert raised.value.exit_code == 4


# --- the default corpus -------------------------------------------------------------------------------

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.promised))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def home(monkeypatch):
    """The place that tiny Shakespeare is downloaded from, on this machine."""
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.body, server.promised, server.status, server.asked = PLAY, len(PLAY), 200, 0
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def test_without_a_network_the_python_documentation_serves_and_one_line_says_so(workdir):
    lines: list[str] = []

    path = found(say=lines.append)

    assert path == Path("data/python-docs.txt")
    assert path.read_text(encoding="utf-8") == python_docs()
    assert len(path.read_text(encoding="utf-8")) > 100_000
    assert os.listdir("data") == ["python-docs.txt"]
    assert lines[0] == "downloading tiny Shakespeare to data/input.txt"
    assert len(lines) == 2
    assert lines[1].startswith("tiny Shakespeare cannot be downloaded (")
    assert lines[1].endswith("); training on the Python documentation (python-docs) instead")


def test_train_starts_on_the_fallback(train, workdir):
    result = train(*TINY, *QUIET_TRACKERS)

    assert result.code == 0, result.err
    assert "training on the Python documentation (python-docs) instead\n" in result.out
    assert not Path("data/input.txt").exists()


def test_only_the_text_for_training_falls_back(train, workdir, home):
    Path("mine.txt").write_text("abcdefgh" * 20)
    result = train(*TINY, *QUIET_TRACKERS, "--data", "mine.txt", "--val-data", "data/input.txt")

    assert (result.code, result.out, home.asked) == (2, "", 0)
    assert result.err.splitlines()[0] == "error: data/input.txt: no such text file"
    assert os.listdir() == ["mine.txt"]


def test_the_default_file_is_used_where_it_is(workdir, home):
    Path("data").mkdir()
    Path("data/input.txt").write_text("my own text, not to be replaced")
    lines: list[str] = []

    assert found(say=lines.append) == Path("data/input.txt")
    assert decoded(Path("data/input.txt")) == "my own text, not to be replaced"
    assert lines == [] and home.asked == 0


@pytest.mark.parametrize(
    ("name", "file"), [("data/input.txt", "input.txt"), ("shakespeare", "shakespeare.txt")]
)
def test_the_download_is_kept_and_not_repeated(workdir, home, name, file):
    lines: list[str] = []

    for _ in range(2):
        assert found(name, lines.append) == Path("data", file)

    assert Path("data", file).read_bytes() == PLAY
    assert os.listdir("data") == [file]
    assert lines == [f"downloading tiny Shakespeare to data/{file}"]
    assert home.asked == 1


def test_a_download_that_cannot_be_kept_leaves_nothing(workdir, home, monkeypatch):
    def fill_up(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", fill_up)

    with pytest.raises(Alg1Error) as raised:
        found("shakespeare")

    assert raised.value.message == (f"cannot write data/shakespeare.txt: {os.strerror(errno.ENOSPC)}")
    assert raised.value.exit_code == 4
    assert os.listdir("data") == []


def test_a_file_in_the_way_of_the_data_folder_is_an_error(workdir, home):
    Path("data").touch()

    with pytest.raises(Alg1Error) as raised:
        found("shakespeare")

    assert raised.value.message == "data: a file is in the way of this folder"


@pytest.mark.parametrize(
    "spoil",
    [
        {"body": PLAY[:-1], "promised": len(PLAY) - 1},
        {"body": PLAY[:-1] + b"!"},
        {"body": b"", "promised": 0},
    ],
)
def test_a_download_with_another_digest_is_refused_and_not_kept(workdir, home, spoil):
    vars(home).update(spoil)

    with pytest.raises(Alg1Error) as raised:
        found("shakespeare")

    assert raised.value.message == "the download is not tiny Shakespeare (its SHA-256 differs)"
    assert raised.value.hint == "put the text at data/shakespeare.txt, or use --data python-docs"
    assert os.listdir() == []


@pytest.mark.parametrize("spoil", [{"status": 404}, {"status": 500}, {"body": PLAY[:50]}])
def test_a_download_that_fails_falls_back(workdir, home, spoil):
    vars(home).update(spoil)
    lines: list[str] = []

    assert found(say=lines.append) == Path("data/python-docs.txt")
    assert os.listdir("data") == ["python-docs.txt"]
    assert lines[1].endswith("; training on the Python documentation (python-docs) instead")


def test_an_answer_that_is_not_http_falls_back(workdir, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")

        def answer():
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"please log in\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        path = found(say=lambda _: None)
        thread.join()

    assert path == Path("data/python-docs.txt")


def test_python_docs_by_name_needs_no_network_and_mends_its_file(workdir, home):
    path = found("python-docs", lambda line: pytest.fail(line))
    path.write_text("something else")

    assert found("python-docs") == path == Path("data/python-docs.txt")
    assert path.read_text(encoding="utf-8") == python_docs()
    assert home.asked == 0


def test_shakespeare_by_name_does_not_fall_back(workdir):
    with pytest.raises(Alg1Error, match=r"^tiny Shakespeare cannot be downloaded \("):
        found("shakespeare", lambda _: None)

    assert os.listdir() == []
