"""Packaged drafters are copied beside their model, whole or not at all."""

import json

from forerun.export.drafters import install_drafters, packaged_drafters


def _packaged(root, text="a"):
    folder = root / "toy" / "head"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "drafter.json").write_text(json.dumps({"mark": text}))
    (folder / "step.onnx").write_text(text)
    return root


def test_install_and_replace(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))
    root = _packaged(tmp_path / "packaged")
    assert install_drafters("other", root) == []
    (target,) = install_drafters("toy", root)
    assert target == tmp_path / "home" / "models" / "toy" / "drafters" / "head"
    assert (target / "step.onnx").read_text() == "a"
    (target / "kept").touch()
    install_drafters("toy", root)
    assert (target / "kept").exists(), "an installed drafter is left alone"
    install_drafters("toy", _packaged(root, "b"))
    assert (target / "step.onnx").read_text() == "b"
    assert [p.name for p in target.parent.iterdir()] == ["head"]


def test_a_folder_without_a_card_is_no_drafter(tmp_path):
    (tmp_path / "toy" / "head").mkdir(parents=True)
    assert packaged_drafters("toy", tmp_path) == {}
