"""Packaged drafters are copied beside their model, whole or not at all; a user's own are kept."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import forerun
from forerun.export import drafters
from forerun.export.drafters import (
    MARK_NAME,
    install_drafters,
    missing_drafters,
    packaged_drafters,
)
from forerun.runtime.drafting.folder import DRAFTER_NAME, check_files, load_info
from forerun.runtime.manifest import load_manifest

REPOSITORY = Path(forerun.__file__).resolve().parent


def _packaged(root, text="a"):
    folder = root / "toy" / "head"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DRAFTER_NAME).write_text(json.dumps({"mark": text}))
    (folder / "step.onnx").write_text(text)
    return root


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models" / "toy" / "drafters" / "head"


@pytest.fixture
def installed(target, tmp_path):
    """Where version "a" is installed; ``packaged`` has version "b" now."""
    assert install_drafters("toy", _packaged(tmp_path / "packaged")) == [target]
    _packaged(tmp_path / "packaged", "b")
    return target


def step(folder):
    return (folder / "step.onnx").read_text()


def test_install_and_replace(target, tmp_path):
    root = _packaged(tmp_path / "packaged")
    (root / "toy" / "head" / ".verified.json").touch()
    assert install_drafters("other", root) == []
    assert list(missing_drafters("toy", root)) == [target] and not target.exists()
    assert install_drafters("toy", root) == [target]
    assert sorted(path.name for path in target.iterdir()) == [MARK_NAME, DRAFTER_NAME, "step.onnx"]
    (target / "kept").touch()
    assert install_drafters("toy", root) == []
    assert (target / "kept").exists(), "an installed drafter is left alone"
    assert install_drafters("toy", _packaged(root, "b")) == [target]
    assert step(target) == "b"
    assert [p.name for p in target.parent.iterdir()] == ["head"]


def test_a_damaged_file_is_put_right(installed, tmp_path):
    install_drafters("toy", tmp_path / "packaged")
    (installed / "step.onnx").write_text("x")
    install_drafters("toy", tmp_path / "packaged")
    assert step(installed) == "b"
    (installed / "step.onnx").unlink()
    install_drafters("toy", tmp_path / "packaged")
    assert step(installed) == "b"


def trained_anew(folder):
    """What train-drafter leaves: a folder of its own in the place of the other."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / DRAFTER_NAME).write_text("my own")


def card_edited(folder):
    (folder / DRAFTER_NAME).write_text("my own")


def linked(folder):
    (folder.parent / "elsewhere").mkdir()
    shutil.move(folder, folder.parent / "elsewhere" / "head")
    folder.symlink_to(folder.parent / "elsewhere" / "head")


@pytest.mark.parametrize("change", [trained_anew, card_edited, linked])
def test_what_is_the_users_is_kept(change, installed, tmp_path):
    change(installed)
    before = (installed / DRAFTER_NAME).read_text()
    assert missing_drafters("toy", tmp_path / "packaged") == {}
    assert install_drafters("toy", tmp_path / "packaged") == []
    assert (installed / DRAFTER_NAME).read_text() == before


def test_one_that_was_installed_before_there_were_marks_is_replaced(
    installed, tmp_path, monkeypatch
):
    (installed / MARK_NAME).unlink()
    assert install_drafters("toy", tmp_path / "packaged") == []
    card = (installed / DRAFTER_NAME).read_bytes()
    monkeypatch.setattr(drafters, "_UNMARKED", {hashlib.sha256(card).hexdigest()})
    assert install_drafters("toy", tmp_path / "packaged") == [installed]
    assert step(installed) == "b"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_copy_leaves_the_old_one(error, installed, tmp_path, monkeypatch):
    def broken(source, out):
        Path(out).write_text("half")
        raise error

    monkeypatch.setattr(drafters.shutil, "copyfile", broken)
    with pytest.raises(error):
        install_drafters("toy", tmp_path / "packaged")
    assert step(installed) == "a" and [p.name for p in installed.parent.iterdir()] == ["head"]
    monkeypatch.undo()


def test_a_folder_without_a_card_is_no_drafter(tmp_path):
    (tmp_path / "toy" / "head").mkdir(parents=True)
    assert packaged_drafters("toy", tmp_path) == {}


def test_every_packaged_file_is_what_its_card_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path))
    folders = install_drafters("smollm2-135m")
    assert sorted(folder.name for folder in folders) == ["head", "model"]
    for folder in folders:
        info = load_info(folder)
        check_files(info, folder)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert names == {*info.files, DRAFTER_NAME, MARK_NAME} and info.kind == folder.name
    load_manifest(tmp_path / "models/smollm2-135m/drafters/model").check_files(folder, full=True)


def test_no_checkout_changes_the_ends_of_lines():
    rules = (REPOSITORY / ".gitattributes").read_text("utf-8").splitlines()
    assert "export/trained/** -text" in rules
    assert next(iter(packaged_drafters("smollm2-135m").values())).is_relative_to(
        REPOSITORY / "export" / "trained"
    )
