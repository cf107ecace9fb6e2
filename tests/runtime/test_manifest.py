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


SKIPPING = {
    "first": 1,
    "stop": 3,
    "cosine": [0.9, 0.9, 0.9],
    "order": [2, 1],
    "levels": [{"ratio": 0.1, "tau": 0.9, "run": 1}, {"ratio": 0.3, "tau": 0.5, "run": 2}],
    "warmup": 4,
    "default": 0.1,
}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"first": -1}, "skipping has layers -1"),
        ({"first": 3}, "skipping has layers 3 to 3"),
        ({"stop": 4}, "skipping has layers 1 to 4"),
        ({"order": [1]}, "skipping.order"),
        ({"order": [1, 2, 2]}, "skipping.order"),
        ({"order": [1, 99]}, "skipping.order"),
        ({"cosine": [0.9, 0.9]}, "skipping.cosine"),
        ({"cosine": [0.9, 0.9, float("nan")]}, "skipping.cosine"),
        ({"cosine": [0.9, 0.9, 2]}, "skipping.cosine"),
        ({"levels": [{"ratio": 0.0, "tau": 0.9, "run": 1}]}, "skipping.levels"),
        ({"levels": [{"ratio": 1.5, "tau": 0.9, "run": 1}]}, "skipping.levels"),
        ({"levels": [{"ratio": 0.1, "tau": float("inf"), "run": 1}]}, "skipping.levels"),
        ({"levels": [{"ratio": 0.1, "tau": 0.9, "run": 0}]}, "skipping.levels"),
        ({"levels": SKIPPING["levels"][::-1]}, "skipping.levels"),
        ({"warmup": -1}, "skipping.warmup"),
        ({"default": 0.05}, "skipping.default"),
        ({"default": float("nan")}, "skipping.default"),
        ({"default": 0.1, "levels": []}, "skipping.default"),
    ],
)
def test_what_cannot_be_said_about_skipping(change, where, folder):
    edit_manifest(folder, lambda m: m.update(skipping=SKIPPING))
    assert load_manifest(folder).skipping.order == (2, 1)
    edit_manifest(folder, lambda m: m["skipping"].update(change))
    with pytest.raises(BundleError, match=where):
        load_manifest(folder)


HALF = [1.0, *[0.1] * 7]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"frequencies": []}, "rotary.frequencies"),
        ({"frequencies": [HALF] * 4}, "rotary.frequencies"),
        ({"frequencies": [HALF[:-1]]}, "rotary.frequencies"),
        ({"frequencies": [[float("nan"), *HALF[1:]]]}, "rotary.frequencies"),
        ({"frequencies": [[1e9, *HALF[1:]]]}, "rotary.frequencies"),
        ({"layers": [0, 0]}, "rotary.layers"),
        ({"layers": [0, 0, 1]}, "rotary.layers"),
        ({"layers": [0, 0, -1]}, "rotary.layers"),
    ],
)
def test_rotations_that_cannot_be(change, where, folder):
    edit_manifest(folder, lambda m: m["rotary"].update(change))
    with pytest.raises(BundleError, match=where):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"heads": 1 << 20}, "within reason"),
        ({"overhead": -1}, "within reason"),
        ({"buffer": -1}, "within reason"),
        ({"heads": 3}, r"kv_layouts.fp16 has other sizes than kv"),
        ({"capacity": 64}, r"kv_layouts.fp16 has other sizes than kv"),
        ({"rank": 17}, r"kv_layouts.fp16.rank"),
        ({"outliers": float("nan")}, r"kv_layouts.fp16.outliers"),
        ({"outliers": 0.9}, r"kv_layouts.fp16.outliers"),
        ({"dtype": "float8"}, "update forerun"),
        ({"kind": "gear-kivi", "bits": 4}, "in chunks of 0 tokens is unknown"),
        ({"kind": "gear-kivi", "bits": 4, "group": 64}, "a rank from 1"),
        ({"kind": "gear-other"}, "is unknown"),
    ],
)
def test_layouts_that_cannot_be(change, where, folder):
    def add(data):
        data["kv_layouts"] = {"fp16": data["kv"] | {"dtype": "float16", "bits": 16} | change}
        data["lowerings"]["cpu+fp16"] = data["lowerings"]["cpu"]

    edit_manifest(folder, add)
    with pytest.raises(BundleError, match=where):
        load_manifest(folder)


def test_a_layout_stands_in_a_manifest_once(folder):
    def add(data):
        data["kv_layouts"] = {"fp32": data["kv"]}
        data["lowerings"]["cpu+fp32"] = data["lowerings"]["cpu"]

    edit_manifest(folder, add)
    with pytest.raises(BundleError, match="'fp32' is there twice"):
        load_manifest(folder)


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
