"""Find the files of the text that a flag names.

`find_training_text` is for --data, `find_text` for --val-data, and `find_files`, which writes nothing, for a
text that is only read. To add a named corpus NAME, which is downloaded or generated, add a function that
writes FOLDER/NAME.txt and returns this path to `NAMED_CORPORA`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from parameters import DataConfig, Parameters
from utils_alg1.base.errors import Alg1Error, unreadable
from utils_alg1.base.files import make_folder, write_atomically
from utils_alg1.base.problems import nearest
from utils_alg1.base.text import shell_quote
from utils_alg1.data.text_files import TextFiles

DEFAULT_PATH = DataConfig.data_path
FOLDER = Path(DEFAULT_PATH).parent
SUFFIXES = (".txt", ".txt.gz")  # of the files of a folder that are read
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT = 5  # seconds

Say = Callable[[str], None]  # shows the user one line


def training_text(name: str = DEFAULT_PATH, say: Say = print) -> str:
    """Return the name of the text that is trained on where --data names this one: the same if it is there.

    If the default path is missing, tiny Shakespeare is downloaded to it; without a network, python-docs takes
    its place.
    """
    path = _path_of(name)
    if path == Path(DEFAULT_PATH) and not file_mode(path):
        try:
            _shakespeare(say, path)
        except Alg1Error as error:
            say(f"{error.message}; training on the Python documentation (python-docs) instead")
            return "python-docs"
    return name


def name_text(params: Parameters, say: Say) -> None:
    """Name the text that is trained on in the parameters, where another one is named; see `training_text`."""
    asked = params.data.data_path
    params.data.data_path = training_text(asked, say)
    if params.data.data_path != asked:
        params.origins["data_path"] = f"{asked} is missing"


def find_training_text(name: str = DEFAULT_PATH, say: Say = print) -> TextFiles:
    """Return the files of the text that --data names; see `training_text` and `find_text`."""
    return find_text(training_text(name, say), say)


def find_text(name: str, say: Say = print, flag: str = "--data") -> TextFiles:
    """Return the files of a text or of a named corpus, which is made unless that was done before.

    `shakespeare` is downloaded and `python-docs` generated; `find_files` finds any other text.

    Raises:
        Alg1Error: there is no such file, or shakespeare cannot be downloaded.
    """
    if name in NAMED_CORPORA:
        return TextFiles.of(NAMED_CORPORA[name](say))
    return find_files(name, flag, NAMED_CORPORA)


def find_files(name: str, flag: str, corpora: Collection[str] = ()) -> TextFiles:
    """Return the files of a text that is there; nothing is written.

    It is the path of a file; the path of a folder, whose .txt and .txt.gz files are read in the order of
    their names; a pattern such as "books/*.txt", whose matches are; or a corpus that was made before.
    `corpora` are those that the flag makes, which the hint for a missing file names.

    Raises:
        Alg1Error: there is no such file.
    """
    if "://" in name:
        hint = f"download it first: curl -o input.txt {shell_quote(name)}; then {flag} input.txt"
        raise Alg1Error(f"{flag} {name}: must be a file on this machine", hint)
    path = _path_of(name)
    mode = file_mode(path)
    if stat.S_ISREG(mode):
        return TextFiles.of(path)
    if stat.S_ISDIR(mode):
        return TextFiles(name, _files_in(path, flag))
    if mode:
        raise Alg1Error(f"{path} is not a file that can be read twice", "save the text to a file")
    if glob.has_magic(name):
        return TextFiles(name, _matches(str(path), flag))
    hint = f"check the path of {flag}"
    if corpora:
        hint += f"; {flag} python-docs is there without a file or a network"
    raise Alg1Error(f"{path}: no such text file{nearest(name, corpora)}", hint)


def _path_of(name: str) -> Path:
    """Return the path that a name stands for; for a named corpus, that of its file."""
    return FOLDER / f"{name}.txt" if name in NAMED_CORPORA else Path(os.path.expanduser(name))


def file_mode(path: Path) -> int:
    """Return the st_mode of a path, or 0 if nothing is there. Raises Alg1Error if it cannot be read."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise unreadable(path, error) from None


def is_stream(path: Path) -> bool:
    """Return whether a path is neither a file nor a folder, such as a pipe: it can be read only once."""
    mode = file_mode(path)
    return mode != 0 and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _files_in(folder: Path, flag: str) -> tuple[Path, ...]:
    """Return the text files of a folder, without hidden ones, in the order of their names."""
    try:
        visible = sorted(
            path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise unreadable(folder, error) from None
    found = tuple(path for path in visible if path.name.lower().endswith(SUFFIXES))
    if not found:
        raise _no_text_in(folder, visible, flag)
    _refuse_twins(found)
    return found


def _no_text_in(folder: Path, files: list[Path], flag: str) -> Alg1Error:
    """Return the error for a folder that holds other files only, or other folders."""
    suffixes = Counter(path.suffix for path in files).most_common(1)
    pattern = f"*{suffixes[0][0]}" if suffixes else "**/*.txt" if any(folder.glob("*/")) else ""
    hint = f"put a text there, or name another: {flag} PATH"
    if pattern:
        hint = f"name the files with a pattern in quotes, as in {flag} {shell_quote(str(folder / pattern))}"
    return Alg1Error(f"{folder}: this folder has no {' or '.join(SUFFIXES)} file", hint)


def _matches(pattern: str, flag: str) -> tuple[Path, ...]:
    """Return the files that match a pattern, in the order of their names; `**` is any number of folders."""
    found = tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name))
    if not found:
        text = f"{flag} {pattern}: no file matches this pattern"
        raise Alg1Error(text, "check its folder, and how the names of the files end")
    _refuse_twins(found)
    return found


def _refuse_twins(paths: tuple[Path, ...]) -> None:
    """Raise Alg1Error for a file that is there packed and unpacked: it would be trained on twice."""
    for twin in {path.with_suffix("") for path in paths if path.suffix == ".gz"}.intersection(paths):
        raise Alg1Error(f"{twin} and {twin}.gz: the same text would be read twice", "move one of them away")


def _shakespeare(say: Say, path: Path = FOLDER / "shakespeare.txt") -> Path:
    if path.exists():
        return path
    import http.client
    import urllib.request

    say(f"downloading tiny Shakespeare to {path}")
    hint = f"put the text at {path}, or use --data python-docs"
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT) as response:
            text = response.read(1 << 24)
    # URLError is an OSError; ValueError means a bad proxy setting, HTTPException a response that is not HTTP.
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Alg1Error(f"tiny Shakespeare cannot be downloaded ({reason})", hint) from None
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise Alg1Error("the download is not tiny Shakespeare (its SHA-256 differs)", hint)
    make_folder(path.parent)
    write_atomically(path, text)
    return path


def _python_docs(_: Say) -> Path:
    """Write the language reference that every Python ships to a text file, unless it is there already."""
    from pydoc_data.topics import topics

    path = FOLDER / "python-docs.txt"
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    if path.exists() and path.read_bytes() == text:
        return path
    make_folder(path.parent)
    write_atomically(path, text)  # replaces that of another Python version
    return path


NAMED_CORPORA: dict[str, Callable[[Say], Path]] = {
    "shakespeare": _shakespeare,
    "python-docs": _python_docs,
}
