"""A bundle that is not exactly what its manifest says is refused."""

import json
import os

import pytest
from tiny import edit_manifest, tiny_bundle

from forerun.errors import BundleError
from forerun.runtime.manifest import inside, load_manifest


@pytest.fixture
def folder(tmp_path):
    return tiny_bundle("llama", tmp_path)[1]


EDITS = {
    "unknown key": (lambda m: m.update(extra=1), "unknown key 'extra'"),
    "unknown nested key": (lambda m: m["kv"].update(colour="red"), "manifest.kv.*colour"),
    "missing key": (lambda m: m.pop("kv"), "lacks the key 'kv'"),
    "wrong type": (lambda m: m["kv"].update(heads="2"), "manifest.kv.heads must be int"),
    "bool is no int": (lambda m: m["kv"].update(heads=True), "must be int"),
    "wrong version": (lambda m: m.update(format_version=2), "format version 2"),
    "no version": (lambda m: m.pop("format_version"), "format version None"),
    "absurd size": (lambda m: m["kv"].update(capacity=1 << 40), "within reason"),
    "negative size": (lambda m: m["model"].update(vocab=-1), "positive"),
    "no lowering": (lambda m: m.update(lowerings={}), "no lowering"),
    "path outside": (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "leaves"),
    "absolute": (lambda m: m["tokenizer"].update(file="/etc/passwd"), "leaves the bundle"),
    "unlisted": (lambda m: m["tokenizer"].update(file="other.json"), "not listed"),
    "graph outside": (lambda m: m["lowerings"]["cpu"].update(graph="../m.onnx"), "leaves"),
}


@pytest.mark.parametrize("name", EDITS)
def test_bad_manifest(name, folder):
    change, message = EDITS[name]
    edit_manifest(folder, change)
    with pytest.raises(BundleError, match=message) as error:
        load_manifest(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100000, "\x00", '{"a": NaN}'])
def test_not_a_manifest(text, folder):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        load_manifest(folder)


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_file(name, damage, folder):
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(BundleError, match=name):
        load_manifest(folder).check_files(folder)


def test_hashes_are_not_computed_again(folder, monkeypatch):
    from forerun.runtime import manifest as module

    calls = []
    original = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda p: calls.append(p) or original(p))
    manifest = load_manifest(folder)
    manifest.check_files(folder)
    assert not calls, "the exporter's hashes are trusted while size and time stay"
    os.utime(folder / "weights.bin", (1, 1))
    manifest.check_files(folder)
    assert [p.name for p in calls] == ["weights.bin"]
    manifest.check_files(folder)
    assert len(calls) == 1
    manifest.check_files(folder, full=True)
    assert len(calls) == 1 + len(manifest.files)


def test_link_out_of_the_bundle(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="link"):
        inside(folder, "link")


def test_round_trip(folder):
    manifest = load_manifest(folder)
    assert json.loads(manifest.to_json()) == json.loads((folder / "manifest.json").read_text())
