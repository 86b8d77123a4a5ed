"""Recognisers for other tools: ONNX Runtime and plain torch read the same words as the live model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import words
from conftest import Tiny

from ccd_train.commands import export
from ccd_train.data.masks import decode_rgb, resize_image
from ccd_train.errors import UserError
from ccd_train.models.decoding import DecodedWords
from ccd_train.weights import portable
from ccd_train.weights import recognizer as recognizers

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the packages of the extra 'onnx' are not installed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, and its two other forms."""
    return words.write(tmp_path_factory.mktemp("portable"))


@pytest.fixture(scope="module")
def crops(tiny: Tiny) -> np.ndarray:
    return np.stack([resize_image(decode_rgb(data)) for data in words.images(tiny.lmdb, 5)])


@pytest.fixture(scope="module")
def live(folder: Path, crops: np.ndarray) -> DecodedWords:
    whole = portable.Whole(recognizers.read(folder).network())
    with torch.no_grad():
        return DecodedWords(*whole(torch.from_numpy(crops)))


@pytest.fixture(scope="module")
def onnx_file(folder: Path) -> Path:
    path, said = folder / "recognizer.onnx", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert export.main(["--weights", str(folder), "--format", "onnx", "--out", str(path)]) == 0
    assert said.getvalue().endswith("62 characters; reads as the live model\n")
    return path


def spelt(tokens: Any, description: dict[str, Any]) -> list[str]:
    """Text by nothing but the description."""
    texts = []
    for row in tokens.tolist():
        row = row[: row.index(description["end"])] if description["end"] in row else row
        texts.append("".join(description["characters"][token] for token in row))
    return texts


def test_the_live_model_takes_pixels_as_the_reader_does(live: DecodedWords, tiny: Tiny) -> None:
    expected = words.texts(words.small(), words.images(tiny.lmdb, 5))
    assert spelt(live.tokens, portable.describe(words.small())) == expected


def test_torchscript_reads_without_this_package(folder: Path, crops: np.ndarray, live: DecodedWords) -> None:
    path = folder / "recognizer.pt"
    assert export.main(["--weights", str(folder), "--format", "torchscript", "--out", str(path)]) == 0
    np.save(folder / "crops.npy", crops)
    program = (
        "import sys, json, numpy, torch\n"
        "files = {'description.json': ''}\n"
        "model = torch.jit.load(sys.argv[1], _extra_files=files)\n"
        "tokens, confidences = model(torch.from_numpy(numpy.load(sys.argv[2])))\n"
        "assert 'ccd_train' not in sys.modules\n"
        "print(json.dumps([tokens.tolist(), confidences.tolist(), json.loads(files['description.json'])]))\n"
    )
    command = [sys.executable, "-c", program, str(path), str(folder / "crops.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    tokens, confidences, description = json.loads(done.stdout.splitlines()[-1])
    assert tokens == live.tokens.tolist()
    assert torch.allclose(torch.tensor(confidences), live.confidences, atol=1e-5)
    assert description == portable.describe(recognizers.read(folder))


def test_torchscript_holds_nothing_that_stays_on_one_device(folder: Path, tmp_path: Path) -> None:
    portable.write_torchscript(tmp_path / "x.pt", recognizers.read(folder))
    graph = torch.jit.load(tmp_path / "x.pt").inlined_graph
    constants = [node.output() for node in graph.findAllNodes("prim::Constant")]
    tensors = [value.toIValue() for value in constants if isinstance(value.type(), torch._C.TensorType)]
    assert not [tensor.shape for tensor in tensors if tensor.dim()]
    assert not [value for value in constants if isinstance(value.type(), torch._C.DeviceObjType)]


@needs_onnx
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnxruntime_reads_batches_of_any_size(
    onnx_file: Path, crops: np.ndarray, live: DecodedWords, batch: int
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    tokens, confidences = session.run(None, {"images": crops[:batch]})
    assert tokens.tolist() == live.tokens[:batch].tolist()
    assert np.allclose(confidences, live.confidences[:batch].numpy(), atol=1e-5)


@needs_onnx
def test_an_onnx_model_describes_itself(onnx_file: Path, live: DecodedWords, tiny: Tiny) -> None:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(onnx_file))
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    description = {name: json.loads(value) for name, value in metadata.items()}
    assert description == portable.describe(words.small())
    assert [(one.name, one.type) for one in session.get_inputs()] == [("images", "tensor(uint8)")]
    assert [one.name for one in session.get_outputs()] == portable.OUTPUTS
    assert spelt(live.tokens, description) == words.texts(words.small(), words.images(tiny.lmdb, 5))


@needs_onnx
def test_an_onnx_model_that_reads_otherwise_is_not_left(onnx_file: Path, tmp_path: Path) -> None:
    content = onnx_file.read_bytes()
    with pytest.raises(UserError, match=r"x.onnx: not written, because onnxruntime .* reads it otherwise"):
        portable.publish_onnx(tmp_path / "x.onnx", content, words.small(seed=4))
    assert list(tmp_path.iterdir()) == []
    assert portable.publish_onnx(tmp_path / "x.onnx", content, words.small())
    assert (tmp_path / "x.onnx").read_bytes() == content


def test_without_onnxruntime_a_model_is_written_unchecked(tmp_path: Path) -> None:
    program = (
        "import sys, words; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path; from ccd_train.weights import portable\n"
        "assert portable.publish_onnx(Path(sys.argv[1]), b'model', words.small()) is False"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.onnx").read_bytes() == b"model"


@pytest.mark.parametrize(
    ("form", "name"), [("weights", "x.safetensors"), ("torchscript", "x.pt"), ("backbone", "x.safetensors")]
)
def test_a_file_that_cannot_be_finished_leaves_the_old_one(folder: Path, tmp_path: Path, form: str, name: str) -> None:
    """The disk is full: no process may write more than 1 KiB into a file."""
    path = tmp_path / name
    path.write_text("old")
    program = (
        "import resource, signal, sys; from ccd_train.commands import export\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ccd_train.errors import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "run(lambda: export.main(sys.argv[1:]))"
    )
    options = ["--weights", str(folder), "--format", form, "--out", str(path)]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_without_the_packages_a_line_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        "from ccd_train.commands import export; from ccd_train.errors import run\n"
        "run(lambda: export.main(sys.argv[1:]))"
    )
    options = ["--weights", str(folder), "--format", "onnx", "--out", str(tmp_path / "x.onnx")]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --format onnx needs the package onnx: pip install onnx onnxscript\n"


def test_the_place_is_looked_at_before_minutes_of_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "write_onnx", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    for place in ("file/x.onnx", "folder.onnx"):
        with pytest.raises(UserError, match=f"{place}: cannot be written"):
            export.main(["--weights", str(folder), "--format", "onnx", "--out", str(tmp_path / place)])


def test_the_backbone_of_a_recognizer_is_called_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vit.safetensors"
    assert export.main(["--weights", str(folder), "--format", "backbone", "--out", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: the ViT of the recogniser of {folder / recognizers.FILE}\n"


def test_a_recognizer_is_exported_again(folder: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "one.safetensors", tmp_path / "folder"):
        assert export.main(["--weights", str(folder), "--out", str(out)]) == 0
        again, first = recognizers.read(out), recognizers.read(folder)
        assert (again.model, again.sizes, again.charset, again.about) == (
            first.model, first.sizes, first.charset, first.about
        )  # fmt: skip
        assert all(torch.equal(again.state[name], tensor) for name, tensor in first.state.items())


def test_any_crop_fits_after_a_resize(folder: Path) -> None:
    whole = portable.Whole(recognizers.read(folder).network())
    crop = np.random.default_rng(0).integers(0, 255, (7, 300, 3), dtype=np.uint8)
    tokens, _ = whole(torch.from_numpy(cv2.resize(crop, (128, 32)))[None])
    assert tokens.shape == (1, words.SIZES.length)


def test_a_place_that_is_not_there_is_named_before_a_place_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder; name a run"):
        export.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "--format onnx needs a place"),
        ([], "needs a place: say where to write with --out"),
        (["--out", "x.pth"], "not written in the official layout"),
        (["--out", "x.pt"], "or --format torchscript with a .pt"),
        (["--out", "x.onnx"], "a .onnx file is for --format onnx"),
        (["--format", "torchscript", "--out", "/dev/null/x.pt"], "cannot be written"),
        (["--charset", "36", "--out", "x"], "reads charset 62"),
    ],
)
def test_what_cannot_be_done_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export.main(["--weights", str(folder), *arguments])
