"""Networks of the pixel tasks in use: scores of test sets, pictures of any size, files that need nothing of ours."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from crops import REAL
from painted import png, write_crops, write_pairs, write_records

from ccd_train.commands import evaluate, segment, upscale
from ccd_train.commands import export as exporting
from ccd_train.config.pixels import MaskHead, PictureHead
from ccd_train.config.pretraining import Model
from ccd_train.data.masks import decode_rgb
from ccd_train.data.pairs import PairLmdb, look
from ccd_train.errors import UserError
from ccd_train.models import scores
from ccd_train.models.pixels import PixelNetwork
from ccd_train.tasks.pixels.painting import Painter
from ccd_train.weights import pixels, portable
from ccd_train.weights.pixels import TrainedPixels

MODEL = Model(width=16, depth=1, heads=2, drop_path=0.0)


def trained(task: str, seed: int = 3, reading: str = "") -> TrainedPixels:
    """A network that was not trained, but says something."""
    head = MaskHead(layers=1) if task == "segment" else PictureHead(layers=1)
    torch.manual_seed(seed)
    network = PixelNetwork(MODEL, head)
    torch.nn.init.normal_(network.decoder.prediction.weight, std=0.05)
    reading = reading or ("background" if task == "segment" else "stored")
    return TrainedPixels(task, MODEL, head, reading, network.state_dict(), {"step": 1}, "memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of both, crops with masks, and pairs in the three parts of TextZoom."""
    place = tmp_path_factory.mktemp("painted")
    for task in ("segment", "superresolve"):
        pixels.write(place / task / pixels.FILE, trained(task))
    write_crops(place / "crops", 9)
    for number, (name, count) in enumerate((("easy", 5), ("medium", 4), ("hard", 3))):
        write_pairs(place / "zoom" / "test" / name, count, seed=number)
    return place


def table(out: Path) -> dict[str, object]:
    return json.loads((out / "table.json").read_text())  # type: ignore[no-any-return]


def test_a_network_for_masks_is_scored(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that says all is text: fg_iou is the share of text in what is not ignored."""
    network = trained("segment")
    state = {name: torch.zeros_like(value) for name, value in network.state.items()}
    state["decoder.prediction.bias"] += 9.0
    pixels.write(tmp_path / "w" / pixels.FILE, replace(network, state=state))
    data = ["--data", str(folder / "crops"), "--out", str(tmp_path / "out")]
    assert evaluate.main([str(tmp_path / "w"), *data, "--batch_size", "4"]) == 0
    said = capsys.readouterr().out
    first = re.search(r"\| set \| pictures \| (\w+)", said)
    assert first and first[1] == "fg_iou" and "not comparable" in said
    (one,) = table(tmp_path / "out")["sets"]  # type: ignore[misc]
    values = one["values"]
    text, ground = sum(values["true_positive"]), sum(values["false_positive"])
    assert one["scores"]["fg_iou"] == pytest.approx(text / (text + ground)) and not sum(values["false_negative"])
    assert values["number"] == list(range(1, 10)) and len(values["iou_of_images"]) == 9
    page = (tmp_path / "out" / "errors.html").read_text()
    assert page.count("<img") == 9 * 4
    before = one["hash"]
    assert evaluate.main([str(tmp_path / "w"), *data, "--batch_size", "2", "--errors", "2"]) == 0
    (again,) = table(tmp_path / "out")["sets"]  # type: ignore[misc]
    assert again["hash"] == before and again["scores"] == one["scores"]
    assert (tmp_path / "out" / "errors.html").read_text().count("<img") == 2 * 4


def test_bicubic_alone_scores_as_the_formula_says(folder: Path, tmp_path: Path) -> None:
    """Route and gate of each part, and both averages."""
    found = {}
    for route in ("stored", "x2"):
        out = tmp_path / route
        assert evaluate.main(["bicubic", "--data", str(folder / "zoom"), "--route", route, "--out", str(out)]) == 0
        found[route] = table(out)
        sets = found[route]["sets"]
        assert [one["name"] for one in sets] == ["easy", "medium", "hard"]  # type: ignore[attr-defined]
        for one in sets:  # type: ignore[attr-defined]
            source = PairLmdb(folder / "zoom" / "test" / one["name"], route)  # type: ignore[arg-type]
            samples = [two.sample for two in look(source, range(1, len(source) + 1)) if two.sample]
            given, truth = (
                torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
                for arrays in ([two.image for two in samples], [two.target for two in samples])
            )
            assert one["scores"]["psnr"] == pytest.approx(scores.psnr(given.float() / 255, truth).mean().item())
            assert one["scores"]["gain"] == 0
            small = torch.from_numpy(np.stack([source.small(n + 1) for n in range(len(source))])).permute(0, 3, 1, 2)
            errors = scores.squared_errors(scores.bicubic(small.float() / 255), truth)
            assert one["scores"]["gate_psnr_of_batches"] == pytest.approx(scores.psnr_of_batches(errors))
        averages = found[route]["averages"]["TextZoom"]  # type: ignore[index]
        each = [one["scores"]["psnr"] for one in sets]  # type: ignore[attr-defined]
        assert averages["plain"]["psnr"] == pytest.approx(sum(each) / 3)
        weighted = sum(value * n for value, n in zip(each, (5, 4, 3), strict=True)) / 12
        assert averages["weighted"]["psnr"] == pytest.approx(weighted)
    gates = [[one["scores"]["gate_ssim"] for one in found[route]["sets"]] for route in found]  # type: ignore[attr-defined]
    assert gates[0] == gates[1]


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no real pictures beside the checkout")
@pytest.mark.parametrize(
    ("route", "psnr", "ssim"),
    [("stored", (20.1037, 19.7278), (0.7624, 0.7500)), ("x2", (19.5810, 19.2917), (0.7401, 0.7309))],
)
def test_the_gate_of_derived_pairs(
    route: str, psnr: tuple[float, float], ssim: tuple[float, float], tmp_path: Path
) -> None:
    """The figures of their README."""
    data = ["--data", str(REAL / "textzoom_like" / "test"), "--out", str(tmp_path)]
    assert evaluate.main(["--weights", "bicubic", "--route", route, *data]) == 0
    averages = table(tmp_path)["averages"]["TextZoom"]  # type: ignore[index]
    for kind, level, alike in zip(("weighted", "plain"), psnr, ssim, strict=True):
        assert averages[kind]["psnr"] == pytest.approx(level, abs=1e-3)
        assert averages[kind]["ssim"] == pytest.approx(alike, abs=1e-4)
    gate = averages["weighted"]
    assert gate["gate_psnr_of_batches"] == pytest.approx(18.6030, abs=1e-3)
    assert gate["gate_ssim"] == pytest.approx(0.7339, abs=1e-4)


def test_a_bad_picture_is_counted_and_a_bad_set_comes_last(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, broken in (("a", [2]), ("b", [1, 2, 3])):
        write_pairs(tmp_path / "sets" / name, 3)
        write_records(tmp_path / "sets" / name, {b"image_lr-%09d" % number: b"no" for number in broken})
    words = [str(folder / "superresolve"), "--data", str(tmp_path / "sets"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"b: none of its 3 pictures can be used \(image_lr-000000001: not an image"):
        evaluate.main(words)
    assert "warning: a: 1 pictures cannot be used and do not count: image_lr-000000002" in capsys.readouterr().out
    (one,) = table(tmp_path / "out")["sets"]  # type: ignore[misc]
    assert one["pictures"] == 2 and one["values"]["number"] == [1, 3]
    with pytest.raises(UserError, match="no set nothing; there are a, b"):
        evaluate.main([*words, "--sets", "nothing"])
    with pytest.raises(UserError, match=r"word images .* without partners"):
        evaluate.main([str(folder / "superresolve"), "--data", str(folder / "crops")])


def test_pictures_of_any_size_become_masks_of_their_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files, folders, patterns and lists; what cannot be read is named, and equal names do not collide."""
    sizes = {"in/one.png": (7, 300), "in/deep/one.png": (90, 20), "two.png": (32, 128)}
    for name, (height, width) in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)))
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "list.json").write_text(json.dumps(["two.png"]))
    out = tmp_path / "out"
    words = [str(tmp_path / "in"), str(tmp_path / "tw*.png"), str(tmp_path / "list.json"), "--out", str(out)]
    assert segment.main(["--weights", str(folder / "segment"), *words]) == 0
    assert "1 of 5 pictures cannot be read" in capsys.readouterr().err
    written = json.loads((out / "written.json").read_text())
    assert [Path(one["output"]).relative_to(out).as_posix() for one in written if "output" in one] == [
        "deep/one.png", "one.png", "two.png", "two-2.png",
    ]  # fmt: skip
    for one in written:
        if "output" in one:
            mask = cv2.imread(one["output"], cv2.IMREAD_UNCHANGED)
            image = decode_rgb(Path(one["image"]).read_bytes())
            assert mask.shape == image.shape[:2] and set(np.unique(mask).tolist()) <= {0, 255}
    with pytest.raises(UserError, match="learnt segment; give a network that learnt superresolve"):
        upscale.main(["--weights", str(folder / "segment"), *words])
    with pytest.raises(UserError, match="no file is like this"):
        segment.main(["--weights", str(folder / "segment"), "nothing*", "--out", str(out)])
    assert (
        segment.main(["--weights", str(folder / "segment"), str(tmp_path / "in" / "bad.png"), "--out", str(out)]) == 2
    )


def test_pictures_are_enlarged_to_twice_their_size(folder: Path, tmp_path: Path) -> None:
    """In the window's own size it is the network's picture at twice the size; without a network's say, bicubic."""
    (tmp_path / "a.png").write_bytes(png(np.full((50, 200, 3), 80, np.uint8)))
    network = trained("superresolve")
    quiet = {name: torch.zeros_like(v) if "prediction" in name else v for name, v in network.state.items()}
    pixels.write(tmp_path / "quiet" / pixels.FILE, replace(network, state=quiet))
    for weights, same in ((tmp_path / "quiet", True), (folder / "superresolve", False)):
        out = tmp_path / f"out_{same}"
        assert upscale.main(["--weights", str(weights), str(tmp_path / "a.png"), "--out", str(out)]) == 0
        result = cv2.imread(str(out / "a.png"))
        assert result.shape == (100, 400, 3)
        assert bool((result == 80).all()) is same


@pytest.mark.parametrize("task", ["segment", "superresolve"])
def test_exports_say_what_the_live_network_says(folder: Path, tmp_path: Path, task: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 128, 3), np.uint8)
    expected = Painter(trained(task)).paint(images)
    expected = expected[:, 0] if task == "segment" else expected.clamp(0, 1).permute(0, 2, 3, 1)
    source = str(folder / task)
    for form, name in (("weights", "w.safetensors"), ("torchscript", "w.pt"), ("onnx", "w.onnx")):
        assert exporting.main([source, "--format", form, "--out", str(tmp_path / name)]) == 0
    again = pixels.read(tmp_path / "w.safetensors")
    assert all(torch.equal(again.state[name], value) for name, value in trained(task).state.items())
    scripted = torch.jit.load(str(tmp_path / "w.pt"))(torch.from_numpy(images))
    assert torch.allclose(scripted, expected, atol=1e-4)
    session = onnxruntime.InferenceSession(str(tmp_path / "w.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(portable.outputs(trained(task)), {"images": images})
    assert np.abs(found - expected.numpy()).max() <= 1e-4
    assert json.loads(session.get_modelmeta().custom_metadata_map["task"]) == task
    with pytest.raises(UserError, match="reads it otherwise"):
        portable.publish_onnx(tmp_path / "x.onnx", (tmp_path / "w.onnx").read_bytes(), trained(task, seed=4))


def test_a_damaged_export_is_one_line(folder: Path, tmp_path: Path) -> None:
    content = (folder / "segment" / pixels.FILE).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"cut.safetensors: cannot be read"):
        pixels.read(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"no pixels.safetensors here"):
        pixels.read(tmp_path)
