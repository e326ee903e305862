"""What is no text in UTF-8: the message says what it is, and the command of the hint makes the text of it."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import QUIET_TRACKERS, TINY

from utils_alg1.base.errors import Alg1Error
from utils_alg1.data import text_files
from utils_alg1.data.corpus import open_corpus
from utils_alg1.data.encodings import ENCODINGS, likely_readings
from utils_alg1.data.sources import find_text
from utils_alg1.data.text_files import BOM

needs_iconv = pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")

CHINESE = """第一章 道可道，非常道。名可名，非常名。
无名天地之始；有名万物之母。
故常无，欲以观其妙；常有，欲以观其徼。
"""
TAIWAN = """道可道，非常道。名可名，非常名。
無名天地之始；有名萬物之母。
故常無，欲以觀其妙；常有，欲以觀其徼。
"""
JAPANESE = """吾輩は猫である。名前はまだ無い。
どこで生れたかとんと見当がつかぬ。
何でも薄暗いじめじめした所でニャーニャー泣いていた。
"""
KOREAN = """산에는 꽃 피네 꽃이 피네
갈 봄 여름 없이 꽃이 피네
산에 산에 피는 꽃은 저만치 혼자서 피어 있네
그래 그래 산에서 우는 작은 새여
"""
RUSSIAN = """Все счастливые семьи похожи друг на друга,
каждая несчастливая семья несчастлива по-своему.
Всё смешалось в доме Облонских.
"""
GREEK = """Σα βγεις στον πηγαιμό για την Ιθάκη,
να εύχεσαι νάναι μακρύς ο δρόμος,
γεμάτος περιπέτειες, γεμάτος γνώσεις.
"""
FRENCH = """Longtemps, je me suis couché de bonne heure.
Parfois, à peine ma bougie éteinte, mes yeux se fermaient si vite
que je n’avais pas le temps de me dire : « Je m’endors. »
"""
GERMAN = """Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte,
fand er sich in seinem Bett zu einem ungeheueren Ungeziefer verwandelt.
Er lag auf seinem panzerartig harten Rücken.
"""
POLISH = """Litwo! Ojczyzno moja! ty jesteś jak zdrowie;
Ile cię trzeba cenić, ten tylko się dowie,
Kto cię stracił. Dziś piękność twą w całej ozdobie
Widzę i opisuję, bo tęsknię po tobie.
"""


def error_of(name: str) -> Alg1Error:
    with pytest.raises(Alg1Error) as raised:
        open_corpus(find_text(name))
    assert raised.value.exit_code == 2
    assert raised.value.hint is not None
    return raised.value


def follow(hint: str) -> str:
    """Run the command of a hint in a shell; return what it says to use then."""
    command, new = re.search(
        r"(?:^|: )((?:iconv|gunzip|head|python|tr|unxz|bunzip2) .*); then use (.*)$", hint
    ).groups()
    subprocess.run(["sh", "-c", command], check=True)
    return shlex.split(new)[0]


def text_of(name: str) -> str:
    corpus = open_corpus(find_text(name))
    return corpus.tokenizer.decode(corpus.tokens.tolist())


# --- other encodings ----------------------------------------------------------------------------------


@needs_iconv
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (CHINESE, "gb18030"),
        (CHINESE, "utf-16"),
        (CHINESE, "utf-16-le"),
        (CHINESE, "utf-32"),
        (TAIWAN, "big5"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        (KOREAN, "euc_kr"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        (RUSSIAN, "cp866"),
        (GREEK, "cp1253"),
        (FRENCH, "cp1252"),
        (GERMAN, "latin-1"),
        (POLISH, "cp1250"),
    ],
    ids=lambda value: value.split()[0],
)
def test_a_text_in_another_encoding_is_converted_by_the_hint(workdir, text, encoding, packed):
    content = text.encode(encoding)
    Path("my text.txt").write_bytes(gzip.compress(content) if packed else content)

    error = error_of("my text.txt")

    assert error.message.startswith("my text.txt: not UTF-8 at byte ")
    assert text_of(follow(error.hint)) == text


def test_the_hint_shows_how_the_text_reads(train, workdir):
    Path("text.txt").write_bytes(("All is ASCII here.\n" * 9 + RUSSIAN * 9).encode("cp1251"))

    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    assert result.err.splitlines() == [
        "error: text.txt: not UTF-8 at byte 171 (0xC2), in line 10",
        "hint: in WINDOWS-1251 it reads “Все счастливые семьи похожи друг на друг”,"
        " in MAC-CYRILLIC it reads “¬се счастливые семьи похожи друг на друг”; if the first is right:"
        " iconv -f WINDOWS-1251 -t UTF-8 < text.txt > text-utf8.txt; then use text-utf8.txt",
    ]
    assert os.listdir() == ["text.txt"]


@needs_iconv
def test_an_encoding_is_named_only_if_the_whole_file_is_valid_in_it(workdir):
    text = RUSSIAN * 2000  # more than the sample that is judged
    for last, valid in ((b"", True), (b"\x98", False)):  # which WINDOWS-1251 does not have
        Path("text.txt").write_bytes(text.encode("cp1251") + last)
        hint = error_of("text.txt").hint
        assert ("WINDOWS-1251" in hint) is valid
        if valid:
            assert text_of(follow(hint)) == text


def test_bytes_in_no_encoding_get_no_command(workdir):
    Path("text.txt").write_bytes(bytes(range(128, 256)) * 20 + b"\0\xff")

    assert error_of("text.txt").hint == (
        "this is hardly a text file; if these are the token ids of another program, name the text that they"
        " were made from"
    )


SAMPLES = {  # language -> a text, the encodings in which it is written
    "fr": (
        (
            "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux "
            "se fermaient si vite que je n'avais pas le temps de me dire : « Je m'endors. » Et, une "
            "demi-heure après, la pensée qu'il était temps de chercher le sommeil m'éveillait ; je "
            "voulais poser le volume que je croyais avoir encore dans les mains et souffler ma lumière "
            "; sa sœur, au cœur pur, œuvrait déjà ; où est-elle allée ? Noël à l'île, garçon, forêt, "
            "août."
        ),
        "cp1252 iso8859_15 mac_roman cp850",
    ),
    "es": (
        (
            "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que "
            "vivía un hidalgo; ¿qué pasó? ¡Señor! Añadió él: mañana sí, según él pingüino."
        ),
        "cp1252 mac_roman cp850",
    ),
    "pt": (
        "Não há razão para a situação; avó e avô, coração, órgão, às vezes é útil, ação.",
        "cp1252 cp850",
    ),
    "de": (
        (
            "Die Straße führte über grüne Hügel; möglicherweise hätte er früher aufhören müssen. "
            "Äußerst schöne Öfen, süße Übung. „Ja“, sagte er – und ging."
        ),
        "cp1252",
    ),
    "sv": (
        (
            "Alla människor är födda fria och lika i värde och rättigheter. De är utrustade med "
            "förnuft och samvete och bör handla gentemot varandra i en anda av broderskap. Å."
        ),
        "cp1252 mac_roman",
    ),
    "pl": (
        (
            "Litwo! Ojczyzno moja! ty jesteś jak zdrowie. Ile cię trzeba cenić, ten tylko się dowie, "
            "kto cię stracił. Dziś piękność twą w całej ozdobie widzę i opisuję, bo tęsknię po tobie. "
            "Panno Święta, co Jasnej bronisz Częstochowy i w Ostrej świecisz Bramie! Ty, co gród "
            "zamkowy Nowogródzki ochraniasz z jego wiernym ludem! Źdźbło, żółw, łąka."
        ),
        "cp1250 iso8859_2 cp852",
    ),
    "cs": (
        (
            "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem "
            "a svědomím a mají spolu jednat v duchu bratrství. Řeka, ťuk, ďas, žába."
        ),
        "cp1250 iso8859_2",
    ),
    "hu": (
        (
            "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel "
            "és lelkiismerettel bírván, egymással szemben testvéri szellemben kell hogy viseltessenek. "
            "Űr, ő, tűző."
        ),
        "cp1250 iso8859_2",
    ),
    "ro": (
        (
            "Toate fiinţele umane se nasc libere şi egale în demnitate şi în drepturi. Ele sunt "
            "înzestrate cu raţiune şi conştiinţă."
        ),
        "cp1250",
    ),
    "tr": (
        (
            "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana "
            "sahiptirler, birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler. İğne, çığ, "
            "ŞĞ."
        ),
        "cp1254",
    ),
    "lt": (
        (
            "Visi žmonės gimsta laisvi ir lygūs savo orumu ir teisėmis. Jiems suteiktas protas ir "
            "sąžinė ir jie turi elgtis vienas kito atžvilgiu kaip broliai. Ėjo, įėjo, šaukštas."
        ),
        "cp1257",
    ),
    "ru": (
        (
            "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива "
            "по-своему. Все смешалось в доме Облонских. Жена узнала, что муж был в связи с бывшею в их "
            "доме француженкою-гувернанткой, и объявила мужу, что не может жить с ним в одном доме."
        ),
        "cp1251 koi8_r cp866 iso8859_5 mac_cyrillic",
    ),
    "uk": (
        (
            "Реве та стогне Дніпр широкий, сердитий вітер завива, додолу верби гне високі, горами "
            "хвилю підійма. І блідий місяць на ту пору із хмари де-де виглядав, неначе човен в синім "
            "морі, то виринав, то потопав. Їжак, є, ґанок."
        ),
        "cp1251 koi8_u",
    ),
    "el": (
        (
            "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι "
            "προικισμένοι με λογική και συνείδηση."
        ),
        "cp1253 iso8859_7",
    ),
    "he": (
        "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
        "cp1255 iso8859_8",
    ),
    "ar": (
        "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
        "cp1256 iso8859_6",
    ),
    "zh": (
        "道可道，非常道。名可名，非常名。无名天地之始，有名万物之母。故常无欲，以观其妙；常有欲，以观其徼。",
        "gb18030",
    ),
    "zht": (
        "道可道，非常道。名可名，非常名。無名天地之始，有名萬物之母。故常無欲，以觀其妙；常有欲，以觀其徼。",
        "big5",
    ),
    "ja": (
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。",
        "cp932 euc_jp",
    ),
    "ko": (
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
        "cp949",
    ),
}


@pytest.mark.parametrize("times", [1, 30])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        pytest.param(text, encoding, id=f"{language}-{encoding}")
        for language, (text, encodings) in SAMPLES.items()
        for encoding in encodings.split()
    ],
)
def test_the_likeliest_encoding_reads_the_text(workdir, text, encoding, times):
    content = (f"{text}\n" * times).encode(encoding, "ignore")
    Path("text.txt").write_bytes(content)

    first, *others = likely_readings(Path("text.txt"), content)

    python_name = next(name for name, iconv_name in ENCODINGS.items() if iconv_name == first)
    assert content.decode(python_name) == content.decode(encoding)
    assert len(others) < 3
    if encoding == "cp1250" and not set(content) & set(b"\x81\x8d\x8f\x90\x9d"):  # not in the other
        assert "WINDOWS-1252" in others


def test_the_pieces_shown_are_of_a_place_where_the_readings_differ(workdir):
    text = "Un café, déjà. " * 9 + "Ça coûte 5 € à l’œil nu. " + "Un café, déjà. " * 9
    Path("text.txt").write_bytes(content := text.encode("cp1252"))

    readings = likely_readings(Path("text.txt"), content)

    assert "5 €" in readings["WINDOWS-1252"]
    assert len(set(readings.values())) == len(readings) > 1


# --- bad bytes, and cut files -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 1 << 22])
@pytest.mark.parametrize(
    ("content", "offset", "line"),
    [
        (b"\xffabcdefgh", 0, 1),
        (b"abcd\x80efgh", 4, 1),
        ("naïve\n日本\n ".encode() + b"\xfe rest of it", 15, 3),
        (b"abc\xe2\x82abc", 3, 1),
        (b"\n\n\xed\xa0\x80abc", 2, 3),
        (b"abc\r\n\xc0\xafabc", 5, 2),
        (BOM + b"ab\xff", 5, 1),
        (b"a caf\xe9", 5, 1),
    ],
)
def test_a_byte_that_is_not_utf8_is_named(workdir, monkeypatch, content, offset, line, chunk):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk)
    Path("text.txt").write_bytes(content)

    byte = f"0x{content[offset]:02X}"
    assert error_of("text.txt").message == f"text.txt: not UTF-8 at byte {offset} ({byte}), in line {line}"
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize("n_bytes", [1 << 17, 3 << 17])
def test_the_place_is_right_beyond_the_first_piece_of_a_large_file(workdir, n_bytes):
    content = b"\xc3\xa9" * (n_bytes // 2) + b"\n\xff"
    Path("text.txt").write_bytes(content)

    assert error_of("text.txt").message == f"text.txt: not UTF-8 at byte {len(content) - 1} (0xFF), in line 2"


@needs_iconv
@pytest.mark.parametrize("position", [0, 3, 32767, 32768, 65535, 131071, 131072, 150_000])
def test_bad_bytes_in_good_utf8_are_left_out_by_the_hint(workdir, position):
    good = "é日🙂\n".encode() * 20_000
    while good[position] & 0xC0 == 0x80:  # within a character
        position += 1
    Path("text.txt").write_bytes(good[:position] + b"\xff" + good[position:])

    error = error_of("text.txt")

    line = good[:position].count(b"\n") + 1
    assert error.message == f"text.txt: not UTF-8 at byte {position} (0xFF), in line {line}"
    assert error.hint == (
        "the rest is UTF-8; to leave out what is not:"
        " iconv -c -f UTF-8 -t UTF-8 < text.txt > text-utf8.txt; then use text-utf8.txt"
    )
    subprocess.run(["sh", "-c", "iconv -c -f UTF-8 -t UTF-8 < text.txt > text-utf8.txt"])
    assert Path("text-utf8.txt").read_bytes() == good


@needs_iconv
@pytest.mark.parametrize("bad", [b"\xed\xa0\x80", b"\xed\xa0\xbd\xed\xb8\x80", b"\xc0\x80"])
def test_what_java_writes_for_surrogates_and_zeros_is_left_out_by_the_hint(workdir, bad):
    Path("text.txt").write_bytes(b"To be" + bad + b", or" + bad + b" not\n")

    hint = error_of("text.txt").hint

    assert hint.startswith("the rest is UTF-8; to leave out what is not: iconv -c -f UTF-8")
    subprocess.run(["sh", "-c", "iconv -c -f UTF-8 -t UTF-8 < text.txt > text-utf8.txt"])
    assert text_of("text-utf8.txt") == "To be, or not\n"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("whole", ["日本語", "a€", "a🙂"])
def test_a_file_that_ends_inside_a_character_was_cut_off(workdir, whole, packed):
    content = f"line one\n{whole}".encode()[:-1]
    Path("text.txt").write_bytes(gzip.compress(content) if packed else content)

    error = error_of("text.txt")

    kept = content.decode("utf-8", "ignore")
    at = len(kept.encode())
    assert error.message == (f"text.txt: it ends inside a character, at byte {at} in line 2: it was cut off")
    assert error.hint.startswith("get it whole, or leave that out: ")
    assert text_of(follow(error.hint)) == kept


# --- other kinds of files -----------------------------------------------------------------------------


def zipped(*names: str) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, "a text that is long enough\n" * 9)
        return file.getvalue()


def tarred(name: str) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = tarfile.TarInfo(name)
            info.size = 27 * 9
            archive.addfile(info, io.BytesIO(b"a text that is long enough\n" * 9))
        return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind", "command"),
    [
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\n", "a PDF", "pdftotext a.pdf a-utf8.txt"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture", "tesseract a.png stdout > a-utf8.txt"),
        ("a.jpg", b"\xff\xd8\xff\xe0", "a JPEG picture", "tesseract a.jpg stdout > a-utf8.txt"),
        ("a.tif", b"II*\0\x08\0", "a TIFF picture", "tesseract a.tif stdout > a-utf8.txt"),
        ("a.gif", b"GIF89a\x01", "a GIF picture", "tesseract a.gif stdout > a-utf8.txt"),
        ("a.rtf", rb"{\rtf1\ansi text}", "an RTF document", "pandoc -f rtf -t plain -o a-utf8.txt a.rtf"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office document", "soffice --cat a.doc > a-utf8.txt"),
        ("a.db", b"SQLite format 3\0", "an SQLite database", "sqlite3 a.db .dump > a-utf8.txt"),
        (
            "a.docx",
            zipped("word/document.xml"),
            "a Word document",
            "pandoc -f docx -t plain -o a-utf8.txt a.docx",
        ),
        (
            "a.odt",
            zipped("content.xml"),
            "an OpenDocument text",
            "pandoc -f odt -t plain -o a-utf8.txt a.odt",
        ),
        (
            "a.epub",
            zipped("META-INF/container.xml"),
            "an EPUB book",
            "pandoc -f epub -t plain -o a-utf8.txt a.epub",
        ),
        ("a.xz", b"\xfd7zXZ\0\0", "an xz file", "unxz < a.xz > a-utf8.txt"),
        ("a.zst", b"\x28\xb5\x2f\xfd", "a zstd file", "unzstd < a.zst > a-utf8.txt"),
        ("a.bz2", b"BZh91AY&SY", "a bzip2 file", "bunzip2 < a.bz2 > a-utf8.txt"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -oa-files a.7z"),
        ("a.rar", b"Rar!\x1a\x07\0", "a RAR archive", "unrar x a.rar a-files/"),
        ("-a.pdf", b"%PDF-1.7\n", "a PDF", "pdftotext ./-a.pdf ./-a-utf8.txt"),
        ("a b.pdf.gz", gzip.compress(b"%PDF-1.7\n"), "a PDF", "gunzip < 'a b.pdf.gz' > 'unpacked-a b.pdf'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_kind_is_named_with_the_way_out(train, workdir, name, content, kind, command):
    Path(name).write_bytes(content)

    result = train(f"--data={name}", *TINY, *QUIET_TRACKERS)

    assert result.code == 2
    message, hint = result.err.splitlines()
    assert message == f"error: {name}: this is {kind}, no text"
    assert re.fullmatch(f"hint: {re.escape(command)}; then use .*", hint)
    assert os.listdir() == [name]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (zipped("archive/data.pkl"), "a file of PyTorch"),
        (b"\x93NUMPY\x01\0", "a numpy array"),
        (b"\x7fELF\x02", "a program"),
        (b"\xcf\xfa\xed\xfe\x07", "a program"),
        (b"\xca\xfe\xba\xbe\0\0\0\x41", "a Java class or a program"),
        (b"PAR1\x15\x04\x15", "a Parquet file"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"RIFF\x24\x08\0\0WAVEfmt ", "a sound, film or picture"),
        (b"GGUF\x03\0\0\0", "a model in GGUF"),
        (pickle.dumps(["a", "b"]), "a pickle of Python"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_text_in_it_is_named(workdir, content, kind):
    Path("it").write_bytes(content)

    error = error_of("it")

    assert error.message == f"it: this is {kind}, no text"
    assert error.hint == "name the text that it was made from"


def test_a_pointer_of_git_lfs_is_no_text(workdir):
    Path("it").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")

    error = error_of("it")

    assert error.message == "it: this is a pointer of Git LFS, no text"
    assert error.hint == "git lfs pull, in its repository"


@pytest.mark.parametrize(
    "start", ["PAR1 is a text.", "GGUF is one.", "RIFF raff", "version https://git-lfs is"]
)
def test_words_that_files_of_other_kinds_begin_with_are_text(workdir, start):
    Path("it").write_text(start)

    assert text_of("it") == start


@pytest.mark.parametrize("high", [65, 50257])
def test_token_ids_of_another_program_are_not_said_to_be_utf16(workdir, high):
    np.random.default_rng(1).integers(0, high, 20_000, np.uint16).tofile("train.bin")
    try:
        told = "\n".join(open_corpus("train.bin").warnings(0.9))
    except Alg1Error as error:
        told = str(error.hint)

    assert "UTF-16" not in told
    assert "if these are the token ids of another program, name the text that they were made from" in told


@pytest.mark.parametrize(
    "content",
    [
        zipped("1.txt"),
        tarred("1.txt"),
        gzip.compress(tarred("1.txt")),
        gzip.compress(gzip.compress(b"text" * 9)),
    ],
    ids=["zip", "tar", "tar.gz", "gzip twice"],
)
def test_archives_are_unpacked_by_what_the_hints_say(workdir, content):
    Path("it.x").write_bytes(content)
    name = "it.x"

    for _ in range(3):
        try:
            text = text_of(name)
            break
        except Alg1Error as error:
            name = follow(error.hint)

    assert text in ("a text that is long enough\n" * 9, "text" * 9)


def test_bad_files_in_a_folder_are_named_by_themselves(workdir):
    Path("books").mkdir()
    Path("books/1.txt").write_text("a good text")
    Path("books/2.txt").write_bytes("ein schöner Text".encode("latin-1"))
    assert error_of("books").message == "books/2.txt: not UTF-8 at byte 7 (0xF6), in line 1"

    Path("books/2.txt").write_bytes(b"%PDF-1.7")
    assert error_of("books").message == "books/2.txt: this is a PDF, no text"


@needs_iconv
@pytest.mark.parametrize("name", ["books", "books/*.t*"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("drei schöne Bücher".encode("latin-1"), "drei schöne Bücher"),
        ("日本".encode()[:-1], "日"),
        ("ein schöner Text: ".encode() + b"\xff", "ein schöner Text: "),
        ("ein Text".encode("utf-16"), "ein Text"),
        (gzip.compress(gzip.compress(b"ein Text")), "ein Text"),
    ],
    ids=["latin-1", "cut", "bad byte", "utf-16", "gzip"],
)
def test_the_hint_replaces_a_file_of_several(workdir, name, packed, content, expected):
    Path("books").mkdir()
    Path("books/1.txt").write_text("one, ")
    bad = Path("books/2.txt.gz" if packed else "books/2.txt")
    bad.write_bytes(gzip.compress(content) if packed else content)

    for _ in range(3):
        try:
            text = text_of(name)
            break
        except Alg1Error as error:
            assert shlex.split(follow(error.hint)) == [name]

    assert text == f"one, {expected}"
    assert sorted(os.listdir("books")) == [".tokens", "1.txt", bad.name]


# --- what is trained on with a warning ----------------------------------------------------------------


@needs_iconv
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_text_with_zero_characters_is_told_as_what_it_probably_is(train, workdir, encoding):
    text = "To be, or not to be\n" * 30
    Path("text.txt").write_bytes(text.encode(encoding))

    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS)

    assert result.code == 0
    warning = result.err.splitlines()[0]
    assert warning.startswith(
        "warning: text.txt: it has characters of value 0: this is hardly a text file; if it"
    )
    assert text_of(follow(warning)) == text


@pytest.mark.parametrize(
    ("content", "warns"),
    [
        ("<!DOCTYPE html>\n<html><body>", True),
        ("\ufeff\n <html lang=en>", True),
        ('<?xml version="1.0"?>\n<!-- a\nb --><!---->\n<!DOCTYPE html PUBLIC>', True),
        ("<!-- a --> " * 300 + "<p>", False),
        ("<htmlish>", False),
        ("A text about <html>", False),
    ],
)
def test_html_is_trained_on_with_a_warning(workdir, content, warns):
    Path("text.txt").write_text(content * 20, encoding="utf-8")

    warnings = "\n".join(open_corpus("text.txt").warnings(0.9))

    remedy = "pandoc -f html -t plain -o text-utf8.txt text.txt; then use text-utf8.txt"
    line = f"text.txt: this is HTML, whose tags are trained on too; for its text alone: {remedy}"
    assert (line in warnings) is warns


@needs_iconv
def test_iso_2022_jp_is_named(workdir):
    Path("text.txt").write_bytes(("ASCII\n" + JAPANESE).encode("iso2022_jp"))

    line = next(line for line in open_corpus("text.txt").warnings(0.9) if "ISO" in line)

    assert line.startswith("text.txt: this is hardly UTF-8, but ISO-2022-JP; if it is: iconv -f ISO-2022-JP")
    assert text_of(follow(line)) == "ASCII\n" + JAPANESE
