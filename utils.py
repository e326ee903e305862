"""The tokenizer: from characters to tokens and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from utils_alg1.base.errors import Alg1Error

if TYPE_CHECKING:
    import numpy

N_CODE_POINTS = 0x110000  # Unicode code points run from 0 to N_CODE_POINTS - 1


class Tokenizer:
    """A character-level tokenizer; token i is the i-th character of the sorted vocabulary.

    Unpacks as `encode, decode, vocab_size = tokenizer`.
    """

    def __init__(self, characters: Iterable[str]):
        self.vocabulary: list[str] = sorted(set(characters))  # by code point
        self.stoi = {character: token for token, character in enumerate(self.vocabulary)}
        self.itos = dict(enumerate(self.vocabulary))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def __iter__(self) -> Iterator[Callable | int]:
        return iter((self.encode, self.decode, self.vocab_size))

    @property
    def default_prompt(self) -> str:
        """What an empty prompt becomes: a newline if the vocabulary has it, else the first character."""
        return "\n" if "\n" in self.stoi else self.vocabulary[0]

    @property
    def replacement(self) -> str:
        """What replaces an unknown character: a space if the vocabulary has it, else the first character."""
        return " " if " " in self.stoi else self.vocabulary[0]

    def unseen(self, text: str) -> list[str]:
        """Return the characters of `text` that are not in the vocabulary, sorted."""
        return sorted(set(text) - self.stoi.keys())

    def encode(self, text: str) -> list[int]:
        """Convert text to tokens; raises Alg1Error naming the characters that are not in the vocabulary."""
        try:
            return [self.stoi[character] for character in text]
        except KeyError:
            unseen = show_characters(self.unseen(text))
            raise Alg1Error(f"not in the model's vocabulary: {unseen}", "leave them out") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Convert tokens to text; raises Alg1Error for a token outside 0 <= token < vocab_size."""
        try:
            return "".join([self.itos[token] for token in tokens])
        except KeyError as error:
            text = f"token {error.args[0]} is outside the vocabulary of {self.vocab_size}"
            raise Alg1Error(text, "use the tokenizer that made the tokens") from None

    def token_type(self) -> numpy.dtype:
        """Return the smallest unsigned integer type that holds every token."""
        import numpy

        return numpy.min_scalar_type(max(0, self.vocab_size - 1))

    def lookup_table(self) -> numpy.ndarray:
        """Return an array (N_CODE_POINTS,) from code point to token, to encode large texts by indexing.

        Code points outside the vocabulary map to 0.
        """
        import numpy

        table = numpy.zeros(N_CODE_POINTS, dtype=self.token_type())
        table[[ord(character) for character in self.vocabulary]] = numpy.arange(self.vocab_size)
        return table


def show_characters(characters: Iterable[str], limit: int = 10) -> str:
    """Format characters for a message: 'é' (U+00E9), ... and how many more there are."""
    ordered = sorted(characters)
    named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in ordered[:limit])
    return named + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


create_tokenizer = Tokenizer  # of a text, which is an iterable of characters
