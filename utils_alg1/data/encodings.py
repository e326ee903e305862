"""Tell in which encodings a text that is not UTF-8 is likely to be, by the letters of the languages."""

from __future__ import annotations

import codecs
import collections
import contextlib
import functools
import itertools
import math
import re
from pathlib import Path

from utils_alg1.base.text import without_controls
from utils_alg1.data.text_files import iter_bytes

N_GUESSES = 3
PREVIEW_LENGTH = 40  # characters
MAX_PLACES = 1000  # where readings differ, among which the place of the previews is chosen
NOT_ASCII = re.compile("[^\0-\x7f]")

# Encodings that are looked for: Python's name -> iconv's. Of those that read a text alike the first is named.
MULTI_BYTE = {
    "gb18030": "GB18030",
    "big5hkscs": "BIG5-HKSCS",
    "cp932": "CP932",
    "euc_jp": "EUC-JP",
    "cp949": "CP949",
}
SINGLE_BYTE = {
    "cp1252": "WINDOWS-1252",
    "iso8859_15": "ISO-8859-15",
    "cp1251": "WINDOWS-1251",
    "koi8_r": "KOI8-R",
    "koi8_u": "KOI8-U",
    "iso8859_5": "ISO-8859-5",
    "mac_cyrillic": "MAC-CYRILLIC",
    "cp866": "CP866",
    "cp1250": "WINDOWS-1250",
    "iso8859_2": "ISO-8859-2",
    "cp852": "CP852",
    "cp1253": "WINDOWS-1253",
    "iso8859_7": "ISO-8859-7",
    "cp1254": "WINDOWS-1254",
    "cp1255": "WINDOWS-1255",
    "cp1256": "WINDOWS-1256",
    "iso8859_6": "ISO-8859-6",
    "cp1257": "WINDOWS-1257",
    "cp850": "CP850",
    "cp437": "CP437",
    "mac_roman": "MACINTOSH",
    "tis_620": "TIS-620",
}
ENCODINGS = MULTI_BYTE | SINGLE_BYTE

# The letters of languages that are not ASCII, the most frequent first.
ALPHABETS = (
    "éàèêçùâîôûœëïü",  # French
    "üäöß",  # German
    "óíáéñúü",  # Spanish
    "ãçáéíóõêâúàôü",  # Portuguese
    "äöåøæé",  # Swedish, Danish, Norwegian, Finnish
    "èàùòéì",  # Italian
    "íáðóöæéúþý",  # Icelandic
    "łąężśćóńź",  # Polish
    "íáěéřčžýšůúóťňďľĺŕôä",  # Czech, Slovak
    "éáőöóüíúű",  # Hungarian
    "čšžćđ",  # Croatian, Slovene
    "ăîţâşșț",  # Romanian
    "ıüşğçöâîû",  # Turkish
    "ėšąųįžęūčāīēģķļņõäöü",  # Lithuanian, Latvian, Estonian
    "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё",  # Russian
    "оанівитреслкудмпзьябгйчхцжшюїєщфґў",  # Ukrainian, Belarusian
    "αοιετσνηυρπκμλςωδγίάχόθέήβφύξώζψ",  # Greek
    "יוהלאתרבשמנםכדחעקפטזגסןצךץף",  # Hebrew
    "اليمنوتربةعدسفهكحقجشطىصخذزأضءغثئإظآؤ",  # Arabic
    "านรอกเงมยลวดทสตะ่ปบคหแจพชขใ้ไโีิืัุู็์ำผซถธณศญภษฟฉฐ",  # Thai
)
PUNCTUATION = "’“”«»–—…„‘\xa0¿¡°§€"
# Costs in nats, -log(probability). That of a letter follows Zipf's law: the k-th has a share of 1/k.
PUNCTUATION_COST = 4.0
UPPER_COST = 1.0  # more than the small letter
OTHER_COST = 9.0
NATURAL_COST = 4.0  # each character of a text in one of these languages costs less on average
MARGIN = 1.0  # a reading that costs more than the best one by this is not shown


def decodes(path: Path, encoding: str) -> bool:
    """Return whether a whole file is valid in an encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in itertools.chain(iter_bytes(path), [b""]):
            decoder.decode(chunk, final=not chunk)
    except UnicodeError:
        return False
    return True


def likely_readings(path: Path, sample: bytes) -> dict[str, str]:
    """Return how a file reads in up to N_GUESSES encodings, by iconv's names: the likeliest first.

    The whole file is valid in each of them. The pieces shown are of a place where the readings differ.
    """
    texts: dict[str, str] = {}
    for encoding in _likely_encodings(sample):
        text = sample.decode(encoding, "ignore")
        if text not in texts.values() and decodes(path, encoding):
            texts[encoding] = text
        if len(texts) == N_GUESSES:
            break
    previews = _previews([*texts.values()])
    return {ENCODINGS[encoding]: preview for encoding, preview in zip(texts, previews, strict=True)}


def _likely_encodings(sample: bytes) -> list[str]:
    """Return encodings, by Python's names, the likeliest first, of which a text may be in any."""
    from charset_normalizer import from_bytes

    costs = {}
    for name in SINGLE_BYTE:
        with contextlib.suppress(UnicodeDecodeError):
            costs[name] = _cost(sample.decode(name))
    single = sorted(costs, key=costs.__getitem__)  # those that cost the same stay in their order
    if single and costs[single[0]] < NATURAL_COST:
        likely = [name for name in single if costs[name] <= costs[single[0]] + MARGIN]
        if "cp1250" in likely and "cp1252" in costs:  # much alike, and the languages known here are not all
            likely.insert(likely.index("cp1250") + 1, "cp1252")
        return likely
    matches = from_bytes(sample[: sample.rfind(b"\n") + 1] or sample, cp_isolation=[*MULTI_BYTE])
    names = [name for match in matches for name in (match.encoding, *match.could_be_from_charset)]
    return [name for name in dict.fromkeys([*names, *MULTI_BYTE]) if name in MULTI_BYTE] + single


def _cost(text: str) -> float:
    """Return the mean cost of the characters of a text that are not ASCII, in the language that fits best."""
    counts = collections.Counter("".join(NOT_ASCII.findall(text)))

    def total(costs: dict[str, float]) -> float:
        return sum(n * costs.get(character, OTHER_COST) for character, n in counts.items())

    return min(map(total, _letter_costs())) / max(1, counts.total())


@functools.cache
def _letter_costs() -> list[dict[str, float]]:
    """Return the cost of each letter and punctuation mark, for each of ALPHABETS."""
    tables = []
    for alphabet in ALPHABETS:
        sum_of_shares = sum(1 / rank for rank in range(1, len(alphabet) + 1))
        small = {letter: math.log(rank * sum_of_shares) for rank, letter in enumerate(alphabet, 1)}
        upper = {letter.upper(): cost + UPPER_COST for letter, cost in small.items()}
        tables.append(dict.fromkeys(PUNCTUATION, PUNCTUATION_COST) | upper | small)
    return tables


def _previews(texts: list[str]) -> list[str]:
    """Return a piece of each text, on one line, around the place where most of them differ."""
    if len(texts) == 1:
        match = NOT_ASCII.search(texts[0])
        return [_piece(texts[0], match.start() if match else 0)]
    columns = enumerate(zip(*texts, strict=False))
    places = (i for i, characters in columns if len(set(characters)) > 1)
    best = max(
        itertools.islice(places, MAX_PLACES),
        key=lambda at: len({_piece(text, at) for text in texts}),
        default=0,
    )
    return [_piece(text, best) for text in texts]


def _piece(text: str, at: int) -> str:
    """Return PREVIEW_LENGTH characters of a text, on one line, with the one at `at` in the middle."""
    start = max(0, at - PREVIEW_LENGTH // 2)
    return " ".join(without_controls(text[start : start + PREVIEW_LENGTH]).split())
