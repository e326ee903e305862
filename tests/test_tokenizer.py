"""utils.py: characters to tokens and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from utils import N_CODE_POINTS, Tokenizer, create_tokenizer, show_characters
from utils_alg1.base.errors import Alg1Error

ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
ANY_TEXT = st.text(ANY_CHARACTER)


@given(ANY_TEXT)
@example("\ud800 lone \udfff")
@example("nul\0nul")
@example("e\u0301 combining, é composed")
@example("astral 🙂 \U0010ffff")
@example("line\r\nline\u2028")
def test_any_text_comes_back_as_it_was(text):
    encode, decode, vocab_size = create_tokenizer(text)

    tokens = encode(text)

    assert decode(tokens) == text
    assert set(tokens) == set(range(vocab_size))


@given(ANY_TEXT)
def test_the_vocabulary_is_the_sorted_set_of_characters(text):
    tokenizer = create_tokenizer(text)

    assert tokenizer.vocabulary == sorted(set(text))
    assert tokenizer.vocab_size == len(set(text))
    assert [tokenizer.encode(character) for character in tokenizer.vocabulary] == [
        [token] for token in range(tokenizer.vocab_size)
    ]


def test_tokens_follow_the_code_points():
    assert create_tokenizer("cab\nA").encode("\nAabc") == [0, 1, 2, 3, 4]


def test_a_combining_accent_is_a_character_of_its_own():
    assert create_tokenizer("e\u0301é").vocabulary == ["e", "é", "\u0301"]


@given(ANY_TEXT.filter(bool))
def test_the_lookup_table_encodes_as_encode_does(text):
    tokenizer = create_tokenizer(text)

    points = [ord(character) for character in text]

    assert tokenizer.lookup_table()[points].tolist() == tokenizer.encode(text)


def test_the_lookup_table_has_a_place_for_every_code_point():
    assert create_tokenizer("ab").lookup_table().shape == (N_CODE_POINTS,)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("abz", "'z' (U+007A)"),
        ("zaza", "'z' (U+007A)"),
        ("🙂\nab", "'\\n' (U+000A), '🙂' (U+1F642)"),
        ("\ud800", "'\\ud800' (U+D800)"),
    ],
)
def test_unseen_characters_are_named(text, named):
    with pytest.raises(Alg1Error) as raised:
        create_tokenizer("abc").encode(text)

    assert raised.value.message == f"not in the model's vocabulary: {named}"
    assert raised.value.exit_code == 2


def test_a_long_list_of_characters_is_cut():
    assert show_characters("abcdefghij") == ", ".join(f"{c!r} (U+{ord(c):04X})" for c in "abcdefghij")
    assert show_characters("cbadefghijkl").endswith("'j' (U+006A) and 2 more")


def test_unseen_lists_each_character_once_and_sorted():
    assert create_tokenizer("abc").unseen("zaxbzé") == ["x", "z", "é"]


@pytest.mark.parametrize("token", [-1, 3, 10**9])
def test_a_token_outside_the_vocabulary_is_named(token):
    with pytest.raises(Alg1Error) as raised:
        create_tokenizer("abc").decode([0, token, 1])

    assert raised.value.message == f"token {token} is outside the vocabulary of 3"


def test_nothing_is_nothing():
    tokenizer = create_tokenizer("abc")

    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (1, np.uint8),
        (255, np.uint8),
        (256, np.uint8),
        (257, np.uint16),
        (65_536, np.uint16),
        (65_537, np.uint32),
    ],
)
def test_the_token_type_is_the_smallest_that_holds_every_token(vocab_size, expected):
    tokenizer = Tokenizer(map(chr, range(vocab_size)))

    assert tokenizer.token_type() == expected
    assert int(tokenizer.lookup_table()[vocab_size - 1]) == vocab_size - 1


@pytest.mark.parametrize(
    ("text", "default_prompt", "replacement"),
    [("a\n b", "\n", " "), ("cba", "a", "a"), ("b a", " ", " "), ("\nab", "\n", "\n")],
)
def test_default_prompt_and_replacement_are_of_the_vocabulary(text, default_prompt, replacement):
    tokenizer = create_tokenizer(text)

    assert (tokenizer.default_prompt, tokenizer.replacement) == (default_prompt, replacement)
