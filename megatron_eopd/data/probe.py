"""Whether a tokenizer is what its files say. In: a Tokenizer. Out: nothing, or an error with both.

What is wrong with a tokenizer shows in no shape and no number, only in text that the model reads
without its spaces. Three rules; which of them hold, the vocabulary says:

1. Its ids and texts are those that the library of its file gives: tokenizers for tokenizer.json,
   sentencepiece for a tokenizer.model that stands in its place.
2. If it has a token for each of the 256 bytes, every text comes back as it was.
3. If it has tokens that begin with a space, words come back with the spaces between them.

A word-level tokenizer, which splits at white space and knows a hundred words, has neither bytes nor
spaces, and only the first rule is for it.
"""

import unicodedata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers.pre_tokenizers import ByteLevel

from megatron_eopd.data.tokenizer_base import Tokenizer
from megatron_eopd.data.tokenizer_hf import CONFIG, HuggingFaceTokenizer
from megatron_eopd.errors import ConfigError

PROBE = "\n".join(
    (
        "The quick brown fox; 'quotes', \"more\", don't - we'll (see) [it] {now}.",
        "two  three   four    spaces, a\ttab,\t\ttwo, trailing  ",
        "",
        "",
        "    def f(x: int) -> int:\r\n\treturn x**2 + 1  # na\u00efve, e\u0301 decomposed\r\n",
        "0 1 12 123 1234567890 3.14159 1,000,000 -7 2\u00b2 \u00bd",
        r"Let $x^2 + \frac{1}{2} \leq \sum_{i=1}^{n} a_i \quad n \in \mathbb{N}$, \boxed{42}.",
        "中文、日本語。한국어 Ελληνικά Русский हिन्दी ไทย",
        "العربية والأرقام ١٢٣, עברית",
        "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
        "no\u00a0break wide\u3000space zero\u200bwidth \ufeff line\u2028separator",
        "a\x00b\x07\x1b[0m\x7f",
        "#include <stdio.h>\n<a href='x'>&amp;</a> C:\\dir\\file ~/.bashrc @user #tag 100% a_b__c",
    )
)
"""Every kind of character that a prompt or an answer may hold, but the space sign of SentencePiece,
which it takes for a space. Begins with a word: libraries differ in a space at the very start."""

_SPACE_SIGNS = ("\u0120", "▁")  # of byte-level tokenizers, and of SentencePiece
_WORDS = 20
_AROUND = 6
"""Ids that an error shows on either side of the first difference."""


class Reading(NamedTuple):
    """Of a text, by one library."""

    ids: Sequence[int]
    text: str
    """Which the ids are decoded to, special tokens included."""


def check_tokenizer(tokenizer: Tokenizer, who: str) -> None:
    """`who`: the section that names it, for messages.

    Raises:
        ConfigError: it reads or writes a text otherwise than its file, or loses parts of it.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return  # read by its own library, with nothing in between
    source = tokenizer.path / "tokenizer.json"
    if source.is_file():
        _check_against_json(tokenizer, source, who)
    else:
        _check_against_sentencepiece(tokenizer, tokenizer.path / "tokenizer.model", who)
    vocabulary = tokenizer.vocabulary()
    if _has_all_bytes(vocabulary) and not _maps_characters(tokenizer):
        _check_returns(tokenizer, PROBE, who)
    _check_returns(tokenizer, _words_of(vocabulary), who)


def _check_against_json(tokenizer: HuggingFaceTokenizer, source: Path, who: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(source))
    # Left behind by training scripts; a prompt is never cut or filled up by them.
    library.no_truncation()
    library.no_padding()
    special = [token.content for token in library.get_added_tokens_decoder().values()]
    for text in (PROBE, "".join(f"{token} a{token}\n" for token in special)):
        ids = library.encode(text, add_special_tokens=False).ids
        theirs = Reading(ids, library.decode(ids, skip_special_tokens=False))
        _compare(tokenizer, text, theirs, source, who)


def _check_against_sentencepiece(tokenizer: HuggingFaceTokenizer, source: Path, who: str) -> None:
    """transformers makes merges of the pieces anew, in the order of their ids. Models whose pieces
    are ranked otherwise get other ids for the same text."""
    try:
        library = SentencePieceProcessor(model_file=str(source))
    except (OSError, RuntimeError):
        return  # no such file, or of another kind
    vocabulary = tokenizer.vocabulary()
    pieces = [library.id_to_piece(i) for i in range(len(library))]
    if any(vocabulary.get(piece) != i for i, piece in enumerate(pieces)):
        return  # a class that numbers pieces anew
    ids = library.encode(PROBE)
    _compare(tokenizer, PROBE, Reading(ids, library.decode(ids)), source, who)


def _compare(tokenizer: Tokenizer, text: str, theirs: Reading, source: Path, who: str) -> None:
    ids = tokenizer.encode_response(text)
    ours = Reading(ids, tokenizer.show(theirs.ids))
    remedy = (
        f"Set {who}.tokenizer to a directory with the model's tokenizer.json, and no more in "
        f"{CONFIG} than its special tokens and template."
    )
    if list(ours.ids) != list(theirs.ids):
        raise ConfigError(
            f"{tokenizer.path} ({who}): transformers reads a text into other ids than the file "
            f"{source.name} itself. {_difference(ours.ids, theirs.ids, source.name)}. {remedy}"
        )
    if ours.text != theirs.text:
        raise ConfigError(
            f"{tokenizer.path} ({who}): transformers makes another text of ids than the file "
            f"{source.name} itself. {_difference(ours.text, theirs.text, source.name)}. {remedy}"
        )


def _has_all_bytes(vocabulary: dict[str, int]) -> bool:
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}
    return vocabulary.keys() >= set(ByteLevel.alphabet()) or vocabulary.keys() >= fallback


def _maps_characters(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether it has a table of its own that makes characters of others, line feeds of spaces
    among them: SentencePiece's, which a model may have been trained with."""
    backend = getattr(tokenizer.library, "backend_tokenizer", None)
    normalizer = None if backend is None else backend.normalizer
    return normalizer is not None and b'"Precompiled"' in normalizer.__getstate__()


def _words_of(vocabulary: dict[str, int]) -> str:
    """A few of its own, with single spaces between them; empty if none begins with a space."""
    words = (
        token[1:]
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        if token.startswith(_SPACE_SIGNS) and token[1:].isascii() and token[1:].isalpha()
    )
    return " ".join(islice(words, _WORDS))


def _check_returns(tokenizer: Tokenizer, text: str, who: str) -> None:
    ids = tokenizer.encode_response(text)
    # Compatible characters are one to some tokenizers: ½ and 1⁄2, é of one code point and of two.
    before, after = (unicodedata.normalize("NFKC", t) for t in (text, tokenizer.decode(ids)))
    if before.strip() != after.strip():
        raise ConfigError(
            f"{tokenizer.path} ({who}): the tokenizer has tokens for every part of a text, and "
            f"gives it back changed. {_difference(after, before, 'the text')}; ids "
            f"{list(ids[:_AROUND])} …. Its pre_tokenizer, normalizer or decoder is not the one "
            f"that it was trained with: copy the model's own tokenizer files again."
        )


def _difference(ours: Sequence, theirs: Sequence, source: str) -> str:
    """Both around the first place where they differ."""
    pairs = zip(ours, theirs, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    around = slice(max(place - _AROUND, 0), place + _AROUND)
    shown = [repr(s[around] if isinstance(s, str) else list(s[around])) for s in (ours, theirs)]
    return f"From place {place} on: {shown[0]} as loaded, {shown[1]} in {source}"
