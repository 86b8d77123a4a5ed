"""A fine-tuning run: everything that a step touches, built from its settings or restored from its newest checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ccd_train import distributed
from ccd_train.augment.affine import Affine
from ccd_train.augment.views import WordAugmentation
from ccd_train.config.options import to_dict
from ccd_train.config.recognition import SCRATCH, FineTuning
from ccd_train.data.charset import Charset, Tally, read_charset
from ccd_train.data.loader import Batches, loader
from ccd_train.data.order import Order
from ccd_train.data.words import Words, open_words
from ccd_train.errors import UserError
from ccd_train.files import write_json
from ccd_train.models.recognizer import Recognizer
from ccd_train.training import checkpoint, schedules
from ccd_train.training.average import Average
from ccd_train.training.engine import Engine
from ccd_train.training.run import Home, Progress, Training, compile_blocks, refuse_other
from ccd_train.weights import backbone, recognizer
from ccd_train.weights.recognizer import Trained

log = logging.getLogger(__name__)

BACKBONE = ("width", "depth", "heads")  # settings of the model that a recogniser has in common with a pretraining
REMEDY = "take the recipe of its size"
BEST = f"export/{recognizer.FILE}"  # of the run folder
Opened = tuple[Words, Tally]


@dataclass
class Learned(Progress):
    """Where a fine-tuning stands: how well it read when it read best, as well."""

    best: float = -1.0
    """The best accuracy of a validation so far."""
    best_step: int = 0
    stale: int = 0
    """Validations since it became better."""
    init: str = ""
    """What --init named when the run began."""


class Tuning(Training):
    progress: Learned

    def __init__(
        self,
        config: FineTuning,
        home: Home,
        words: Words,
        valid: Words,
        charset: Charset,
        engine: Engine,
        network: Recognizer,
        batches: Batches,
        progress: Learned,
    ) -> None:
        super().__init__(home, engine, batches, progress)
        self.config, self.words, self.valid, self.charset = config, words, valid, charset
        self.augmentation = WordAugmentation(config.augment, Affine())
        self.copy = Average(engine, network)
        """For validation: whole and in evaluation mode on every rank, whatever the ZeRO stage."""
        self._kept = -1.0
        with distributed.together():
            if home.found is not None and distributed.rank() == 0 and (self.run_dir / BEST).exists():
                try:
                    about = recognizer.read_export(self.run_dir / BEST).about
                except UserError as error:
                    log.warning("the next validation writes the best weights anew: %s", error)
                    about = {}
                if (about.get("rule"), about.get("valid")) == (config.valid.rule, home.facts["valid"]):
                    self._kept = float(about["accuracy"])

    def learning_rate(self) -> float:
        """Of the step that comes next."""
        optimizer, total = self.config.optimizer, self.config.train.total_samples
        return schedules.warmup_cosine(
            self.progress.samples, self.global_batch, optimizer.lr, optimizer.final_lr, optimizer.warmup_samples, total
        )

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do: the last step is done, or patience is at its end."""
        patience = self.config.valid.patience
        return self.progress.step >= self.last_step or 0 < patience <= self.progress.stale

    def judge(self, accuracy: float) -> None:
        """Takes note of a validation of `copy`, and keeps the best as RUN/export (all ranks together).

        One that only --max-steps has brought about is exported, but not noted: the run goes on as without it.
        """
        progress, every = self.progress, self.config.valid.every_steps
        noted = progress.step % every == 0 or progress.step == self.home.schedule_steps
        if noted:
            progress.stale = 0 if accuracy > progress.best else progress.stale + 1
        if accuracy < progress.best:
            return
        if noted:
            progress.best, progress.best_step = accuracy, progress.step  # of equals the last: it has seen more
        state = self.copy.state_dict()
        with distributed.together():
            # a life before this one, on other ranks, may have been better by a rounding at a step that was lost
            if distributed.rank() == 0 and accuracy >= self._kept:
                config = self.config
                about = {
                    "accuracy": accuracy, "rule": config.valid.rule, "step": progress.step,
                    "samples": progress.samples, "seed": config.seed, "fraction": config.data.fraction,
                    "init": progress.init, "global_batch_size": self.global_batch,
                    **self.home.facts,
                }  # fmt: skip
                trained = Trained(config.model, config.recognizer, self.charset, state, about, str(self.run_dir))
                try:
                    recognizer.write(self.run_dir / BEST, trained)
                    self._kept = accuracy
                except UserError as error:  # a full disk, say: the checkpoints have the weights as well
                    log.warning("step %d: the best weights so far are not exported (%s)", progress.step, error)


def begin(config: FineTuning) -> Tuning:
    """Builds a run, and goes on where its folder stands. Raises UserError on all ranks where that cannot be."""
    home = Home(config)
    with distributed.together():
        charset = read_charset(config.data.charset)
    train, valid = open_data(config, charset)
    words = train[0]
    home.settle({"corpus": words.hash, "valid": valid[0].hash, "charset": charset.characters})
    tell_labels(home.run_dir, train, valid, config.train.total_samples)

    torch.manual_seed(config.seed)
    student = Recognizer(config.model, config.recognizer, charset.classes, config.train.activation_checkpointing)
    if home.found is None:
        with distributed.together():
            start_from(config, charset, student)
    elif distributed.rank() == 0:
        log.info("--init %s is ignored: the run goes on", config.init)
    network = Recognizer(config.model, config.recognizer, charset.classes).eval().requires_grad_(False)
    network.load_state_dict(student.state_dict())
    if config.train.compile:
        compile_blocks(student.vit)
    engine = Engine(student.to(distributed.device()), config, config.optimizer.betas, home.accumulation)
    assert config.init is not None
    progress = Learned(init="/".join(config.init.parts[-2:]))  # not where it lies on this machine
    if home.found is not None:
        state = checkpoint.load(home.found, engine)
        progress.restore(state)
        if (state["settings"]["valid"]["rule"], state["valid"]) != (config.valid.rule, valid[0].hash):
            progress.best, progress.best_step, progress.stale = -1.0, 0, 0  # measured by another measure
    batches = loader(
        words,
        Order(words.shard_samples, config.seed, window(config)),
        start_position=progress.position,
        end_position=max(home.last_step * home.global_batch, progress.position),
        global_batch_size=home.global_batch,
        micro_batch_size=config.train.micro_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=config.data.workers,
        mask_mode=None,
        with_labels=True,
        max_damaged=config.data.max_damaged,
    )
    home.take()
    return Tuning(config, home, words, valid[0], charset, engine, network, batches, progress)


def window(config: FineTuning) -> int:
    """Shards shuffled together: the smaller the share of their words, the more of them."""
    return round(config.data.window_shards / config.data.fraction)


def open_data(config: FineTuning, charset: Charset) -> tuple[Opened, Opened]:
    """The words to learn from and those to validate on (all ranks together). Raises UserError on all of them."""
    settings, length = config.data, config.recognizer.length
    seed, fraction = config.seed, settings.fraction
    train = open_words(settings.train, charset, length, option="data.train", seed=seed, fraction=fraction)
    return train, open_words(settings.valid, charset, length, option="data.valid")


def tell_labels(run_dir: Path, train: Opened, valid: Opened, samples: int) -> None:
    """Says what is odd about the labels, in the log and in labels.json (rank 0)."""
    if distributed.rank() == 0:
        for name, (words, tally) in (("train", train), ("valid", valid)):
            log.info("data.%s: %d words; %s", name, words.num_samples, tally.describe())
        log.info("%d samples: every word is seen %.3g times", samples, samples / train[0].num_samples)
        found = {
            name: {"words": words.num_samples, **vars(tally)}
            for name, (words, tally) in (("train", train), ("valid", valid))
        }
        write_json(run_dir / "labels.json", found)


def start_from(config: FineTuning, charset: Charset, student: Recognizer) -> None:
    """Gives a new run the weights that --init names; UserError where they do not fit."""
    path = config.init
    assert path is not None
    if distributed.rank() == 0:
        log.info("weights: %s", "random" if path == SCRATCH else path)
    if path == SCRATCH:
        return
    if recognizer.is_recognizer(path):
        sizes = config.recognizer
        named = charset if path.suffix in (".pth", ".pt") else None  # our own exports say which they have
        trained = recognizer.read(path, named, config.model.heads, sizes.heads, sizes.length)
        if trained.charset.characters != charset.characters:
            theirs = trained.charset.name or "another"
            raise UserError(
                f"--init {path}: its charset is {theirs}, this run's {charset.name}; set --data.charset {theirs}, or "
                "start from a pretraining"
            )
        refuse_other(
            "recognizer", path, to_dict(trained.sizes), to_dict(config.recognizer), REMEDY, except_for=("dropout",)
        )
        refuse_other("model", path, of_backbone(to_dict(trained.model)), of_backbone(to_dict(config.model)), REMEDY)
        backbone.load(student, trained.state, trained.origin)
        return
    found = checkpoint.open_weights(path, config.model.heads)
    refuse_other("model", path, of_backbone(to_dict(found.model)), of_backbone(to_dict(config.model)), REMEDY)
    teacher = {name.removeprefix("vit."): tensor for name, tensor in found.teacher.items() if name.startswith("vit.")}
    # the norms of the taps belong to the segmentation head
    used = {name: tensor for name, tensor in teacher.items() if not name.startswith("tap_norms.")}
    backbone.load(student.vit, used, found.origin)


def of_backbone(model: dict[str, object]) -> dict[str, object]:
    """The settings of a model that a recogniser shares with a pretraining."""
    return {name: model[name] for name in BACKBONE}
