"""When a word counts as read: named rules, word accuracy and edit distance.

A rule says what of label and text is compared. An unknown character is kept by every rule, and never right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from ccd_train.data.charset import UNKNOWN

# The official evaluation keeps these of ASCII, and of Chinese the block that every charset of its family covers.
NOT_ALNUM = re.compile(f"[^A-Za-z0-9\u4e00-\u9fa5{UNKNOWN}]")
RULES: dict[str, Callable[[str], str]] = {
    "lower_alnum": lambda text: NOT_ALNUM.sub("", text.lower()),
    "case": lambda text: NOT_ALNUM.sub("", text),
    "all": lambda text: text,
}
MEANING = {
    "lower_alnum": "the official rule: lower case, only letters and digits of ASCII and Chinese characters",
    "case": "only letters and digits of ASCII and Chinese characters, in upper and lower case",
    "all": "every character",
}


@dataclass(frozen=True)
class Score:
    words: int
    correct: int
    similarity: float
    """Mean of 1 − edit distance / length of the longer of label and text; the field's 1 − NED."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.words


def same(text: str, label: str, rule: str) -> bool:
    """Whether the text is the label under a rule of RULES; never with an unknown character, whatever the label."""
    return UNKNOWN not in text and RULES[rule](text) == RULES[rule](label)


def similarity(text: str, label: str, rule: str) -> float:
    """1 − Levenshtein distance / length of the longer one, under a rule; 1 where both are empty."""
    return Levenshtein.normalized_similarity(RULES[rule](text), RULES[rule](label))


def score(pairs: Iterable[tuple[str, str]], rule: str) -> Score:
    """Scores pairs of (text, label), of which there must be one or more."""
    words = list(pairs)
    assert words, "a score of nothing"
    correct = sum(same(text, label, rule) for text, label in words)
    return Score(len(words), correct, sum(similarity(text, label, rule) for text, label in words) / len(words))
