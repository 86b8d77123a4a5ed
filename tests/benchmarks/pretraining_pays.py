"""What pretraining is for: reading after fine-tuning with few labels, from pretrained and from random weights.

    python tests/benchmarks/pretraining_pays.py --out FOLDER --alphabet 0123456789 --length 1 3 \\
        --unlabelled-length 3 7 --level --words 32000 --workers 0 --threads 1      nano, an hour and a half of a core
    python tests/benchmarks/pretraining_pays.py --out FOLDER --config vit_small --recipe recognizer_small \\
        --corpus shards/words --pretrain-samples 2000000 --finetune-samples 1000000            on a GPU
    python tests/benchmarks/pretraining_pays.py --out FOLDER --smoke                           does it run? (2 minutes)

Renders words, or takes shards with labels; pretrains on their images; then fine-tunes with 1 %, 10 % and 100 % of their
labels, each from the pretrained and from random weights with the same budget, and evaluates on words that nobody has
trained on: rendered ones, and photographed ones where ../shared/real/iiit5k_train is present. FOLDER gets
pretraining_pays.json, .md and .png. The same command goes on where it was stopped.

The recipes' schedules are shortened in proportion to the budgets.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import corpus
import cv2
import numpy as np

from ccd_train import distributed
from ccd_train.config.options import read_recipe
from ccd_train.config.pretraining import Config
from ccd_train.config.recognition import SCRATCH, FineTuning
from ccd_train.config.run import RunConfig
from ccd_train.data.records import LmdbReader, LmdbWriter
from ccd_train.errors import FINISHED
from ccd_train.reports.benchmarks import find_sets
from ccd_train.reports.evaluation import evaluate
from ccd_train.reports.history import read_history
from ccd_train.tasks.choice import task_of
from ccd_train.tasks.recognize.reading import Reader
from ccd_train.training.train import live
from ccd_train.weights import recognizer as recognizers

REAL = Path(__file__).resolve().parents[3] / "shared" / "real" / "iiit5k_train"
FRACTIONS = (0.01, 0.1, 1.0)
ENOUGH = 1000  # real words, to spare every second one for validation
TEST_SEED, VALID_SEED, UNLABELLED_SEED = 1_000_003, 2_000_003, 3_000_003  # of rendered words; training has its own
RULE = "lower_alnum"
COLORS = {"pretrained": (180, 105, 20), "scratch": (40, 40, 210)}  # BGR
PANEL = (520, 380, 60)  # width, height, margin


@dataclass(frozen=True)
class Row:
    """What came out of one fine-tuning on one set."""

    init: str
    fraction: float
    labels: int
    set: str
    words: int
    accuracy: float
    similarity: float
    """1 − NED."""
    loss: float
    """Cross-entropy of a token of the validation words, the lowest of the validations, in nats."""
    minutes: float


def rendered(words: Path, count: int, seed: int, kind: corpus.Kind) -> Path:
    """Shards of rendered words."""
    return corpus.write_shards(words.with_name(f"{words.name}_shards"), corpus.write_words(words, count, seed, kind))


def write_real(folder: Path, kind: corpus.Kind, most: int | None) -> list[Path]:
    """Photographed words such as the rendered ones: for the test, and where there are enough for validation."""
    if not REAL.is_dir():
        return []
    with LmdbReader(REAL) as reader:
        labels = {number: reader.label(number) or "" for number in range(1, len(reader) + 1)}
        fits = [number for number, label in labels.items() if not kind.alphabet or is_such(label, kind)][:most]
        parts = {"test/real": fits[::2], "valid/real": fits[1::2]} if len(fits) >= ENOUGH else {"test/real": fits}
        for name, numbers in parts.items():
            if not (folder / name).exists():
                with LmdbWriter(folder / name) as writer:
                    for number in numbers:
                        image = reader.image(number) or b""
                        writer.add(corpus.levelled(image) if kind.level else image, labels[number])
    return [folder / name for name in parts]


def is_such(label: str, kind: corpus.Kind) -> bool:
    return set(label) <= set(kind.alphabet) and kind.length[0] <= len(label) <= kind.length[1]


def shortened(settings: Any, total: int, budget: int, *names: str) -> dict[str, int]:
    """These counts of samples for another length of the schedules."""
    return {name: round(getattr(settings, name) * budget / total) for name in names}


def pretraining(options: argparse.Namespace, shards: Path) -> Config:
    config, budget = read_recipe(options.config, Config), options.pretrain_samples
    total = config.train.total_samples
    changed = shortened(config.optimizer, total, budget, "warmup_samples", "freeze_last_layer_samples")
    switch = shortened(config.distillation, total, budget, "student_regions_after")
    return replace(
        common(config, options, options.out / "pretraining", budget),
        data=replace(config.data, shards=(shards,), workers=options.workers),
        optimizer=replace(config.optimizer, **changed),
        distillation=replace(config.distillation, **switch),
    )


def tuning(options: argparse.Namespace, shards: Path, valid: Path, init: str, fraction: float) -> FineTuning:
    config, budget = read_recipe(options.recipe, FineTuning), options.finetune_samples
    changed = shortened(config.optimizer, config.train.total_samples, budget, "warmup_samples")
    batch = config.train.global_batch_size or config.train.micro_batch_size
    tokens = options.length[1] + 2 if options.alphabet else config.recognizer.length
    return replace(
        common(config, options, options.out / f"{init}_{fraction:g}", budget),
        init=SCRATCH if init == "scratch" else options.pretrained or options.out / "pretraining",
        data=replace(
            config.data, train=(shards,), valid=(valid,), fraction=fraction, workers=options.workers,
            charset=str(options.out / "charset.txt") if options.alphabet else "36",
        ),
        recognizer=replace(config.recognizer, length=tokens),
        optimizer=replace(config.optimizer, **changed),
        valid=replace(config.valid, every_steps=max(1, budget // batch // 5)),
    )  # fmt: skip


def common(config: Any, options: argparse.Namespace, run_dir: Path, budget: int) -> Any:
    train = replace(config.train, total_samples=budget, threads=options.threads or config.train.threads)
    log = replace(config.log, every_steps=10, pictures_every_steps=0)
    return replace(config, run_dir=run_dir, seed=options.seed, train=train, log=log)


def learn(config: RunConfig) -> float:
    """Trains to the end; the minutes it took, in all lives. Ends the program where it is stopped."""
    code, message = live(task_of(config))
    if code != FINISHED:
        sys.exit(message)
    assert config.run_dir is not None
    return read_history(config.run_dir).seconds / 60


def lowest_loss(run_dir: Path) -> float:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return float(min(line["valid_loss"] for line in lines if "valid_loss" in line))


def table(rows: list[Row]) -> str:
    """Accuracy and 1 − NED, pretrained beside scratch, for every share of the labels and every set."""
    lines = [
        "| words read | labels | accuracy, scratch | accuracy, pretrained | 1 − NED, scratch | 1 − NED, pretrained "
        "| validation loss, scratch | validation loss, pretrained |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {(row.set, row.fraction, row.init): row for row in rows}
    for name in dict.fromkeys(row.set for row in rows):
        for fraction in FRACTIONS:
            pair = [found.get((name, fraction, init)) for init in ("scratch", "pretrained")]
            one = next((row for row in pair if row), None)
            if one is not None:
                accuracy, similarity, loss = (
                    " | ".join(form.format(getattr(row, value)) if row else "" for row in pair)
                    for value, form in (("accuracy", "{:.1%}"), ("similarity", "{:.3f}"), ("loss", "{:.3f}"))
                )
                lines.append(
                    f"| {name}, {one.words} | {fraction:.0%} = {one.labels:,} | {accuracy} | {similarity} | {loss} |"
                )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row]) -> np.ndarray:
    """A panel for each set and figure, uint8 [H, W, 3] in BGR: 0 to the best, over the share of the labels."""
    names = list(dict.fromkeys(row.set for row in rows))
    return np.vstack([np.hstack([panel(rows, name, value) for value in ("accuracy", "similarity")]) for name in names])


def panel(rows: list[Row], name: str, value: str) -> np.ndarray:
    width, height, margin = PANEL
    picture = np.full((height, width, 3), 255, np.uint8)
    mine = [row for row in rows if row.set == name]
    top = max([0.05, *(getattr(row, value) for row in mine)])

    def place(fraction: float, share: float) -> tuple[int, int]:
        across = FRACTIONS.index(fraction) / (len(FRACTIONS) - 1)
        return round(margin + across * (width - 2 * margin)), round(height - margin - share * (height - 2 * margin))

    def write(text: str, where: tuple[int, int], color: tuple[int, int, int] = (90, 90, 90)) -> None:
        cv2.putText(picture, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, 1, cv2.LINE_AA)

    write(f"{name}: {'word accuracy' if value == 'accuracy' else '1 - NED'}", (margin, 22))
    for share in np.linspace(0, 1, 5):
        cv2.line(picture, place(FRACTIONS[0], share), place(FRACTIONS[-1], share), (225, 225, 225), 1)
        write(f"{share * top:.0%}", (8, place(FRACTIONS[0], share)[1] + 4))
    for fraction in FRACTIONS:
        write(f"{fraction:.0%}", (place(fraction, 0)[0] - 12, height - margin + 20))
    write("of the labels", (width - 2 * margin, height - 14))
    for number, (init, color) in enumerate(COLORS.items()):
        points = [place(row.fraction, getattr(row, value) / top) for row in mine if row.init == init]
        cv2.polylines(picture, [np.array(points, np.int32).reshape(-1, 1, 2)], False, color, 2, cv2.LINE_AA)
        for point in points:
            cv2.circle(picture, point, 4, color, -1, cv2.LINE_AA)
        write(init, (margin + number * 110, 42), color)
    return picture


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for words, runs and results")
    parser.add_argument("--config", default="vit_nano", help="recipe of the pretraining")
    parser.add_argument("--recipe", default="recognizer_nano", help="recipe of the fine-tuning, of the same backbone")
    parser.add_argument("--corpus", type=Path, help="shards with labels to train on (default: words are rendered)")
    parser.add_argument("--words", type=int, default=20000, help="words to render")
    parser.add_argument("--alphabet", default="", help="random strings of these characters instead of words")
    parser.add_argument("--length", type=int, nargs=2, default=(3, 7), help="of the random strings, from and to")
    parser.add_argument("--unlabelled-length", type=int, nargs=2, help="pretrain on other strings, of this length")
    parser.add_argument("--level", action="store_true", help="all words dark on light, by their pseudo-masks")
    parser.add_argument("--pretrained", type=Path, help="a pretraining's run folder to take, instead of pretraining")
    parser.add_argument("--pretrain-samples", type=int, default=60_000)
    parser.add_argument("--finetune-samples", type=int, default=36_000)
    parser.add_argument("--test-words", type=int, default=1000, help="rendered words of the test")
    parser.add_argument("--workers", type=int, default=1, help="processes that read data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: the recipes')")
    parser.add_argument("--smoke", action="store_true", help="the whole script on a handful of words")
    options = parser.parse_args()
    if options.smoke:
        options.words, options.pretrain_samples, options.finetune_samples, options.test_words = 400, 64, 64, 32
        options.alphabet, options.workers = "0123456789", 0
    return options


def main() -> None:
    options = parse()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    cv2.setNumThreads(1)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.alphabet:
        (out / "charset.txt").write_text("\n".join(dict.fromkeys(options.alphabet)))
    fonts = () if options.smoke else corpus.dejavu()
    kind = corpus.Kind(options.alphabet, tuple(options.length), options.level, fonts)
    shards = options.corpus or rendered(out / "words", options.words, options.seed, kind)
    unlabelled = shards
    if options.unlabelled_length and not options.pretrained:
        other = replace(kind, length=tuple(options.unlabelled_length))
        unlabelled = rendered(out / "unlabelled", options.words, UNLABELLED_SEED + options.seed, other)
    corpus.write_words(out / "test" / "rendered", options.test_words, TEST_SEED, kind)
    real = write_real(out, kind, options.test_words if options.smoke else None)
    valid = next((path for path in real if path.parent.name == "valid"), None)
    valid = valid or corpus.write_words(out / "valid" / "rendered", options.test_words // 4, VALID_SEED, kind)

    found = out / "pretraining_pays.json"
    rows = [Row(**row) for row in json.loads(found.read_text())["rows"]] if found.exists() else []
    done = {(row.init, row.fraction) for row in rows}
    minutes = 0.0 if options.pretrained else learn(pretraining(options, unlabelled))
    for fraction in FRACTIONS:
        for init in ("scratch", "pretrained"):
            if (init, fraction) in done:
                continue
            config = tuning(options, shards, valid, init, fraction)
            spent = learn(config)
            assert config.run_dir is not None
            labels = json.loads((config.run_dir / "labels.json").read_text())["train"]["words"]
            reader = Reader(recognizers.read(config.run_dir))
            for one in find_sets(out / "test"):
                result, _ = evaluate(reader, one, RULE, batch_size=128, errors=0)
                loss = lowest_loss(config.run_dir)
                rows.append(
                    Row(init, fraction, labels, one.name, result.words, result.accuracy, result.similarity, loss, spent)
                )
            settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
            content = {"settings": settings, "pretraining_minutes": minutes, "rows": [asdict(row) for row in rows]}
            found.write_text(json.dumps(content, indent=1))
            (out / "pretraining_pays.md").write_text(table(rows))
            cv2.imwrite(str(out / "pretraining_pays.png"), draw(rows))
            print(f"{init} {fraction:.0%}: {rows[-1].accuracy:.1%} in {spent:.1f} minutes", flush=True)
    print(table(rows))
    distributed.finalize()


if __name__ == "__main__":
    main()
