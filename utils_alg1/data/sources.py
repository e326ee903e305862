"""Find the text file that --data names: a path, or a named corpus that is downloaded or generated.

To add a named corpus, add a function that returns its text file to `NAMED_CORPORA`.
"""

from __future__ import annotations

import hashlib
import shlex
import stat
from collections.abc import Callable
from pathlib import Path

from parameters import DataConfig
from utils_alg1.base.errors import Alg1Error, unreadable
from utils_alg1.base.files import make_folder, write_atomically
from utils_alg1.base.problems import nearest

DEFAULT_PATH = DataConfig.data_path
FOLDER = Path(DEFAULT_PATH).parent
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT = 5  # seconds

Say = Callable[[str], None]  # shows the user one line


def find_corpus(data_path: str = DEFAULT_PATH, say: Say = print) -> Path:
    """Return the path of the text file that --data names.

    `shakespeare` is downloaded and `python-docs` generated, unless that was done before; anything else is a
    path. If the default path is missing, tiny Shakespeare is downloaded to it; without a network, python-docs
    is used instead.

    Raises:
        Alg1Error: the file does not exist, is not a regular file, or shakespeare cannot be downloaded.
    """
    if data_path in NAMED_CORPORA:
        return NAMED_CORPORA[data_path](say)
    if "://" in data_path:
        hint = f"download it first: curl -o input.txt {shlex.quote(data_path)}; then --data input.txt"
        raise Alg1Error(f"--data {data_path}: must be a file on this machine", hint)
    path = Path(data_path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise unreadable(path, error) from None
    if stat.S_ISREG(mode):
        return path
    if stat.S_ISDIR(mode):
        raise Alg1Error(f"{path} is a folder", "name a text file in it: --data PATH")
    if mode:
        raise Alg1Error(f"{path} is not a file that can be read twice", "save the text to a file")
    if path != Path(DEFAULT_PATH):
        raise Alg1Error(
            f"{path}: no such text file{nearest(data_path, NAMED_CORPORA)}",
            "check the path of --data; --data python-docs is there without a file or a network",
        )
    try:
        return _shakespeare(say, path)
    except Alg1Error as error:
        say(f"{error.message}; training on the Python documentation (python-docs) instead")
    return _python_docs(say)


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
