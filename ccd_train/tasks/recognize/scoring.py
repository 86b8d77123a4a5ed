"""When a word counts as read: named rules, word accuracy and edit distance.

A rule says what of label and text is compared; an unknown character is kept by every rule, and never right. The
official rules know the letters of ASCII and of Chinese. For a charset with others, which they would leave out and then
call equal, they keep the letters and digits of every script.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

from rapidfuzz.distance import Levenshtein

from ccd_train.data.charset import UNKNOWN

Fold = Callable[[str], str]
# The official evaluation keeps these of ASCII, and of Chinese the block that every charset of its family covers.
NOT_ALNUM = re.compile(f"[^A-Za-z0-9\u4e00-\u9fa5{UNKNOWN}]")


def _every(text: str) -> str:
    """é is one character, whether it is stored as one code point or as two."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _letters(text: str) -> str:
    return "".join(one for one in _every(text) if one.isalnum() or one == UNKNOWN or _is_mark(one))


def _is_mark(character: str) -> bool:
    """Such as the vowels of Devanagari and Arabic."""
    return unicodedata.category(character)[0] == "M"


def _lower_letters(text: str) -> str:
    # İ is the capital of i, but its small form is i with a dot above
    return _letters(_every(text).casefold().replace("i\u0307", "i"))


OFFICIAL: dict[str, Fold] = {
    "lower_alnum": lambda text: NOT_ALNUM.sub("", text.lower()),
    "case": lambda text: NOT_ALNUM.sub("", text),
    "all": _every,
}
OF_EVERY_SCRIPT: dict[str, Fold] = {"lower_alnum": _lower_letters, "case": _letters, "all": _every}
RULES = tuple(OFFICIAL)


@cache
def is_official(characters: str) -> bool:
    """Whether the official rules know every letter of a charset."""
    letters = (one for one in characters if one.isalpha() or one.isdecimal() or _is_mark(one))
    return not any(NOT_ALNUM.match(one) for one in letters)


def rules_for(characters: str) -> dict[str, Fold]:
    """The rules by name, as they are for a charset: what each keeps of a text."""
    return OFFICIAL if is_official(characters) else OF_EVERY_SCRIPT


def meaning(rule: str, characters: str) -> str:
    """What a rule compares, for people."""
    kept = "letters and digits of " + ("ASCII and Chinese characters" if is_official(characters) else "every script")
    return {
        "lower_alnum": f"{'the official rule: ' if is_official(characters) else ''}lower case, only {kept}",
        "case": f"only {kept}, in upper and lower case",
        "all": "every character",
    }[rule]


def same(text: str, label: str, rule: Fold) -> bool:
    """Whether the text is the label under a rule; never with an unknown character, whatever the label."""
    return UNKNOWN not in text and rule(text) == rule(label)


def similarity(text: str, label: str, rule: Fold) -> float:
    """1 − Levenshtein distance / length of the longer one, under a rule; 1 where both are empty."""
    return Levenshtein.normalized_similarity(rule(text), rule(label))


def says_nothing(bare: int, words: int) -> bool:
    """Whether a score means nothing, as the rule leaves nothing of most words: they are right whatever is read."""
    return 2 * bare > words


@cache
def written(rule: Fold, characters: str) -> frozenset[str]:
    """What a charset can write, as a rule compares it."""
    return frozenset("".join(map(rule, characters)))
