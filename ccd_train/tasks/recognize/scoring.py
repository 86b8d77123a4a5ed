"""When a word counts as read: named rules, word accuracy and edit distance.

A rule says what of label and text is compared. An unknown character is kept by every rule, and never right.
"""

from __future__ import annotations

import re
from collections.abc import Callable

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


def same(text: str, label: str, rule: str) -> bool:
    """Whether the text is the label under a rule of RULES; never with an unknown character, whatever the label."""
    return UNKNOWN not in text and RULES[rule](text) == RULES[rule](label)


def similarity(text: str, label: str, rule: str) -> float:
    """1 − Levenshtein distance / length of the longer one, under a rule; 1 where both are empty."""
    return Levenshtein.normalized_similarity(RULES[rule](text), RULES[rule](label))
