"""A network as one file that needs nothing of this package: ONNX or TorchScript, from pixels to what it says.

    images       uint8 [B, 32, 128, 3], RGB: word crops resized without keeping their aspect ratio
    tokens       int64 [B, T]: the charset's characters by number, N unknown, N + 1 the end, then N + 2
    confidences  float32 [B, T]: the probability of each token, given those before it; 1 after the end

and of the pixel tasks

    masks        float32 [B, 32, 128]: how surely each pixel is text
    pictures     float32 [B, 32, 128, 3], RGB in [0, 1]

Normalisation, network and the greedy loop (all T steps of it) are inside; the batch may be of any size. `describe` goes
with the file: as metadata of an ONNX model, as the extra file description.json in TorchScript.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccd_train.augment.views import MEAN, STD
from ccd_train.data.masks import HEIGHT, WIDTH
from ccd_train.errors import UserError
from ccd_train.models.decoding import decode
from ccd_train.models.pixels import text_share
from ccd_train.models.recognizer import Recognizer
from ccd_train.weights.pixels import TrainedPixels
from ccd_train.weights.recognizer import Trained
from ccd_train.weights.writing import write_whole

DESCRIPTION = "description.json"
OUTPUTS = ["tokens", "confidences"]
EXAMPLES = 2  # images to trace with; of a batch of 1 exporters make a constant
CHECKED = 3  # random images that an ONNX model must read as the live one does
MASKS, PICTURES = "masks", "pictures"  # what the pixel tasks give
PIXEL_TOLERANCE = 1e-4  # of shares and of pictures in [0, 1]
TOLERANCE = 1e-3  # of their confidences; the tokens must be the same


class Whole(nn.Module):
    """From pixels to tokens. Its constants are buffers, which go with it to another device."""

    scale: Tensor
    offset: Tensor

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.recognizer = recognizer
        std = torch.tensor(STD)[:, None, None]
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", torch.tensor(MEAN)[:, None, None] / std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.permute(0, 3, 1, 2).float() * self.scale - self.offset
        words = decode(self.recognizer.decoder, self.recognizer.encode(pixels), stop_early=False)
        return words.tokens, words.confidences


class WholePixels(nn.Module):
    """From pixels to shares of text float32 [B, 32, 128], or to pictures float32 [B, 32, 128, 3] in [0, 1]."""

    def __init__(self, trained: TrainedPixels) -> None:
        super().__init__()
        self.network = trained.network()
        self.masks, self.logits = trained.head.channels == 1, trained.logits

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.network(images.permute(0, 3, 1, 2).float() / 255)
        return text_share(output, self.logits)[:, 0] if self.masks else output.clamp(0, 1).permute(0, 2, 3, 1)


def whole(trained: Trained | TrainedPixels) -> nn.Module:
    """All of it as one module."""
    return WholePixels(trained) if isinstance(trained, TrainedPixels) else Whole(trained.network())


def outputs(trained: Trained | TrainedPixels) -> list[str]:
    """The names of what it gives."""
    return ([MASKS] if trained.head.channels == 1 else [PICTURES]) if isinstance(trained, TrainedPixels) else OUTPUTS


def describe(trained: Trained | TrainedPixels) -> dict[str, Any]:
    """What one needs to use what comes out: to turn tokens into text, or to know what went in."""
    if isinstance(trained, TrainedPixels):
        return {"task": trained.task, "reading": trained.reading, "about": trained.about}
    charset = trained.charset
    return {
        "characters": charset.characters,
        "charset": charset.name,
        "unknown": charset.unknown,
        "end": charset.end,
        "padding": charset.padding,
        "about": trained.about,
    }


def write_torchscript(path: Path, trained: Trained | TrainedPixels) -> None:
    """Raises UserError where it cannot be written."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the loop has a fixed length, which the tracer cannot know
        traced = torch.jit.trace(whole(trained), _examples(), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, {DESCRIPTION: json.dumps(describe(trained))})
    write_whole(path, buffer.getvalue())


def write_onnx(path: Path, trained: Trained | TrainedPixels) -> bool:
    """Takes minutes for the official sizes. Returns whether the model was checked, for which onnxruntime is needed.

    Raises UserError where the libraries to make it are not installed, where it reads otherwise than the live model, and
    where it cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"--format onnx needs the package {error.name}: pip install onnx onnxscript") from None
    print("making the ONNX model takes a minute or two …", file=sys.stderr, flush=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole(trained),
            (_examples(),),
            dynamo=True,
            verbose=False,
            optimize=False,  # it takes as long again, and onnxruntime optimises when it loads
            input_names=["images"],
            output_names=outputs(trained),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in describe(trained).items()})
    return publish_onnx(path, model.SerializeToString(), trained)


def publish_onnx(path: Path, content: bytes, trained: Trained | TrainedPixels) -> bool:
    """Writes a model that reads as the live one does; returns whether that could be checked. Raises UserError."""
    try:
        import onnxruntime
    except ImportError:
        write_whole(path, content)
        return False
    images = torch.randint(
        256, (CHECKED, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = list(map(torch.from_numpy, session.run(outputs(trained), {"images": images.numpy()})))
    with torch.no_grad():
        live = whole(trained)(images)
    expected = [live] if isinstance(live, Tensor) else list(live)
    tolerance = PIXEL_TOLERANCE if isinstance(trained, TrainedPixels) else TOLERANCE
    if not all(_alike(*pair, tolerance) for pair in zip(found, expected, strict=True)):
        raise UserError(
            f"{path}: not written, because onnxruntime {onnxruntime.__version__} reads it otherwise than torch reads "
            f"{trained.origin}; try other versions of torch and onnxruntime, or --format torchscript"
        )
    write_whole(path, content)
    return True


def _alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whole numbers must be the same."""
    return torch.allclose(one, other, atol=tolerance) if one.is_floating_point() else torch.equal(one, other)


def _examples() -> Tensor:
    return torch.zeros(EXAMPLES, HEIGHT, WIDTH, 3, dtype=torch.uint8)
