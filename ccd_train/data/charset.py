"""Character sets, and labels as the tokens that a recogniser reads and writes.

Of a charset with N characters, token i < N is its i-th character, N an unknown character, N + 1 both the beginning and
the end of a word, and N + 2 padding, which fills targets and is never predicted. A recogniser has N + 2 classes.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

from ccd_train.errors import UserError

log = logging.getLogger(__name__)

LENGTH = 25  # tokens of a target, its beginning and end among them
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # how an unknown character is written
NAMED = {
    # The order of charset_36.txt and charset_62.txt in the official data layout.
    "36": ascii_lowercase + "1234567890",
    "62": ascii_lowercase + "1234567890" + ascii_uppercase,
    # MMOCR's dictionary, which the official recogniser uses: printable ASCII without ^ { | } and the space.
    "DICT90": digits + ascii_lowercase + ascii_uppercase + "!\"#$%&'()*+,-./:;<=>?@[\\]_`~",
}
NUMBERED = re.compile(r"(\d+)\t(.)")
BLANKS = r"[\s\ufeff\u200b\0]+"  # white space, and the marks that editors and other programs leave
_ENDS = re.compile(f"^{BLANKS}|{BLANKS}$")


def word_of(stored: bytes, errors: str = "strict") -> str:
    """The word that a label is: UTF-8, without blanks at its ends, which files written by hand have.

    >>> word_of(b" two words\\n")
    'two words'
    """
    return _ENDS.sub("", stored.decode(errors=errors))


@dataclass
class Tally:
    """What is odd about the labels of some data."""

    labels: int = 0
    empty: int = 0
    """Labels without any character, from which nothing can be learnt."""
    cut: int = 0
    """Labels with more characters than a target has room for beside its beginning and end."""
    unknown: int = 0
    """Labels with characters that the charset does not hold."""
    characters: Counter[str] = field(default_factory=Counter)
    """How often each unknown character occurs."""
    trimmed: int = 0
    """Labels with blanks at their ends, which were taken off."""
    bare: int = 0
    """Labels, not the empty ones, of which the rule that scores them leaves nothing."""

    def add(self, other: Tally) -> None:
        """Counts the labels of other data as well."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def describe(self) -> str:
        """One line."""
        share = f" ({self.cut / self.labels:.1%})" if self.cut else ""
        line = f"{self.labels} labels: {self.empty} empty, {self.cut} too long{share}, "
        line += f"{self.unknown} with unknown characters"
        common = " ".join(f"{character!r}×{count}" for character, count in self.characters.most_common(10))
        line += f" ({common})" if common else ""
        line += f", {self.trimmed} with blanks at their ends (taken off)" if self.trimmed else ""
        return line + (f", {self.bare} of which the rule leaves nothing" if self.bare else "")


@dataclass(frozen=True)
class Charset:
    characters: str
    """Each once, in the order of their tokens."""
    name: str = ""
    """For people: the charset's name or file."""

    @property
    def unknown(self) -> int:
        return len(self.characters)

    @property
    def end(self) -> int:
        """The token before the first character and after the last."""
        return len(self.characters) + 1

    @property
    def padding(self) -> int:
        return len(self.characters) + 2

    @property
    def classes(self) -> int:
        """How many tokens a recogniser may predict: all but padding."""
        return len(self.characters) + 2

    @cached_property
    def folds_case(self) -> bool:
        """A charset without capital letters reads labels in lower case."""
        return self.characters == self.characters.lower()

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {character: token for token, character in enumerate(self.characters)}

    def encode(self, label: str, length: int = LENGTH) -> list[int]:
        """The label's target, `length` tokens: beginning, characters, end, padding; cut off where it is too long."""
        tokens = [self._tokens.get(character, self.unknown) for character in self._spelled(label)]
        target = [self.end, *tokens, self.end][:length]
        return target + [self.padding] * (length - len(target))

    def too_long(self, label: str, length: int = LENGTH) -> bool:
        """Whether the label has more characters than a target has room for beside its beginning and end."""
        return len(self._spelled(label)) > length - 2

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of predicted tokens (without a beginning), up to their end; unknown characters become "\ufffd"."""
        text = []
        for token in tokens:
            if token == self.end:
                break
            if token != self.padding:
                text.append(UNKNOWN if token == self.unknown else self.characters[token])
        return "".join(text)

    def tally(self, labels: Iterable[str], length: int = LENGTH, rule: Callable[[str], str] | None = None) -> Tally:
        """Counts what encode would lose of these labels, and of how many the rule leaves nothing."""
        tally = Tally()
        for label in labels:
            odd = [character for character in self._spelled(label) if character not in self._tokens]
            tally.labels += 1
            tally.empty += not label
            tally.cut += self.too_long(label, length)
            tally.bare += rule is not None and label != "" and not rule(label)
            tally.unknown += bool(odd)
            tally.characters.update(odd)
        return tally

    def _spelled(self, label: str) -> str:
        """With the characters of this charset: é may be one code point or two, and the charset knows one of both."""
        folded = label.lower() if self.folds_case else label
        if folded.isascii() or self._tokens.keys() >= set(folded):
            return folded
        forms = (unicodedata.normalize(form, folded) for form in ("NFC", "NFD"))
        return next((form for form in forms if self._tokens.keys() >= set(form)), folded)


def read_charset(name: str) -> Charset:
    """A charset by its name (36, 62, DICT90) or out of a UTF-8 text file. Raises UserError.

    The file holds one character a line, or `number<TAB>character` with numbers that count from 0, or one line with all
    the characters.
    """
    if name in NAMED:
        return Charset(NAMED[name], name)
    path = Path(name)
    try:
        lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); write the charset as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(
            f"charset {name}: no such name ({', '.join(NAMED)}) and no file to read ({error.strerror})"
        ) from None
    while lines and not lines[-1]:
        lines.pop()
    blank = [str(number) for number, line in enumerate(lines, start=1) if not line]
    if blank:
        log.warning("%s: line %s is blank and no character (PaddleOCR counts it as one)", path, ", ".join(blank))
    return Charset(_characters([line for line in lines if line], path), path.name)


def _characters(lines: Sequence[str], path: Path) -> str:
    numbered = [NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered):
        numbers = [int(match[1]) for match in numbered if match]
        if numbers != list(range(len(lines))):
            raise UserError(f"{path}: its numbers must count 0, 1, 2, …, but they go {numbers[:5]}…")
        characters = "".join(match[2] for match in numbered if match)
    elif len(lines) == 1 and "\t" not in lines[0]:
        characters = lines[0]
    else:
        wrong = next((number for number, line in enumerate(lines, start=1) if len(line) != 1), None)
        if wrong is not None:
            raise UserError(
                f"{path}: line {wrong} is {lines[wrong - 1]!r}; write one character a line, number<TAB>character, or "
                "all characters on a single line"
            )
        characters = "".join(lines)
    if not characters:
        raise UserError(f"{path}: no characters in it; write one a line")
    doubled = [character for character, count in Counter(characters).items() if count > 1]
    if doubled:
        raise UserError(f"{path}: {', '.join(map(repr, doubled))} more than once; name each character once")
    return characters
