"""The whole road, by the public commands: LMDB → shards → verified → 60 steps, once undisturbed and once killed."""

from __future__ import annotations

import signal
from pathlib import Path
from statistics import mean

import pytest
from conftest import CHECKOUT
from test_resume import command, live, losses, metrics

from ccd_train.data.records import LmdbReader
from data_tools import convert, synth, verify

REAL = CHECKOUT.parent / "shared" / "real" / "iiit5k_train"
STEPS, KILLED = 60, 31
SETTINGS = ["--max-steps", str(STEPS), "--train.micro_batch_size", "16", "--train.threads", "1", "--data.workers", "1"]
SETTINGS += ["--log.every_steps", "1", "--log.pictures_every_steps", "0", "--checkpoint.every_steps", "10"]
SETTINGS += ["--optimizer.warmup_samples", "100", "--optimizer.freeze_last_layer_samples", "100"]


def travel(lmdb: Path, folder: Path) -> None:
    """Converts, verifies, pretrains twice with 2 processes; one run is killed in the middle and started again."""
    shards = folder / "shards"
    assert (
        convert.main(["--src", str(lmdb), "--out", str(shards), "--name", "words", "--samples-per-shard", "500"]) == 0
    )
    assert verify.main([str(shards), "--deep"]) == 0
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    assert live(undisturbed, command("vit_nano", shards, undisturbed, 2, *SETTINGS)) == 0
    arguments = command("vit_nano", shards, killed, 2, *SETTINGS)
    live(killed, arguments, lambda: len(metrics(killed)) >= KILLED, signal.SIGKILL)
    assert KILLED <= len(metrics(killed)) < STEPS
    assert live(killed, arguments) == 0
    assert [line["step"] for line in losses(killed)] == list(range(1, STEPS + 1))
    assert losses(killed) == losses(undisturbed)
    curve = [line["loss"] for line in losses(killed)]
    assert mean(curve[-15:]) < mean(curve[:15])


@pytest.mark.slow
def test_on_synthetic_words(tmp_path: Path) -> None:
    assert synth.main(["--out", str(tmp_path / "words"), "--num-samples", "600", "--seed", "3"]) == 0
    travel(tmp_path / "words", tmp_path)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="no real words beside the checkout")
def test_on_photographed_words(tmp_path: Path) -> None:
    with LmdbReader(REAL) as reader:
        assert len(reader) == 2000
    travel(REAL, tmp_path)
