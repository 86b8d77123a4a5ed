"""Official checkpoints in and out, exports, and the verb: what is kept, and how everything else is refused."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ccd_train.commands import export
from ccd_train.config.pretraining import Model
from ccd_train.errors import UserError
from ccd_train.models.ccd import Student, Teacher
from ccd_train.weights import backbone as weights
from ccd_train.weights import official as layout
from ccd_train.weights import tensors

OFFICIAL = Path(__file__).parent / "golden" / "official_layout.pth"
HEADS = json.loads((OFFICIAL.parent / "meta.json").read_text())["num_heads"]
NANO = Model(
    width=64, depth=6, heads=1, segmentation_width=16, head_hidden=32, head_bottleneck=16, prototypes=48,
)  # fmt: skip


def fresh(model: Model = NANO, seed: int = 0) -> weights.Weights:
    """Weights as after some training: no tensor is still what it was initialised to."""
    torch.manual_seed(seed)
    states = {}
    for name, kind in weights.NETWORKS.items():
        state = kind(model).state_dict()
        states[name] = {key: torch.randn(tensor.shape).abs() + 0.1 for key, tensor in state.items()}
    return weights.Weights(model, states["teacher"], states["student"], "a test")


def resizable(found: weights.Weights) -> weights.Weights:
    """The same with a position embedding that an official one can give."""
    embedding = layout.resize_embedding(torch.randn(1, 256, found.model.width))
    states = {name: {**getattr(found, name), layout.EMBEDDING: embedding} for name in weights.NETWORKS}
    return replace(found, **states)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=name)


def official(path: Path = OFFICIAL) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the official checkpoint with a change."""
    content = official()
    change(content)
    torch.save(content, path)
    return path


def test_an_export_comes_back_bit_for_bit(tmp_path: Path) -> None:
    found = fresh()
    weights.write_export(tmp_path / "out", found, {"step": 7})
    for path in (tmp_path / "out", tmp_path / "out" / "teacher.safetensors"):
        back = weights.read(path)
        assert back.model == NANO
        assert_equal(back.teacher, found.teacher)
        assert_equal(back.student, found.student)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["about"] == {"step": 7}


def test_only_the_teacher_s_file_stands_for_its_export(tmp_path: Path) -> None:
    weights.write_export(tmp_path, fresh(), {})
    (tmp_path / "vit.safetensors").touch()
    for name in ("student.safetensors", "vit.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: only teacher\.safetensors or its folder .* give one of them"):
            weights.read(tmp_path / name)


def test_official_in_and_out_again_changes_nothing_that_is_used(tmp_path: Path) -> None:
    """All but conv_mla comes back with its value; the position embedding with what the official code makes of it."""
    residual = weights.write_official(tmp_path / "again.pth", weights.read(OFFICIAL, HEADS))
    assert residual < 1e-6
    before, after = official(), official(tmp_path / "again.pth")
    for network in weights.NETWORKS:
        used = {name for name in before[network] if "conv_mla" not in name}
        assert used == after[network].keys()
        for name in used - {"module.backbone.cls_token"}:
            old, new = before[network][name], after[network][name]
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith("pos_embed"):
                old, new = layout.resize_embedding(old), layout.resize_embedding(new)
                torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
            else:
                assert torch.equal(new, old.float()), name


def test_ours_to_official_and_back(tmp_path: Path) -> None:
    found = resizable(fresh())
    assert weights.write_official(tmp_path / "ours.pth", found) < 1e-5
    back = weights.read(tmp_path / "ours.pth")
    assert back.model == NANO
    assert_equal(back.student, found.student, 1e-5)
    assert_equal(back.teacher, found.teacher, 1e-5)


def test_every_tensor_has_an_official_name_of_its_own() -> None:
    names = [weights.official_name(name) for name in fresh().student]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith(("vit.", "projection."))]


def test_a_position_embedding_that_has_no_official_form_is_refused_unless_lossy(tmp_path: Path) -> None:
    found = fresh()
    with pytest.raises(UserError, match=r"position embedding.* off by \d+\.\d+%.*--lossy"):
        weights.write_official(tmp_path / "ours.pth", found)
    assert not (tmp_path / "ours.pth").exists()
    residual = weights.write_official(tmp_path / "ours.pth", found, lossy=True)
    back = weights.read(tmp_path / "ours.pth").student[layout.EMBEDDING]
    embedding = found.student[layout.EMBEDDING]
    assert float((back - embedding).norm() / embedding.norm()) == pytest.approx(residual, rel=0.2)
    assert residual > weights.LARGEST_RESIDUAL


def test_the_closest_embedding_is_the_closest() -> None:
    """No small step from it, in any of 50 directions, comes closer."""
    wanted = torch.randn(1, 256, 3, generator=torch.Generator().manual_seed(0))
    closest, residual = layout.official_embedding(wanted)
    for seed in range(50):
        step = 0.02 * torch.randn(closest.shape, generator=torch.Generator().manual_seed(seed))
        other = (layout.resize_embedding(closest + step) - wanted).norm() / wanted.norm()
        assert other > residual


def test_other_taps_are_refused_unless_lossy(tmp_path: Path) -> None:
    found = resizable(fresh(replace(NANO, taps=(1, 2, 3))))
    with pytest.raises(UserError, match=r"blocks \(1, 2, 3\)"):
        weights.write_official(tmp_path / "ours.pth", found)
    weights.write_official(tmp_path / "ours.pth", found, lossy=True)
    assert (tmp_path / "ours.pth").exists()


def test_fewer_than_six_blocks_are_refused_always(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="6 blocks or more"):
        weights.write_official(tmp_path / "x.pth", resizable(fresh(replace(NANO, depth=3, taps=(1, 2, 3)))), lossy=True)


def test_heads_that_the_tensors_do_not_tell_must_be_given() -> None:
    with pytest.raises(UserError, match="--heads"):
        weights.read(OFFICIAL)
    assert weights.read(OFFICIAL, heads=HEADS).model.heads == HEADS
    with pytest.raises(UserError, match=r"model\.heads"):
        weights.read(OFFICIAL, heads=7)


def rename(network: str, old: str, new: str | None) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        tensor = content[network].pop(f"module.{old}")
        if new is not None:
            content[network][f"module.{new}"] = tensor

    return change


def cut(content: dict[str, Any]) -> None:
    name = "module.backbone.blocks.3.mlp.fc2.weight"
    content["teacher"][name] = content["teacher"][name][:, :5]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rename("teacher", "backbone.norm.bias", None), r"backbone\.norm\.bias is missing"),
        (rename("student", "segmentation.cls.bias", "segmentation.clss.bias"), r"segmentation\.cls\.bias is missing"),
        (rename("student", "segmentation.cls.bias", "segmentation.clss.bias"), r"clss\.bias has no place"),
        (cut, r"blocks\.3\.mlp\.fc2\.weight is 32×5 instead of 32×128"),
        (lambda content: content.pop("teacher"), "no teacher in it"),
        (lambda content: content["student"].update(number=3), "student: 'number'"),
        (lambda content: content["student"].update({3: torch.zeros(1)}), "student: 3: no tensors with names"),
        (rename("student", "head.last_layer.weight_v", None), "weight_v is missing"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], None], named: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "changed.pth", change)
    with pytest.raises(UserError, match=named) as refusal:
        weights.read(path, HEADS)
    assert "\n" not in str(refusal.value)


def test_loading_into_another_network_names_what_differs() -> None:
    with pytest.raises(UserError, match=r"projection\.prototypes\.direction is 48×16 instead of 24×16"):
        tensors.load(Student(replace(NANO, prototypes=24)), fresh().student, "a test")
    tensors.load(Teacher(NANO), fresh().teacher, "a test")


def test_options_beside_the_tensors_are_data(tmp_path: Path) -> None:
    """Forks that descend from DINO keep an argparse.Namespace; what it holds is judged as everything else."""
    path = tmp_path / "official.pth"
    checkpoint = torch.load(OFFICIAL, weights_only=True)
    torch.save(checkpoint | {"args": argparse.Namespace(lr=5e-4, names=["a"], nested=argparse.Namespace(x=1))}, path)
    assert isinstance(tensors.read_tensors(path)["args"], argparse.Namespace)
    assert_equal(weights.read(path, HEADS).student, weights.read(OFFICIAL, HEADS).student, 0.0)
    torch.save(checkpoint | {"args": argparse.Namespace(out=path)}, path)
    with pytest.raises(UserError, match=r"holds pathlib.*could run code"):
        tensors.read_tensors(path)
    with pytest.raises(UnpicklingError):
        torch.load(path, weights_only=True)  # nothing is allowed outside


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    marker = tmp_path / "was_here"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    torch.save({"student": Touch()}, path)
    with pytest.raises(UserError, match="could run code"):
        weights.read(path)
    assert not marker.exists()


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    text, short, foreign = tmp_path / "text.pth", tmp_path / "short.pth", tmp_path / "list.pth"
    text.write_text("not a checkpoint")
    short.write_bytes(OFFICIAL.read_bytes()[:200_000])
    torch.save([1, 2], foreign)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    for path in (text, short, foreign, tmp_path / "zip.pth", tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError) as refusal:
            weights.read(path)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"for torch\.jit\.load; give the run it comes from, or its \.safetensors"):
        tensors.read_tensors(tmp_path / "x.pt")


def test_a_broken_pickle_is_refused_in_one_line(tmp_path: Path) -> None:
    """Cut off or changed anywhere, in an archive that is whole: what can still be read, or one line."""
    torch.save({"net": {"weight": torch.zeros(2)}}, tmp_path / "whole.pth")
    broken, refused = tmp_path / "broken.pth", 0
    with zipfile.ZipFile(tmp_path / "whole.pth") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    pickled = contents["whole/data.pkl"]
    changed = [pickled[:place] + b"\xc5" + pickled[place + 1 :] for place in range(0, len(pickled), 5)]
    cut_off = [pickled[:length] for length in range(0, len(pickled), 9)]
    for content in changed + cut_off:
        with zipfile.ZipFile(broken, "w") as archive:
            for name, part in contents.items():
                archive.writestr(name, content if part is pickled else part)
        try:
            tensors.read_tensors(broken)
        except UserError as refusal:
            refused += 1
            assert str(refusal).startswith(f"{broken}: ") and "\n" not in str(refusal)
    assert refused >= len(cut_off)


def test_a_damaged_export_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights.write_export(tmp_path, fresh(), {})
    state = load_file(tmp_path / "student.safetensors")
    del state["vit.norm.bias"]
    save_file(state, tmp_path / "student.safetensors")
    with pytest.raises(UserError, match=r"student\.safetensors.*vit\.norm\.bias is missing"):
        weights.read(tmp_path)
    (tmp_path / "student.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        weights.read(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "model": {"widht": 3}}))
    with pytest.raises(UserError, match=r"163 tensors do not fit .*; and 158 more$") as refused:
        weights.read(tmp_path)
    assert len(str(refused.value)) < 500
    assert "unknown here: model.widht" in caplog.text


def test_the_verb_turns_official_into_ours_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, again = str(tmp_path / "ours"), str(tmp_path / "again.pth")
    assert export.main(["--weights", str(OFFICIAL), "--heads", str(HEADS), "--out", ours]) == 0
    assert export.main(["--weights", ours, "--out", again]) == 0
    assert "off by" in capsys.readouterr().out
    assert_equal(weights.read(Path(again), HEADS).teacher, weights.read(Path(ours)).teacher, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--weights"),
        (["--weights", str(OFFICIAL)], "--out"),
        (["--weights", "/nowhere/at/all", "--out", "x"], "/nowhere/at/all"),
        (["--weights", str(OFFICIAL.parent), "--out", "x"], "no weights here"),
        (["--weights", str(OFFICIAL), "--out", "/proc/nothing/here"], "--heads"),
    ],
)
def test_the_verb_refuses_in_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        export.main(arguments)


def test_an_export_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        weights.write_export(tmp_path / "file", fresh(), {})
    with pytest.raises(UserError, match="cannot be written"):
        weights.write_official(tmp_path / "file" / "x.pth", resizable(fresh()))


def test_an_official_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    """The disk is full: no file may be longer than 1 KiB."""
    path = tmp_path / "x.pth"
    path.write_text("old")
    program = (
        "import resource, signal, sys; from ccd_train.commands import export; from ccd_train.errors import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "run(lambda: export.main(sys.argv[1:]))"
    )
    options = ["--weights", str(OFFICIAL), "--heads", str(HEADS), "--out", str(path)]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_the_command_ends_with_code_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "ccd_train", "export", "--weights", "/nowhere", "--out", "x"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=OFFICIAL.parents[2])
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1


def saved(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path


def test_a_backbone_is_taken_from_whatever_holds_one(tmp_path: Path) -> None:
    """The teacher alone, other suffixes, wrapped names, our own names, an export, an exported ViT: the same tensors."""
    found = resizable(fresh())
    weights.write_official(tmp_path / "both.pth", found)
    both = torch.load(tmp_path / "both.pth")
    teacher = both["teacher"]
    vit = {name: value for name, value in teacher.items() if ".backbone." in name}
    weights.write_export(tmp_path / "export", found, {})
    weights.write_backbone(tmp_path / "vit.safetensors", found.backbone)
    compiled = {name.replace("module.", "_orig_mod.module."): value for name, value in teacher.items()}
    files = [
        (tmp_path / "both.pth", "official"), (saved(tmp_path / "teacher.pth", {"teacher": teacher}), "official"),
        (saved(tmp_path / "checkpoint.pth.tar", both), "official"), (saved(tmp_path / "no_suffix", both), "official"),
        (saved(tmp_path / "vit_only.bin", {"teacher": vit}), "official"),
        (saved(tmp_path / "compiled.pth", {"teacher": compiled}), "official"),
        (saved(tmp_path / "zero_to_fp32.bin", dict(found.teacher)), "ours"),
        (saved(tmp_path / "wrapped.pt", {f"module.{name}": value for name, value in found.teacher.items()}), "ours"),
        (tmp_path / "export", "ours"), (tmp_path / "export/teacher.safetensors", "ours"),
        (tmp_path / "vit.safetensors", "ours"),
    ]  # fmt: skip
    wanted = {name.removeprefix("vit."): value for name, value in found.teacher.items() if name.startswith("vit.")}
    for path, names in files:
        backbone = weights.read_backbone(path, NANO.heads)
        assert (backbone.width, backbone.depth, backbone.heads) == (NANO.width, NANO.depth, NANO.heads), path
        for name, value in backbone.state.items():
            if names == "ours" or name != "position_embedding":
                assert torch.equal(value, wanted[name]), (path, name)
        torch.testing.assert_close(
            backbone.state["position_embedding"], wanted["position_embedding"], atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    found = resizable(fresh())
    weights.write_official(tmp_path / "whole.pth", found)
    broken = torch.load(tmp_path / "whole.pth")
    broken["teacher"]["module.backbone.blocks.3.mlp.fc1.weight"][0, 0] = value
    path, refused = (
        saved(tmp_path / "broken.pth", broken),
        r"broken\.pth.*blocks\.3\.mlp\.0\.weight holds NaN or infinite",
    )
    for read in (weights.read, weights.read_backbone):
        with pytest.raises(UserError, match=refused):
            read(path)
    with pytest.raises(UserError, match=refused):
        export.main(["--weights", str(path), "--out", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"), (b"", "cut short"), (b"\x80\x02}q\x00.", "not a checkpoint of torch"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    for read in (weights.read, weights.read_backbone):
        with pytest.raises(UserError, match=said):
            read(path)


def test_a_foreign_checkpoint_names_a_few_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "foreign.pth", {f"layer{number}.weight": torch.zeros(1) for number in range(100)})
    with pytest.raises(UserError, match=r"layer4\.weight, and 95 more") as refused:
        weights.read_backbone(path)
    assert len(str(refused.value)) < 300
