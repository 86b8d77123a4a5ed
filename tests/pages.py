"""README.md and docs/*.md as data: their commands, links, options and quoted messages."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")
INDENTED = re.compile(r"^    (?=(?:ccd-|bash |python ))(.+)\n", re.MULTILINE)  # Markdown's other kind of code
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Command:
    """One command as a reader types it."""

    place: str
    """docs/data.md:9"""
    text: str
    """With its continuation lines and here-document."""
    words: tuple[str, ...]
    """Without variables in front; $ and * as they stand."""

    @property
    def name(self) -> str:
        """What tells how it is tried: "ccd-data convert", "bash launch/test.sh", "pip"."""
        two = self.words[0].startswith("ccd-") or self.words[0] in ("bash", "python", "git")
        return " ".join(self.words[: 2 if two else 1])


def pages() -> list[Path]:
    """The README first: other pages go on where it ends."""
    return [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def called(page: Path) -> str:
    return page.relative_to(CHECKOUT).as_posix()


def commands(page: Path) -> list[Command]:
    """Of all ```bash blocks, indented lines and benchmarks, in order; `a && b` and `a; b` are two."""
    text = page.read_text(encoding="utf-8")
    found = []
    fenced = list(BLOCK.finditer(text))
    benchmarks = [block for block in fenced if not block[1] and block[2].startswith("python tests/benchmarks/")]
    code = [(block.start(2), block[2]) for block in fenced if block[1] == "bash" or block in benchmarks]
    code += [
        (line.start(), line[1])
        for line in INDENTED.finditer(text)
        if not any(block.start() < line.start() < block.end() for block in fenced)
    ]
    for place, typed_there in sorted(code):
        first = text.count("\n", 0, place) + 1
        lines = typed_there.splitlines()
        while lines:
            line, start, size = lines[0], first, 1
            while line.endswith("\\"):
                line, size = f"{line[:-1]} {lines[size].strip()}", size + 1
            typed = line
            if here := re.search(r"<<'(\w+)'$", line):
                end = lines.index(here[1])
                typed, size = "\n".join(lines[: end + 1]), end + 1
            found += [Command(f"{called(page)}:{start}", typed, words) for words in _split(line)]
            lines, first = lines[size:], first + size
    return found


def _split(line: str) -> list[tuple[str, ...]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    groups: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&;|"):
            groups.append([])
        elif groups[-1] or not ASSIGNMENT.fullmatch(word):
            groups[-1].append(word)
    return [tuple(group) for group in groups if group]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def options(page: Path) -> set[str]:
    """Every --option that stands in inline code, with hyphens and without the dashes."""
    return {
        option.rstrip(".").replace("_", "-") for code in CODE.findall(prose(page)) for option in OPTION.findall(code)
    }


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return [target for target in LINK.findall(text) if not re.match(r"https?:|mailto:", target)]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def messages(page: Path) -> list[str]:
    """The pieces, between ellipses, of messages that a table of symptoms quotes in its first column."""
    pieces = []
    for table in re.findall(r"^\| (?:symptom|what you see) \|.*?(?=\n\n|\Z)", prose(page), re.DOTALL | re.MULTILINE):
        for row in table.splitlines()[2:]:
            quoted = [code for code in CODE.findall(row.split("|")[1]) if " " in code and not code.startswith("--")]
            pieces += [piece.strip(" ().,;") for code in quoted for piece in code.split("…")]
    return [piece for piece in pieces if len(piece) >= 6]
