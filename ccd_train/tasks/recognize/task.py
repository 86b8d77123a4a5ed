"""Recognition: a backbone learns to read, from labelled words.

    ccd-train finetune --config recognizer_small --run_dir RUN --init PRETRAINED \\
        --data.train data_lmdb/training/ARD --data.valid data_lmdb/validation
    ccd-train finetune --config recognizer_small --print_config                                  every setting

PRETRAINED is a pretraining's run folder, its export or an official .pth; `scratch` starts from random weights. The same
command again goes on where the run stopped. RUN/export holds the weights that read the validation words best, for
`ccd-train read` and `evaluate`. The loop is in `training/train.py`; the network is in `models/recognizer.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ccd_train import distributed, draws
from ccd_train.augment.affine import Affine
from ccd_train.augment.views import WordAugmentation, normalize
from ccd_train.config.recognition import FineTuning
from ccd_train.config.stored import CONTENT, TOLD
from ccd_train.data.batches import Batch
from ccd_train.data.charset import Tally, read_charset
from ccd_train.data.loader import Batches, Share, loader
from ccd_train.data.order import Order
from ccd_train.data.words import Words, open_words
from ccd_train.durations import times
from ccd_train.errors import UserError
from ccd_train.files import write_json
from ccd_train.models import decoding
from ccd_train.models.recognizer import Recognizer, recognition_loss
from ccd_train.tasks.recognize.scoring import RULES, meaning, rules_for, same, says_nothing
from ccd_train.tasks.recognize.start import start_from
from ccd_train.training import schedules
from ccd_train.training.ahead import Ahead, ahead, made_of
from ccd_train.training.tuning import Tuning
from ccd_train.weights import recognizer
from ccd_train.weights.recognizer import Trained

log = logging.getLogger(__name__)

READS_LITTLE = 0.02  # of the validation words: after a whole schedule, something is missing
READ_AT_ONCE = 256  # words of a validation, by each rank
BEST = f"export/{recognizer.FILE}"  # in the run folder


class Recognition(Tuning):
    config: FineTuning
    kept_at: ClassVar[str] = BEST
    score_key: ClassVar[str] = "accuracy"

    # Building

    def open(self) -> dict[str, str]:
        config, settings, length = self.config, self.config.data, self.config.recognizer.length
        with distributed.together():
            self.charset = charset = read_charset(settings.charset)
        self.words, self.train_tally = open_words(
            settings.train, charset, length, option="data.train", seed=config.seed, fraction=settings.fraction,
            each_once=True, leave_out_long=settings.too_long == "leave_out",
        )  # fmt: skip
        self.rules = rules_for(charset.characters)
        self.valid, self.valid_tally = open_words(
            settings.valid, charset, length, option="data.valid", rule=self.rules[config.valid.rule]
        )
        self.refuse_empty_score()
        self.samples_per_epoch, self.validate_every = self.words.num_samples, config.valid.every_steps
        self.augmentation = WordAugmentation(config.augment, Affine())
        self.begin_choosing(config.valid, {"rule": config.valid.rule, "valid": self.valid.hash})
        return {
            "corpus": self.words.hash, f"corpus{CONTENT}": self.words.content, f"corpus{TOLD}": self.words.told,
            "valid": self.valid.hash, f"valid{CONTENT}": self.valid.content, f"valid{TOLD}": self.valid.told,
            "charset": charset.characters,
        }  # fmt: skip

    def refuse_empty_score(self) -> None:
        """UserError where the rule would call most of the validation words right, whatever is read."""
        tally, rule = self.valid_tally, self.config.valid.rule
        if says_nothing(tally.bare, tally.labels - tally.empty):
            named = ", ".join(map(str, self.config.data.valid))
            raise UserError(
                f"--data.valid {named}: rule {rule} leaves nothing of {tally.bare} of {tally.labels - tally.empty} "
                f"labels ({meaning(rule, self.charset.characters)}); compare every character with --valid.rule all"
            )

    def network(self) -> Recognizer:
        config = self.config
        return Recognizer(config.model, config.recognizer, self.charset.classes, config.train.activation_checkpointing)

    def start(self, network: nn.Module) -> None:
        assert isinstance(network, Recognizer)
        start_from(self.config, self.charset, network)

    def copy(self, network: nn.Module) -> Recognizer:
        """For validation: whole and in evaluation mode on every rank, whatever the ZeRO stage."""
        config = self.config
        second = Recognizer(config.model, config.recognizer, self.charset.classes).eval().requires_grad_(False)
        second.load_state_dict(network.state_dict())
        return second

    def batches(self, share: Share) -> Batches | Ahead:
        config = self.config
        self.tell_labels()
        # the smaller the share of their words, the more shards are shuffled together
        window = round(config.data.window_shards / config.data.fraction)
        batches = loader(
            self.words, Order(self.words.shard_samples, config.seed, window), share, workers=config.data.workers,
            mask_mode=None, with_labels=True, max_damaged=config.data.max_damaged,
        )  # fmt: skip
        return ahead(batches, self.look, config)

    def tell_labels(self) -> None:
        """Says what is odd about the labels, in the log and in labels.json (rank 0)."""
        if distributed.rank() != 0:
            return
        parts: tuple[tuple[str, Words, Tally], ...] = (
            ("train", self.words, self.train_tally),
            ("valid", self.valid, self.valid_tally),
        )
        for name, words, tally in parts:
            log.info("data.%s: %d words; %s", name, words.num_samples, tally.describe())
            if words.not_read:
                log.info("data.%s: not read, as it is neither LMDB nor shards: %s", name, words.not_read)
        if self.words.sources & self.valid.sources:
            log.warning("data.valid: has words of data.train; what was learnt by heart is not told from what is read")
        samples = self.config.train.total_samples
        log.info("%s samples: every word is seen %s", f"{samples:,}", times(samples / self.words.num_samples))
        found = {name: {"words": words.num_samples, **vars(tally)} for name, words, tally in parts}
        write_json(self.home.run_dir / "labels.json", found)

    # Each step

    def begin_step(self, logged: bool) -> None:
        optimizer, total = self.config.optimizer, self.config.train.total_samples
        self.lr = schedules.warmup_cosine(
            self.progress.samples, self.home.global_batch, optimizer.lr, optimizer.final_lr, optimizer.warmup_samples,
            total,
        )  # fmt: skip
        self.engine.set_rates(self.lr, optimizer.weight_decay)

    def losses(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """The mean over all tokens of the step, however it is cut into micro-batches."""
        device, whole = distributed.device(), list(batches)
        targets = [self.encode(batch) for batch in whole]
        tokens = sum(int((part[:, 1:] != self.charset.padding).sum()) for part in targets)
        tokens_global = distributed.all_reduce_sum(torch.full((), float(tokens), device=device))
        for batch, target in zip(whole, targets, strict=True):
            images, keys = made_of(batch, self.look)
            target = target.to(device, non_blocking=True)
            logits = self.engine.forward(images.to(self.engine.dtype), target, keys)
            # the engine takes the mean over ranks and micro-batches
            loss = recognition_loss(logits, target, tokens_global / self.home.accumulation)
            yield loss, loss.detach()[None]

    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The view of each image, and its draw key, on the device."""
        keys, device = draws.sample_keys(self.config.seed, batch.epochs, batch.sample_ids), distributed.device()
        images = self.augmentation(batch.images_u8.to(device, non_blocking=True), batch.native_size, keys)
        return images, keys.to(device, non_blocking=True)

    def encode(self, batch: Batch) -> Tensor:
        """The labels of a batch as targets, int64 [B, T]."""
        length = self.config.recognizer.length
        return torch.tensor([self.charset.encode(label or "", length) for label in batch.labels])

    def figures(self, sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / self.home.micro_batches, "lr": self.lr}

    # Now and then

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Has the ranks share the validation words, read them, and keep the weights if they are the best so far."""
        words, device, ranks = self.valid.num_samples, distributed.device(), distributed.world_size()
        self.average.update(0.0)
        network: Recognizer = self.average.ready()
        count = min(READ_AT_ONCE, -(-words // ranks))
        seen, unreadable, right = 0, 0, dict.fromkeys(RULES, 0)
        loss = torch.zeros(2, dtype=torch.float64, device=device)  # its sum over tokens, and their number
        with loader(
            self.valid, Order(self.valid.shard_samples, 0, self.config.data.window_shards),
            Share(0, words, count * ranks, count, distributed.rank(), ranks), workers=self.config.data.workers,
            mask_mode=None, with_labels=True, max_damaged=1.0,  # they are words that are not read right
        ) as batches:  # fmt: skip
            for batch in batches:
                self.watch.at(self.progress.step, "validation")
                images = batch.images_u8.to(device, non_blocking=True).float()
                normalize(images)
                images, targets = images.to(self.engine.dtype), self.encode(batch).to(device)
                memory = network.encode(images)  # once: for what is read, and for the loss
                read = decoding.decode(network.decoder, memory).tokens.tolist()
                rows = zip(read, batch.labels, batch.epochs.tolist(), strict=True)
                for row, (tokens, label, epoch) in enumerate(rows):
                    if epoch == 0:  # the last batch goes on at the beginning
                        text, seen, replaced = self.charset.decode(tokens), seen + 1, row in batch.replaced
                        unreadable += replaced
                        for rule in RULES:  # a word whose image cannot be read is not read right
                            right[rule] += not replaced and same(text, label or "", self.rules[rule])
                targets[batch.epochs.to(device) > 0, 1:] = self.charset.padding
                targets[list(batch.replaced), 1:] = self.charset.padding  # another word stands in its place
                number = (targets[:, 1:] != self.charset.padding).sum()
                mean = recognition_loss(network.decoder(memory, targets[:, :-1]), targets)
                loss += torch.stack([mean * number, number])
        sums = torch.tensor([seen, unreadable, *right.values()], dtype=torch.float64, device=device)
        loss_sum, tokens_seen, total, lost, *counts = distributed.all_reduce_sum(torch.cat([loss, sums])).tolist()
        accuracy = {rule: count / total for rule, count in zip(RULES, counts, strict=True)}
        self.judge(accuracy[self.config.valid.rule])
        return {
            **{f"valid_{rule}": value for rule, value in accuracy.items()},
            "valid_best": max(self.best.score, accuracy[self.config.valid.rule]),
            "valid_loss": loss_sum / max(tokens_seen, 1),
            "valid_unreadable": lost,
        }

    def write(self, path: Path, state: dict[str, Tensor], score: float) -> None:
        config = self.config
        about = {"accuracy": score, "rule": config.valid.rule, **self.told(config.data.fraction)}
        trained = Trained(config.model, config.recognizer, self.charset, state, about, str(self.home.run_dir))
        recognizer.write(path, trained)

    def read_told(self, path: Path) -> Mapping[str, Any]:
        return recognizer.read_export(path).about

    # The end

    def remarks(self) -> str:
        weak = 0 <= self.best.score < READS_LITTLE and self.progress.step >= self.home.schedule_steps
        hint = "; it reads next to nothing: docs/finetuning.md, How much it takes" if weak else ""
        return self.best.remarks("of the validation words right") + hint
