"""Benchmarks read by a recogniser: results, averages, and what makes them comparable, as a table and as files."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ccd_train.config.verbs import EvaluateOptions
from ccd_train.data.benchmarks import PUBLISHED
from ccd_train.errors import UserError
from ccd_train.files import digest, replace_file, write_json
from ccd_train.reports import mistakes
from ccd_train.reports.benchmarks import (
    GROUPS,
    BenchmarkWords,
    Set,
    Word,
    not_averaged,
    other_size,
    twice,
)
from ccd_train.reports.mistakes import Mistake
from ccd_train.tasks.recognize.reading import Reader, Reading, open_recognizer
from ccd_train.tasks.recognize.scoring import meaning, rules_for, same, says_nothing, similarity
from ccd_train.weights import recognizer
from ccd_train.weights.recognizer import Trained

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Result:
    """What came out on one set."""

    name: str
    words: int
    correct: int
    similarity: float
    """Mean of 1 − NED."""
    unreadable: int
    """Words whose image cannot be read; they count as wrong."""
    unlabelled: int
    """Records without a label, which do not count."""
    empty: int
    """Labels of which the rule leaves nothing."""
    beyond: int
    """Labels of which the rule leaves what this recogniser cannot write: other characters, or too many."""
    hash: str
    trimmed: int = 0
    """Labels with blanks at their ends, which were taken off."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.words

    @property
    def is_scored(self) -> bool:
        """Whether the rule leaves something of most labels, so that the accuracy means something."""
        return not says_nothing(self.empty, self.words)


@dataclass(frozen=True)
class AverageRow:
    name: str
    sets: tuple[str, ...]
    words: int
    accuracy: float
    """Each set counts alike."""
    accuracy_by_words: float
    """Each word counts alike."""
    similarity: float
    similarity_by_words: float


def evaluate(reader: Reader, chosen: Set, rule: str, batch_size: int, errors: int) -> tuple[Result, list[Mistake]]:
    """Reads a set; its result and its worst errors, the worst first. Raises UserError if it has no labels."""
    words = BenchmarkWords(chosen.path)
    count = correct = unreadable = empty = beyond = 0
    total = 0.0
    worst: list[Mistake] = []
    kept = rules_for(reader.charset.characters)[rule]
    remaining = tqdm(words, desc=chosen.name, unit=" words", leave=False, disable=None)
    for batch in _batches(iter(remaining), batch_size):
        for word, reading in zip(batch, reader.read([word.image for word in batch]), strict=True):
            readable = isinstance(reading, Reading)
            text, confidence = (reading.text, reading.confidence) if isinstance(reading, Reading) else ("", 0.0)
            right = readable and same(text, word.label, kept)
            close = similarity(text, word.label, kept) if readable else 0.0
            count, correct, total = count + 1, correct + right, total + close
            unreadable += not readable
            empty += not kept(word.label)
            beyond += not reader.can_write(word.label, kept)
            if not right:
                mistake = Mistake(1 - close, confidence, -word.number, word.label, text, not readable)
                (heapq.heappush if len(worst) < errors else heapq.heappushpop)(worst, mistake)
    if not count:
        raise UserError(f"{chosen.path}: no labelled words in it; leave it out by --sets")
    seen = (unreadable, words.unlabelled, empty, beyond)
    result = Result(chosen.name, count, correct, total / count, *seen, words.hash, words.trimmed)
    return result, sorted(worst, reverse=True)


def evaluate_all(
    reader: Reader, chosen: Sequence[Set], options: EvaluateOptions
) -> tuple[list[tuple[Set, Result, list[Mistake]]], UserError | None]:
    """What came out on each set, up to the first that turns out to be damaged, and the error of that one."""
    done: list[tuple[Set, Result, list[Mistake]]] = []
    for one in chosen:
        try:
            result, worst = evaluate(reader, one, options.rule, options.batch_size, options.errors)
        except UserError as damage:  # the sets before it may be hours of work
            return done, damage
        done.append((one, result, worst))
    return done, None


def averages(results: Sequence[Result]) -> list[AverageRow]:
    """Over the usual groups of which all sets are there, and over everything that can be scored."""
    by_name = {result.name: result for result in results if result.is_scored}
    groups = {name: sets for name, sets in GROUPS.items() if all(member in by_name for member in sets)}
    groups |= {"all": tuple(by_name)} if by_name else {}
    return [_average(name, [by_name[member] for member in sets]) for name, sets in groups.items()]


def table(trained: Trained, sha256: str, rule: str, results: Sequence[Result], missing: Sequence[str] = ()) -> str:
    """Everything that makes the figures comparable, as Markdown. `missing`: the chosen sets that have no result."""
    lines = [
        "| set | words | published | accuracy | 1 − NED | unreadable | without label | sha256 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        published = " or ".join(f"{size:,}" for size in PUBLISHED.get(result.name, ())) or "–"
        score = f"{result.accuracy:.2%} | {result.similarity:.4f}" if result.is_scored else "– | –"
        lines.append(
            f"| {result.name} | {result.words:,} | {published} | {score} "
            f"| {result.unreadable} | {result.unlabelled} | {result.hash[:12]} |"
        )
    lines += [
        "",
        "| average | words | accuracy by sets | accuracy by words | 1 − NED by sets | 1 − NED by words | sets |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for average in averages(results):
        lines.append(
            f"| {average.name} | {average.words:,} | {average.accuracy:.2%} | {average.accuracy_by_words:.2%} "
            f"| {average.similarity:.4f} | {average.similarity_by_words:.4f} | {' '.join(average.sets)} |"
        )
    lines += ["", f"- weights: {trained.origin} (sha256 {sha256[:12]})"]
    lines += [f"- charset: {_charset(trained)}", f"- rule `{rule}`: {meaning(rule, trained.charset.characters)}"]
    lines += [f"- {line}" for line in not_averaged([result.name for result in results if result.is_scored])]
    lines += [f"- warning: {warning}" for warning in warnings(results, rule, missing)]
    return "\n".join(lines) + "\n"


def warnings(results: Sequence[Result], rule: str, missing: Sequence[str] = ()) -> list[str]:
    """What stands in the way of comparing the figures: sizes, unreadable images, labels that the rule empties."""
    found = [f"without {', '.join(missing)}: ended by a damaged set"] if missing else []
    found += [warning for result in results if (warning := other_size(result.name, result.words))]
    found += twice([result.name for result in results])
    for result in results:
        if result.unreadable:
            found.append(f"{result.name}: {result.unreadable} images cannot be read; they count as wrong")
        if result.empty:
            found.append(f"{result.name}: {result.empty} labels of which rule {rule} leaves nothing" + _so(result))
        if result.trimmed:
            found.append(f"{result.name}: {result.trimmed} labels had blanks at their ends, which do not count")
        if result.beyond:
            found.append(
                f"{result.name}: {result.beyond} labels hold what this recogniser cannot write; they are wrong"
            )
    return found


def record(
    trained: Trained, sha256: str, rule: str, results: Sequence[Result], missing: Sequence[str] = ()
) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "weights": trained.origin,
        "weights_sha256": sha256,
        "about": trained.about,
        "charset": {"name": trained.charset.name, "characters": trained.charset.characters},
        "rule": rule,
        "sets": [vars(result) | {"accuracy": result.accuracy if result.is_scored else None} for result in results],
        "averages": [vars(average) for average in averages(results)],
        "not_averaged": not_averaged([result.name for result in results if result.is_scored]),
        "warnings": warnings(results, rule, missing),
    }


def open_known(options: EvaluateOptions) -> tuple[Trained, Reader, str]:
    """The recogniser, ready to read, and the sha256 of the very file that it came from.

    A fine-tuning that goes on replaces its best one at any time. UserError where that happened while it was read.
    """
    assert options.weights is not None
    trained, sha256 = unchanged(recognizer.find(options.weights), lambda: open_recognizer(options))
    return trained, Reader(trained), sha256


def unchanged(path: Path, read: Callable[[], Opened]) -> tuple[Opened, str]:
    """What is read of a file, and its sha256. UserError where the file was replaced meanwhile."""
    try:
        before = digest(path)
        found = read()
        after = digest(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); give another --weights") from None
    if before != after:
        raise UserError(f"{path}: was replaced while it was read; give the same command again, or a copy of it")
    return found, before.sha256


def make_folder(folder: Path) -> None:
    """The folder of the results. UserError where it cannot be written: not only after an hour of reading."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from None


def publish(
    folder: Path,
    trained: Trained,
    sha256: str,
    rule: str,
    done: Sequence[tuple[Set, Result, list[Mistake]]],
    missing: Sequence[str],
) -> None:
    """Prints the table and writes the three files. UserError where they cannot be written."""
    results = [result for _, result, _ in done]
    text = table(trained, sha256, rule, results, missing)
    print(text, flush=True)
    try:
        replace_file(folder / "table.md", text.encode())
        write_json(folder / "table.json", record(trained, sha256, rule, results, missing))
        mistakes.write_page(folder / "errors.html", f"Errors of {trained.origin}, rule {rule}", done)
    except OSError as error:
        raise _unwritable(folder, error) from None
    print(f"{folder}: table.md, table.json, errors.html", flush=True)


def _batches(words: Iterator[Word], size: int) -> Iterator[list[Word]]:
    while batch := list(islice(words, size)):
        yield batch


def _so(result: Result) -> str:
    if result.is_scored:
        return "; as in the official code they are right where nothing is read that it keeps"
    return f", of {result.words}: not scored; compare every character with --rule all"


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written ({error}); choose another --out")


def _average(name: str, results: Sequence[Result]) -> AverageRow:
    words = sum(result.words for result in results)
    return AverageRow(
        name,
        tuple(result.name for result in results),
        words,
        sum(result.accuracy for result in results) / len(results),
        sum(result.correct for result in results) / words,
        sum(result.similarity for result in results) / len(results),
        sum(result.similarity * result.words for result in results) / words,
    )


def _charset(trained: Trained) -> str:
    charset = trained.charset
    folds = ", without capitals" if charset.folds_case else ""
    return f"{charset.name or 'of its own'}, {len(charset.characters)} characters{folds}"
