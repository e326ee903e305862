"""Tell what a file is that is no text in UTF-8, and which command makes one of it."""

from __future__ import annotations

import codecs
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import UNDECODED, shell_quote
from utils_alg1.data.encodings import NOT_ASCII, decodes, likely_readings
from utils_alg1.data.text_files import GZIP, iter_bytes, open_bytes

HEAD_BYTES = 4096
SAMPLE_BYTES = 1 << 16  # of a text whose encoding is looked for
NO_TEXT = "this is hardly a text file"
TOKEN_IDS = "if these are the token ids of another program, name the text that they were made from"
UNKNOWN_ENCODING = "its encoding is not known: save it as UTF-8 in a program that shows it well"
PRINTABLE = 0.9  # of the characters of a text, at the least
HIGH_BYTES = bytes(range(0x80, 0x100))  # those that are not ASCII
# Not UTF-8, but Java and some databases write them: halves of a surrogate pair, and zero in two bytes.
MODIFIED_UTF8 = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]|\xc0\x80")

# In a command, OLD is the file, NEW the text to be made of it, and FOLDER a folder to unpack it to.
ICONV = "iconv -f {} -t UTF-8 < OLD > NEW"
DROP = "iconv -c -f UTF-8 -t UTF-8"
PANDOC = "pandoc -f {} -t plain -o NEW OLD"
OCR = "tesseract OLD stdout > NEW"
MADE_FROM = "name the text that it was made from"
UNZIP = "python -m zipfile -e OLD FOLDER"
# What begins like this is no text: its first bytes, what it is, the command that makes a text of it.
KINDS = (
    (rb"%PDF-", "a PDF", "pdftotext OLD NEW"),
    (rb"\x89PNG\r\n", "a PNG picture", OCR),
    (rb"\xff\xd8\xff", "a JPEG picture", OCR),
    (rb"GIF8[79]a", "a GIF picture", OCR),
    (rb"\{\\rtf\d", "an RTF document", PANDOC.format("rtf")),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office document", "soffice --cat OLD > NEW"),
    (rb"SQLite format 3\0", "an SQLite database", "sqlite3 OLD .dump > NEW"),
    (rb"\x1f\x8b", "gzip within gzip", "gunzip < OLD > NEW"),
    (rb"BZh\d1AY&SY", "a bzip2 file", "bunzip2 < OLD > NEW"),
    (rb"\xfd7zXZ\0", "an xz file", "unxz < OLD > NEW"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file", "unzstd < OLD > NEW"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -oFOLDER OLD"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unrar x OLD FOLDER/"),
    (rb"(?s).{257}ustar", "a tar archive", "python -m tarfile -e OLD FOLDER"),
    (rb"\x93NUMPY", "a numpy array", MADE_FROM),
    (rb"\x7fELF|MZ\x90\0|[\xce\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]", "a program", MADE_FROM),
    (rb"\xca\xfe\xba\xbe", "a Java class or a program", MADE_FROM),
    (rb"PAR1[\0-\x1f]", "a Parquet file", MADE_FROM),
    (rb"ARROW1\0\0", "an Arrow file", MADE_FROM),
    (rb"\x89HDF\r\n", "an HDF5 file", MADE_FROM),
    (rb"II\*\0|MM\0\*", "a TIFF picture", OCR),
    (rb"(?s)RIFF.{4}(WAVE|AVI |WEBP)", "a sound, film or picture", MADE_FROM),
    (rb"GGUF[\0-\x09]", "a model in GGUF", MADE_FROM),
    (rb"\x80[\x02-\x05]", "a pickle of Python", MADE_FROM),
    (rb"version https://git-lfs\S*\s+(ext-|oid )", "a pointer of Git LFS", "git lfs pull, in its repository"),
)
ZIP = b"PK\x03\x04"
ZIPS = {  # a member of a ZIP archive -> what it is, the command
    "word/document.xml": ("a Word document", PANDOC.format("docx")),
    "META-INF/container.xml": ("an EPUB book", PANDOC.format("epub")),
    "content.xml": ("an OpenDocument text", PANDOC.format("odt")),
    "data.pkl": ("a file of PyTorch", MADE_FROM),
}
MARKUP = re.compile(
    rb"(\xef\xbb\xbf)?(?>\s+|<\?xml.*?\?>|<!--.*?-->)*+<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL
)
JAPANESE_MAIL = re.compile(rb"\x1b\$[@B]")  # ISO-2022-JP begins Japanese so


def refuse_other_kinds(path: Path, within: str | None = None) -> None:
    """Raise Alg1Error if the first bytes of a file tell that it is no text.

    `within` is as in `fill_in`.
    """
    with open_bytes(path) as stream:
        head = stream.read(HEAD_BYTES)
    kind, command = next(
        ((kind, command) for start, kind, command in KINDS if re.match(start, head)), ("", "")
    )
    if head.startswith(ZIP):
        kind, command = _kind_of_zip(path)
    if kind:
        hint = fill_in(command, path, within=within) if "OLD" in command else command
        raise Alg1Error(f"{path}: this is {kind}, no text", hint)


def _kind_of_zip(path: Path) -> tuple[str, str]:
    """Return what a ZIP archive is, by the names of its members, and the command."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):  # or it is packed once more
        return "a ZIP archive", UNZIP
    found = (
        ZIPS[member] for member in ZIPS for name in names if name == member or name.endswith(f"/{member}")
    )
    return next(found, ("a ZIP archive", UNZIP))


def is_markup(path: Path) -> bool:
    """Return whether a text begins as HTML does."""
    with open_bytes(path) as stream:
        return MARKUP.match(stream.read(HEAD_BYTES)) is not None


def is_iso_2022_jp(path: Path) -> bool:
    """Return whether a text has the bytes that begin Japanese in ISO-2022-JP, and is valid in it."""
    with open_bytes(path) as stream:
        return JAPANESE_MAIL.search(stream.read(SAMPLE_BYTES)) is not None and decodes(path, "iso2022_jp")


def fill_in(command: str, path: Path, suffix: str = "utf8", within: str | None = None) -> str:
    """Return a command with the names of a file and its outputs filled in, and what to use then.

    `suffix` ends the name of the new text. It takes the place of the file if that is one of several, of the
    folder or pattern `within`: beside it, it would be read as well.
    """
    name = path.name.removesuffix(".gz")
    stem = name.removesuffix(Path(name).suffix)
    with path.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
    new, folder = path.with_name(f"{stem}-{suffix}.txt"), path.with_name(f"{stem}-files")
    unpacked = packed and "< OLD" not in command
    if packed and not unpacked:
        command = "gunzip < OLD | " + command.replace(" < OLD", "")
    elif unpacked:  # then this file is told what to do
        command, new = "gunzip < OLD > NEW", path.with_name(f"unpacked-{name}")
    used = _quoted(folder if "FOLDER" in command else new)
    if within is not None and "FOLDER" in command:
        used = f"{used} in place of this file"
    elif within is not None:
        made = "; test -s NEW" if DROP in command else ""  # it fails where it drops something
        repacked = " && gzip NEW && mv NEW.gz OLD" if packed and not unpacked else " && mv NEW OLD"
        command, used = command + made + repacked, _quoted(Path(within))
    names = {"OLD": path, "NEW": new, "FOLDER": folder}
    filled = re.sub("OLD|NEW|FOLDER", lambda word: _quoted(names[word[0]]), command)
    return f"{filled}; then use {used}"


def _quoted(path: Path) -> str:
    """Return a path as one types it in a shell, where it is no option of a command."""
    return shell_quote(f"./{path}" if str(path).startswith("-") else str(path))


class _Fault(NamedTuple):
    """The first byte of a file that is not UTF-8."""

    at: int  # its index in the unpacked bytes
    line: int  # counted from 1
    byte: int
    cut: bool  # it begins a character, in the middle of which the file ends
    n_good: int  # bytes of non-ASCII characters before it
    sample: bytes  # from the beginning of its line, or from it where the line is long


def not_utf8(path: Path, within: str | None = None) -> Alg1Error:
    """Return the error for a file that is not UTF-8; `within` is as in `fill_in`."""
    fault = _find_fault(path)
    if fault is None:
        return Alg1Error(f"{path}: it changed while it was read", "train on a copy of it")
    if fault.cut:
        text = f"{path}: it ends inside a character, at byte {fault.at} in line {fault.line}: it was cut off"
        command = fill_in(f"head -c {fault.at} < OLD > NEW", path, within=within)
        return Alg1Error(text, f"get it whole, or leave that out: {command}")
    text = f"{path}: not UTF-8 at byte {fault.at} (0x{fault.byte:02X}), in line {fault.line}"
    good, bad = _count_characters(fault)
    leave_out = fill_in(f"{DROP} < OLD > NEW", path, within=within)
    if good > bad or _is_modified_utf8(fault.sample):
        return Alg1Error(text, f"the rest is UTF-8; to leave out what is not: {leave_out}")
    if wide := wide_encoding(path):
        return Alg1Error(text, f"this is {wide}: {fill_in(ICONV.format(wide), path, within=within)}")
    if b"\0" in fault.sample:  # text in an 8-bit encoding has no zero bytes
        return Alg1Error(text, f"{NO_TEXT}; {TOKEN_IDS}")
    otherwise = f"to leave it out: {leave_out}; or " if bad == 1 else ""
    return Alg1Error(text, otherwise + _encoding_hint(path, fault.sample, within))


def _find_fault(path: Path) -> _Fault | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes, n_high, line, line_start = 0, 0, 1, 0
    for chunk in itertools.chain(iter_bytes(path), [b""]):
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            data, good = error.object, error.object[: error.start]
            n_held = len(data) - len(chunk)  # bytes of the chunk before this one
            begin, n_good = n_bytes - n_held, n_high - n_held + _count_high(good)
            at, line = begin + error.start, line + good.count(b"\n")
            line_start = begin + good.rindex(b"\n") + 1 if b"\n" in good else line_start
            # One byte alone may be a letter in another encoding.
            cut = not chunk and (n_good > 0 or len(data) > 1)
            with open_bytes(path) as stream:
                stream.seek(line_start if at - line_start < SAMPLE_BYTES // 2 else at)
                return _Fault(at, line, data[error.start], cut, n_good, stream.read(SAMPLE_BYTES))
        if b"\n" in chunk:
            line, line_start = line + chunk.count(b"\n"), n_bytes + chunk.rindex(b"\n") + 1
        n_bytes, n_high = n_bytes + len(chunk), n_high + _count_high(chunk)
    return None


def _count_high(data: bytes) -> int:
    """Return how many bytes are not ASCII."""
    return len(data) - len(data.translate(None, HIGH_BYTES))


def _count_characters(fault: _Fault) -> tuple[int, int]:
    """Count the characters that tell of UTF-8, before the fault and in its sample, and its bad bytes."""
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(fault.sample)
    n_bad = len(UNDECODED.findall(text))
    return fault.n_good // 2 + len(NOT_ASCII.findall(text)) - n_bad, n_bad


def _is_modified_utf8(sample: bytes) -> bool:
    """Return whether bytes are UTF-8 but for MODIFIED_UTF8."""
    rest, n = MODIFIED_UTF8.subn(b"", sample)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(rest)
    except UnicodeDecodeError:
        return False
    return n > 0


def wide_encoding(path: Path) -> str | None:
    """Return the encoding of a file with two or four bytes for each character, by iconv's name, or None.

    It has a byte order mark, or the zero bytes of ASCII characters in the places that tell the byte order.
    """
    with open_bytes(path) as stream:
        head = stream.read(HEAD_BYTES)
    zeros, n = [head[i::4].count(0) for i in range(4)], len(head) // 4
    ways = (
        ("UTF-32", head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))),
        ("UTF-16", head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))),
        ("UTF-32LE", min(zeros[2:]) >= n > 2 * zeros[0]),
        ("UTF-32BE", min(zeros[:2]) >= n > 2 * zeros[3]),
        ("UTF-16LE", zeros[1] + zeros[3] > 2 * (zeros[0] + zeros[2])),
        ("UTF-16BE", zeros[0] + zeros[2] > 2 * (zeros[1] + zeros[3])),
    )
    return next((name for name, fits in ways if fits and _reads(path, name)), None)


def _reads(path: Path, encoding: str) -> bool:
    """Return whether a whole file is valid in an encoding of wide characters, and its beginning is text."""
    with open_bytes(path) as stream:
        head = codecs.getincrementaldecoder(encoding)("ignore").decode(stream.read(HEAD_BYTES))
    n_text = sum(character.isprintable() or character.isspace() for character in head)
    return n_text >= PRINTABLE * len(head) and decodes(path, encoding)


def _encoding_hint(path: Path, sample: bytes, within: str | None) -> str:
    """Return how to convert a text from the likeliest encoding, and how it reads in the likely ones."""
    readings = likely_readings(path, sample)
    if not readings:
        return UNKNOWN_ENCODING
    shown = ", ".join(f"in {name} it reads \u201c{preview}\u201d" for name, preview in readings.items())
    condition = "if that is right" if len(readings) == 1 else "if the first is right"
    return f"{shown}; {condition}: {fill_in(ICONV.format(next(iter(readings))), path, within=within)}"
