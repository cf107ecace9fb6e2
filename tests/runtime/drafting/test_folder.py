"""Folders of drafters: read strictly, compared with the target, and found by name."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.errors import BundleError, OptionError, UnsupportedError, UserError
from forerun.runtime.drafting.combine import Speculative
from forerun.runtime.drafting.folder import (
    check_files,
    check_target,
    load_draft_model,
    load_info,
    read_vocab,
)
from forerun.runtime.drafting.registry import DRAFTERS, DrafterContext, open_drafter
from forerun.runtime.drafting.tree import TokenTree

SHA = "ab" * 32
IDS = np.array([5, 9, 2, 30], "<i4")


def entry(data):
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def describe(folder, kind="head", content=None, **changes):
    """Write a drafter's folder; `changes` replace top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"vocab.i32": IDS.tobytes(), **(content or {})}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    data = {
        "format_version": 1,
        "kind": kind,
        "name": "toy",
        "target": {
            "name": "fake",
            "tokenizer_sha256": SHA,
            "vocab": 64,
            "hidden": 4,
            "taps": [1, 2] if kind == "head" else [],
        },
        "vocab": {"file": "vocab.i32", "size": 4, "unknown": 4},
        "files": {name: entry(data) for name, data in files.items()},
        **changes,
    }
    (folder / "drafter.json").write_text(json.dumps(data))
    return data


def target(**changes):
    return replace(make_manifest(sha256=SHA), taps=(1, 2), **changes)


def test_a_good_folder_is_read(tmp_path):
    describe(tmp_path)
    info = load_info(tmp_path)
    check_files(info, tmp_path)
    check_target(info, target())
    vocab = read_vocab(info, tmp_path)
    assert vocab.to_target.tolist() == IDS.tolist()
    assert vocab.to_draft([9, 3, 30]) == [1, 4, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "format version 2, this forerun reads 1"),
        ({"kind": "tail"}, "head or model, got 'tail'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"vocab": {"file": "../v", "size": 4, "unknown": 4}}, "leaves the bundle"),
        ({"vocab": {"file": "/v", "size": 4, "unknown": 4}}, "leaves the bundle"),
        ({"vocab": {"file": "other", "size": 4, "unknown": 4}}, "not listed under files"),
        ({"vocab": {"file": "vocab.i32", "size": 5, "unknown": 4}}, "must have 20 bytes"),
        ({"vocab": {"file": "vocab.i32", "size": 0, "unknown": 0}}, "within reason"),
        ({"vocab": {"file": "vocab.i32", "size": 4}}, "lacks the key 'unknown'"),
        ({"files": {"../x": {"bytes": 1, "sha256": SHA}}}, "leaves the bundle"),
        ({"target": {"name": "x"}}, "lacks the key 'tokenizer_sha256'"),
        ({"training": {"minutes": "three"}}, "must be float"),
    ],
)
def test_what_is_wrong_in_it_is_named(tmp_path, changes, message):
    describe(tmp_path, **changes)
    with pytest.raises(BundleError, match=message):
        load_info(tmp_path)


def test_damaged_files_are_named(tmp_path):
    info = describe(tmp_path) and load_info(tmp_path)
    (tmp_path / "vocab.i32").write_bytes(IDS[::-1].tobytes())
    with pytest.raises(BundleError, match=r"vocab\.i32 has another SHA-256"):
        check_files(info, tmp_path)
    (tmp_path / "vocab.i32").write_bytes(b"12")
    with pytest.raises(BundleError, match="2 bytes instead of 16"):
        check_files(info, tmp_path)
    (tmp_path / "vocab.i32").unlink()
    with pytest.raises(BundleError, match="is missing"):
        check_files(info, tmp_path)
    with pytest.raises(BundleError, match="holds no drafter"):
        load_info(tmp_path / "nowhere")
    (tmp_path / "drafter.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        load_info(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    describe(tmp_path / "d")
    (tmp_path / "out").write_bytes(IDS.tobytes())
    (tmp_path / "d" / "vocab.i32").unlink()
    (tmp_path / "d" / "vocab.i32").symlink_to(tmp_path / "out")
    with pytest.raises(BundleError, match="through a link"):
        load_info(tmp_path / "d")


@pytest.mark.parametrize("ids", [[5, 9, 2, 64], [5, 9, 2, -1], [5, 9, 2, 5]])
def test_ids_outside_the_target_are_refused(tmp_path, ids):
    describe(tmp_path, content={"vocab.i32": np.array(ids, "<i4").tobytes()})
    with pytest.raises(BundleError, match="vocabulary holds"):
        read_vocab(load_info(tmp_path), tmp_path)


def test_another_target_is_named(tmp_path):
    describe(tmp_path)
    info, good = load_info(tmp_path), target()
    other = replace(good.tokenizer, sha256="cd" * 32)
    with pytest.raises(UnsupportedError, match="whose tokenizer is abababababab; fake has cdcd"):
        check_target(info, replace(good, tokenizer=other))
    with pytest.raises(UnsupportedError, match="whose vocabulary is 64; fake has 65"):
        check_target(info, replace(good, model=replace(good.model, vocab=65)))
    with pytest.raises(UnsupportedError, match="whose width is 4; fake has 8"):
        check_target(info, replace(good, model=replace(good.model, hidden=8)))
    with pytest.raises(UnsupportedError, match="layers 1, 2, this bundle of fake gives none"):
        check_target(info, replace(good, taps=()))


@given(st.data())
@settings(max_examples=150)
def test_any_damage_to_the_description_is_a_typed_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    text = json.dumps(describe(folder))
    at = data.draw(st.integers(0, len(text) - 1))
    junk = data.draw(st.text('0129[]{}",:.ae-', max_size=3))
    (folder / "drafter.json").write_text(text[:at] + junk + text[at + 1 :])
    try:
        info = load_info(folder)
        check_target(info, target())
        check_files(info, folder)
        read_vocab(info, folder)
    except UserError:
        pass


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("models"), capacity=64)


def context(bundle, **options):
    manifest, folder = bundle
    return DrafterContext(manifest, folder, threads=1, **options)


def install(bundle, tmp_path, kind):
    """The bundle's copy in a home of its own, with a draft model beside it."""
    manifest, folder = bundle
    (tmp_path / "int4").symlink_to(folder)
    (tmp_path / "drafters").mkdir()
    (tmp_path / "drafters" / kind).symlink_to(folder)
    return DrafterContext(manifest, tmp_path / "int4", threads=1)


@pytest.mark.parametrize("name", ["none", "ngram", "recycle", "ngram+recycle", "auto"])
def test_drafters_without_a_folder_open(bundle, name):
    drafter = open_drafter(name, context(bundle))
    drafter.begin([1, 2, 3, 1, 2], None)
    tree = drafter.propose(3)
    assert tree.tokens == (() if name in ("none", "recycle") else (3, 1, 2)) or len(tree)
    drafter.rewind(2)
    drafter.close()
    assert drafter.name == name
    assert name != "none" or tree is TokenTree.EMPTY


@pytest.mark.parametrize("name", ["model", "model+ngram"])
def test_a_draft_model_beside_the_bundle_is_found(bundle, tmp_path, name):
    drafter = open_drafter(name, install(bundle, tmp_path, "model"))
    assert isinstance(drafter, Speculative) == (name == "model+ngram")
    drafter.begin([1, 2, 3], None)
    assert len(drafter.propose(2)) == 2
    drafter.close()


def test_a_folder_can_be_given(bundle):
    drafter = open_drafter(str(bundle[1]), context(bundle))
    assert drafter.name == "model"
    drafter.close()
    with pytest.raises(OptionError, match="no drafter of the kind 'head'"):
        open_drafter("head", context(bundle, drafter_folder=bundle[1]))


def test_a_missing_drafter_is_told_with_what_is_there(bundle):
    for name in ("head", "model"):
        with pytest.raises(OptionError, match=rf"no {name} drafter for tiny-llama.*only none, n"):
            open_drafter(name, context(bundle))
    with pytest.raises(OptionError, match="drafter 'x' is not known; it can be none, ngram,"):
        open_drafter("x", context(bundle))
    with pytest.raises(OptionError, match="drafter '' is not known"):
        open_drafter("", context(bundle))


def test_a_draft_model_with_other_ids_is_refused(bundle, tmp_path):
    manifest, folder = bundle
    other = replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="00" * 32))
    with pytest.raises(UnsupportedError, match="the tokenizer of tiny-llama is"):
        load_draft_model(folder, other)
    with pytest.raises(UnsupportedError, match="the vocabulary of tiny-llama is 258"):
        load_draft_model(folder, replace(manifest, model=replace(manifest.model, vocab=300)))


def test_a_draft_model_with_a_map_of_ids(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path, capacity=64)
    made_for = make_manifest(vocab=500, sha256=SHA)
    ids = (np.arange(258) + 200).astype("<i4").tobytes()
    words = {
        "target": {"name": "fake", "tokenizer_sha256": SHA, "vocab": 500, "hidden": 4},
        "vocab": {"file": "vocab.i32", "size": 258, "unknown": 0},
    }
    describe(folder, "model", {"vocab.i32": ids}, **words)
    drafter = open_drafter(str(folder), DrafterContext(made_for, tmp_path, threads=1))
    drafter.begin([300, 301, 3], None)
    assert min(drafter.propose(3).tokens) >= 200
    drafter.close()
    words["vocab"]["unknown"] = 258
    describe(folder, "model", {"vocab.i32": ids}, **words)
    with pytest.raises(BundleError, match="needs 259 ids, the model has 258"):
        load_draft_model(folder, made_for)
    describe(folder, "head", {"vocab.i32": ids}, **words)
    with pytest.raises(BundleError, match="is of a head, yet there is a manifest"):
        load_draft_model(folder, made_for)


def test_the_table_tells_what_each_needs():
    assert all(row.name == name and row.summary for name, row in DRAFTERS.items())
    assert {name for name, row in DRAFTERS.items() if row.needs} == {
        "head", "model", "model+ngram"
    }  # fmt: skip


def test_the_device_is_passed_on(bundle):
    with pytest.raises(OptionError, match="warp"):
        open_drafter(str(bundle[1]), context(bundle, device="warp"))
