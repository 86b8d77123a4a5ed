"""TextSeg's pictures → word crops with their masks: one LMDB for each split.

    ccd-data crops TEXTSEG OUT                         the axis-aligned box of each word's polygon
    ccd-data crops TEXTSEG OUT --shape upright         the smallest rotated rectangle, turned upright
    ccd-data crops SSM_FOLDER OUT                      crops that others made: image/NAME.jpg and mask/NAME_mask.jpg

OUT/SPLIT has num-samples, image-%09d, mask-%09d (PNG, codes as they are: 0, 100 text, 200 effects, 255 ignored) and
label-%09d. OUT/crops.json says what was read, by which rule, and what came of it; OUT/findings.jsonl names every
picture and word that was left out or is odd. A run that was killed goes on with the splits that it had not finished;
what it writes depends on the pictures and the rule alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ccd_train.data.records import FILE, LmdbWriter
from ccd_train.data.shards import write_atomically
from ccd_train.errors import FINISHED, UserError
from ccd_train.files import sync_folder
from data_tools.merge import summary
from data_tools.partners import RECORD, hash_record
from data_tools.pool import Report, available_cores, run_in_order
from data_tools.progress import Progress
from data_tools.state import held, write_errors
from data_tools.textseg import Cut, Finding, Pictures, Shape, Slices, open_pictures

FORMAT = 1
FINDINGS, UNFINISHED = "findings.jsonl", ".crops"
_PLAN, _LOCK = "plan.json", "lock"
_CHUNK = 16  # pictures that a process takes at once
NOT_COMPARABLE = (
    "figures on these crops cannot be compared with published ones: nobody has published crops of TextSeg, or code "
    "that makes them"
)


@dataclass(frozen=True)
class Rule:
    """What decides, beside the pictures, which crops there are."""

    shape: Shape
    keep_empty: bool
    """Also take what is under 4 pixels a side, or has no text."""


@dataclass(frozen=True)
class Job:
    """Some pictures of a split."""

    pictures: Pictures
    rule: Rule
    split: str
    names: tuple[str, ...]


@dataclass
class Outcome:
    """What became of a split."""

    pictures: int
    words: int = 0
    crops: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Words, or whole pictures, by kind."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each kind that was left out."""
    noted: dict[str, int] = field(default_factory=dict)
    """Words that are odd and in the LMDB all the same."""
    codes: dict[str, int] = field(default_factory=dict)
    """Pixels of each code in the crops' masks."""
    sha256: str = ""
    """Taken over all records in their order."""

    def told(self, split: str) -> str:
        text = f"{split}: {self.pictures:,} pictures, {self.words:,} words: {self.crops:,} crops"
        first = "; ".join(f"{kind}: {example}" for kind, example in self.examples.items())
        text += f"; left out: {summary(self.left_out)} (the first: {first})" if self.left_out else ""
        return text + (f"; kept, but noted: {summary(self.noted)}" if self.noted else "")


def cut_some(job: Job, done: Report) -> list[Cut]:
    """The words of a job's pictures."""
    cuts = []
    for name in job.names:
        cuts.append(job.pictures.cut(job.split, name, job.rule.shape, job.rule.keep_empty))
        done(1)
    return cuts


class Home:
    """The folder of the crops, and what a run that was killed has left there: in OUT/.crops, until all is done.

    plan.json       what is read, and the rule
    SPLIT           the LMDB of a split, with its findings in SPLIT.jsonl
    SPLIT.json      its outcome, written when both are safe on the disk
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self.out, self.folder, self._plan = out, out / UNFINISHED, plan
        self.record: dict[str, Outcome] | None = None
        """The outcomes of a finished folder, by split."""

    def begin(self) -> None:
        """Makes the folder this plan's own. UserError if it holds anything else."""
        known = _read_json(self.out / RECORD)
        if known is not None:
            self.record = {split: Outcome(**stored) for split, stored in known.pop("splits").items()}
        else:
            known = _read_json(self.folder / _PLAN)
        if known is None:
            foreign = sorted({entry.name for entry in os.scandir(self.out)} - {UNFINISHED, FINDINGS})
            if foreign:
                raise self._refusal(f"not empty (it holds {foreign[0]!r})")
            for stale in self.folder.glob("*.json*"):  # of a run that was killed while it gave up
                stale.unlink()
            write_atomically(self.folder / _PLAN, [_json(self._plan)])
        elif known != self._plan:
            differing = [key for key in self._plan if known.get(key) != self._plan[key]]
            said = ", ".join(f"{key} is {known.get(key)}, not {self._plan[key]}" for key in differing) or "its format"
            raise self._refusal(f"holds other crops: {said}")

    def outcome(self, split: str) -> Outcome | None:
        """What became of a split; None if it is to be made (again)."""
        places = [self.out / split / FILE]
        if self.record is not None:
            done = self.record.get(split)
        else:
            places.append(self.folder / split / FILE)  # until all are done
            stored = _read_json(self.folder / f"{split}.json")
            done = None if stored is None else Outcome(**stored)
        return done if done and (done.crops == 0 or any(place.exists() for place in places)) else None

    def write(self, split: str, cuts: Iterable[Cut], pictures: int) -> Outcome:
        """Writes a split's LMDB and notes that it is done."""
        outcome, left_out, noted, codes = Outcome(pictures), Counter[str](), Counter[str](), Counter[int]()
        findings: list[Finding] = []
        digest = hashlib.sha256()
        place, note = self.folder / split, self.folder / f"{split}.json"
        note.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        with LmdbWriter(place) as writer:
            for cut in cuts:
                outcome.words += cut.words
                codes.update(cut.codes)
                findings += cut.findings
                for finding in cut.findings:
                    (noted if finding.kept else left_out)[finding.kind] += 1
                    if not finding.kept:
                        outcome.examples.setdefault(finding.kind, f"{finding.picture} {finding.word}".rstrip())
                for crop in cut.crops:
                    writer.add(crop.image, crop.label, crop.mask)
                    label = None if crop.label is None else crop.label.encode()
                    hash_record(digest, crop.image, crop.mask, label)
            outcome.crops = writer.count
        outcome.left_out, outcome.noted = dict(sorted(left_out.items())), dict(sorted(noted.items()))
        outcome.codes = {str(code): count for code, count in sorted(codes.items())}
        outcome.sha256 = digest.hexdigest()
        if not outcome.crops:
            shutil.rmtree(place)
        lines = [json.dumps(asdict(finding), ensure_ascii=False).encode() + b"\n" for finding in findings]
        write_atomically(self.folder / f"{split}.jsonl", lines)
        write_atomically(note, [_json(asdict(outcome))])
        return outcome

    def finish(self, outcomes: dict[str, Outcome]) -> None:
        """Puts everything in its place, the record last. UserError if there is not a single crop."""
        if self.record is None:
            listed = b"".join((self.folder / f"{split}.jsonl").read_bytes() for split in outcomes)
            write_atomically(self.out / FINDINGS, [listed])
        if not sum(outcome.crops for outcome in outcomes.values()):
            shutil.rmtree(self.folder)
            raise UserError(f"{self.out}: not a single crop is left; {FINDINGS} there names what was left out and why")
        for split in outcomes:
            if (self.folder / split).is_dir():
                shutil.rmtree(self.out / split, ignore_errors=True)  # what is left of one that lost its data
                (self.folder / split).rename(self.out / split)
        sync_folder(self.out)
        if self.record is None:
            splits = {split: asdict(outcome) for split, outcome in outcomes.items()}
            write_atomically(self.out / RECORD, [_json(self._plan | {"splits": splits})])
        shutil.rmtree(self.folder)

    def _refusal(self, why: str) -> UserError:
        if not (self.folder / _PLAN).exists():
            shutil.rmtree(self.folder)  # it was made for the lock
        return UserError(f"{self.out}: {why}; choose another OUT, or empty it")


def make(pictures: Pictures, out: Path, rule: Rule, workers: int) -> None:
    """Makes the crops that are missing. UserError if there are none, or OUT holds something else."""
    print(pictures.told, flush=True)
    home = Home(out, {"format": FORMAT} | pictures.facts() | asdict(rule))
    home.folder.mkdir(parents=True, exist_ok=True)
    with held(home.folder / _LOCK, "cutting crops", out):
        home.begin()
        outcomes = {}
        for split in pictures.splits:
            outcome = home.outcome(split)
            if outcome is None:
                outcome = _make_split(home, pictures, rule, split, workers)
                if home.record is not None and outcome != home.record[split]:
                    raise UserError(
                        f"{out / split}: made again, it is not what {RECORD} says (another OpenCV writes "
                        "other bytes); make all of them anew in another OUT"
                    )
            outcomes[split] = outcome
            print(outcome.told(split), flush=True)
        home.finish(outcomes)
    odd = any(outcome.left_out or outcome.noted for outcome in outcomes.values())
    print(f"{out}: complete" + (f"; {out / FINDINGS} names what was left out or noted" if odd else ""))
    print(NOT_COMPARABLE)


def _make_split(home: Home, pictures: Pictures, rule: Rule, split: str, workers: int) -> Outcome:
    names = pictures.splits[split]
    jobs = [Job(pictures, rule, split, names[first : first + _CHUNK]) for first in range(0, len(names), _CHUNK)]
    with (
        Progress(split, len(names), "pictures") as progress,
        closing(run_in_order(cut_some, jobs, workers, progress)) as made,
    ):
        return home.write(split, (cut for cuts in made for cut in cuts), len(names))


def _read_json(file: Path) -> Any:
    """None if there is no such file. UserError if it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); choose another OUT, or empty this one") from None


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def main(argv: list[str]) -> int:
    """`ccd-data crops`: see the module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ccd-data crops", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("pictures", type=Path, metavar="TEXTSEG", help="the release, or SSM's image_slice")
    add("out", type=Path, metavar="OUT", help="new or empty folder, or one of these crops")
    add("--shape", choices=("box", "upright"), default="box", help="of a crop (%(default)s)")
    add("--keep-empty", action="store_true", help="keep crops under 4 pixels a side or without text")
    add("--workers", type=int, default=available_cores(), metavar="N", help="processes (%(default)s)")
    given = parser.parse_args(argv)
    if given.workers < 1:
        raise UserError(f"--workers {given.workers}: give 1 or more")
    pictures = open_pictures(given.pictures)
    if given.shape != "box" and isinstance(pictures, Slices):
        raise UserError(f"--shape {given.shape}: {given.pictures} holds crops, which have no polygons; leave it out")
    with write_errors(given.out):
        make(pictures, given.out, Rule(given.shape, given.keep_empty), given.workers)
    return FINISHED
