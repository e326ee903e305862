"""Tokenizing a text: megabytes per second and peak memory, compared with nanoGPT's prepare.py.

    python benchmarks/tokens.py --nanogpt PATH
    python benchmarks/tokens.py --megabytes 2000 --rounds 1

Every measurement is a process of its own. ALG1's first run does all that a first training run on a text does:
it validates and hashes it, collects its vocabulary, and writes its tokens to the cache, synced to disk. The
second run finds them there. nanoGPT's script builds Python lists, so its memory grows with the text, and it
gets a shorter one.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import child, machine, parser, table

OURS = """
from utils_alg1.data.corpus import open_corpus
began = time.perf_counter()
characters = len(open_corpus(sys.argv[1]).tokens)
report(seconds=time.perf_counter() - began, characters=characters)
"""
NANOGPT = """
import io, runpy, contextlib
began = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    runpy.run_path("prepare.py", run_name="__main__")
report(seconds=time.perf_counter() - began)
"""
IMPORT_ONLY = "import utils_alg1.data.corpus; report()"
# Code points of the words: lower case; Chinese; emoji; accented Latin.
ALPHABETS = [(0x61, 0x7A), (0x4E00, 0x9FA5), (0x1F600, 0x1F640), (0xC0, 0x17F)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    options.add_argument("--megabytes", type=int, default=200)
    options.add_argument("--peer-megabytes", type=int, default=20, help="length of nanoGPT's text")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", type=Path, help="where the texts are written, and deleted afterwards")
    args = options.parse_args()
    if args.quick:
        args.megabytes, args.peer_megabytes, args.rounds = 1, 1, 1
    print(machine(), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        idle = child(IMPORT_ONLY, folder=folder)["peak"]
        for kind in ("ASCII", "mixed UTF-8"):
            rows += measure(kind, args, folder, idle)
    table(rows)


def measure(kind: str, args: Any, folder: Path, idle: int) -> list[dict[str, Any]]:
    """Measure one kind of text: the rows of the table."""
    text, short = folder / "text.txt", folder / "input.txt"
    write_text(text, kind, args.megabytes)
    peer = args.nanogpt is not None
    if peer:
        write_text(short, kind, args.peer_megabytes)
        shutil.copy(args.nanogpt / "data" / "shakespeare_char" / "prepare.py", folder)
        (folder / "requests.py").touch()  # prepare.py imports it for a download that is not needed here
    results: dict[str, list[dict[str, Any]]] = {"first": [], "second": [], "nanoGPT": []}
    for _ in range(args.rounds):
        shutil.rmtree(folder / ".tokens", ignore_errors=True)
        results["first"].append(child(OURS, text, folder=folder))
        results["second"].append(child(OURS, text, folder=folder))
        if peer:
            results["nanoGPT"].append(child(NANOGPT, folder=folder))
    size, short_size = text.stat().st_size, short.stat().st_size if peer else 0
    text.unlink()
    characters = results["first"][0]["characters"]
    speeds = {who: [size / done["seconds"] / 1e6 for done in results[who]] for who in ("first", "second")}
    speeds["nanoGPT"] = [short_size / done["seconds"] / 1e6 for done in results["nanoGPT"]]
    rows = []
    for who, done in results.items():
        if done:
            peak = max(one["peak"] for one in done)
            ours = who != "nanoGPT"
            rows.append(
                {
                    "text": kind,
                    "who": f"ALG1, {who} run" if ours else who,
                    "MB": (size if ours else short_size) / 1e6,
                    "MB/s, median": statistics.median(speeds[who]),
                    "MB/s, best": max(speeds[who]),
                    "x nanoGPT": statistics.median(speeds[who]) / statistics.median(speeds["nanoGPT"])
                    if peer
                    else None,
                    "peak memory, MB": peak / 1e6,
                    "bytes a character, beyond the start": max(0, peak - idle)
                    / (characters * (1 if ours else short_size / size)),
                }
            )
    return rows


def write_text(path: Path, kind: str, megabytes: int) -> None:
    """Write a text of that size: a piece of random words, repeated."""
    draw = random.Random(1)
    alphabets = ALPHABETS if kind != "ASCII" else ALPHABETS[:1]

    def word() -> str:
        low, high = draw.choice(alphabets)
        return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(2, 12)))

    piece = "".join(word() + draw.choice(" \n") for _ in range(100_000)).encode()
    with path.open("wb") as file:
        left = megabytes * 10**6
        while left > 0:
            file.write(piece if left >= len(piece) else piece[:left].decode(errors="ignore").encode())
            left -= len(piece)


if __name__ == "__main__":
    main()
