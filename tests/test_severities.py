"""The settings of the views: what may be written, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccd_train.augment.severities import CHAINS, RANGES, RESIZED, Augment
from ccd_train.config.options import from_dict, parse, to_dict
from ccd_train.config.pretraining import Config
from ccd_train.errors import UserError


def test_severity_5_is_the_default_and_has_the_official_constants() -> None:
    chain = Augment().resolve()
    assert chain is CHAINS["severity_5"]
    assert chain.identity == 0.2
    assert {group.name: group.probability for group in chain.groups} == {
        "noise": 1.0, "color": 0.7, "sharpness": 0.7, "contrast": 0.7, "weather": 0.7,
    }  # fmt: skip
    assert [len(group.operations) for group in chain.groups] == [21, 9, 8, 8, 4]
    sharpness = chain.groups[2].operations
    assert sharpness["sharpen"] == 0.5 and sharpness["gaussian_blur"] == pytest.approx(0.1)
    assert sum(sharpness[f"median_blur_{size}"] for size in (3, 5, 7)) == pytest.approx(0.1)
    assert chain.range("gaussian_noise.scale") == (0, pytest.approx(51 * RESIZED)) and chain.range(
        "jpeg.compression"
    ) == (70, 99)


def test_severities_differ_where_the_official_ones_do() -> None:
    assert CHAINS["severity_1"].range("invert.probability") == (0.5, 0.5)
    assert CHAINS["severity_3"].range("invert.probability") == (0.1, 0.1)
    assert CHAINS["severity_4"].range("gaussian_noise.scale") == (0, 25.5 * RESIZED)
    assert CHAINS["severity_4"].identity == 0.2
    assert len(CHAINS["severity_6"].groups[0].operations) == 17
    finetune = {name: CHAINS[name] for name in ("finetune_small", "finetune_base")}
    assert [group.probability for group in finetune["finetune_small"].groups] == [0.6, 0.8, 0.6, 0.6]
    assert [group.probability for group in finetune["finetune_base"].groups] == [0.4, 0.7, 0.7, 0.7]
    assert [chain.warp for chain in finetune.values()] == [0.6, 0.5]
    assert [len(group.operations) for group in finetune["finetune_small"].groups] == [1, 35, 7, 8]


def test_the_official_ranges_are_possible() -> None:
    for name, chain in CHAINS.items():
        for parameter in RANGES:
            low, high = chain.range(parameter)
            Augment(name, (f"{parameter}={low}:{high}",)).check()


def test_the_documentation_has_every_operation_with_its_ranges() -> None:
    lines = (Path(__file__).parents[1] / "docs" / "augmentations.md").read_text(encoding="utf-8").splitlines()
    for group in CHAINS["severity_5"].groups:
        for operation, share in group.operations.items():
            (line,) = (line for line in lines if line.startswith(f"| `{operation}` | {100 * share:.1f} % |"))
            for name, (low, high) in RANGES.items():
                if name.startswith(f"{operation}."):
                    text = f"{name.partition('.')[2]} {low:.4g}" + (f" … {high:.4g}" if low != high else "")
                    assert text in line


def test_overrides() -> None:
    chain = Augment("severity_5", ("weather=0.25", "identity=0", "gaussian_noise.scale=0:30", "jpeg.compression=80"))
    resolved = chain.resolve()
    assert resolved.identity == 0
    assert {group.name: group.probability for group in resolved.groups}["weather"] == 0.25
    assert resolved.range("gaussian_noise.scale") == (0, 30)
    assert resolved.range("jpeg.compression") == (80, 80)
    assert resolved.range("gamma.exponent") == RANGES["gamma.exponent"]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("weather=-0.1", "a probability must be one number from 0 to 1"),
        ("weather=1.5", "a probability must be one number from 0 to 1"),
        ("weather=0:1", "a probability must be one number from 0 to 1"),
        ("identity=2", "a probability must be one number from 0 to 1"),
        ("gaussian_noise.scale=30:0", "inverted"),
        ("gaussian_noise.scale=-5:5", "must lie between 0 and 255"),
        ("gaussian_noise.scale", "write NAME=VALUE"),
        ("gaussian_noise.scale=a:b", "write NAME=VALUE"),
        ("gaussian_noise.scale=0:1:2", "write NAME=VALUE"),
        ("gaussian_noise.scale=nan", "write NAME=VALUE"),
        ("gamma.exponent=inf", "write NAME=VALUE"),
        ("gausian_noise.scale=0:30", "did you mean gaussian_noise.scale"),
        ("wether=0.3", "did you mean weather"),
        ("dropout.share=0:1.5", "must lie between 0 and 1"),
        ("clahe.tiles=3:12", "must lie between 1 and 8"),
        ("average_blur.size=2.5:4", "must be whole numbers"),
        ("gaussian_blur.sigma=0:1", "must lie between 0.05 and 10"),
    ],
)
def test_bad_overrides_are_refused_by_name(override: str, complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        Augment("severity_5", (override,)).check()
    assert override in str(refused.value) and complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_chain_is_refused() -> None:
    with pytest.raises(UserError, match=r"augment\.chain = severity_7.*severity_5"):
        Augment("severity_7").check()


def test_the_command_line_and_the_run_folder_carry_them(tmp_path: Path) -> None:
    words = ["--run_dir", str(tmp_path), "--data.shards", str(tmp_path), "--augment.chain", "severity_4"]
    config = parse(Config, [*words, "--augment.overrides", "color=0.2", "gamma.exponent=0.8:1.2"], "ccd-train pretrain")
    config.check()
    assert config.augment.resolve().range("gamma.exponent") == (0.8, 1.2)
    assert from_dict(Config, to_dict(config), "config.yaml") == config
    wrong = parse(Config, [*words, "--augment.overrides", "color=7"], "ccd-train pretrain")
    with pytest.raises(UserError, match="color=7"):
        wrong.check()
