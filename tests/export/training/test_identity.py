import json
from dataclasses import dataclass, replace

import pytest
from tiny import edit_manifest, tiny_bundle

from forerun.errors import BundleError, OptionError
from forerun.export.training import prompt_texts
from forerun.export.training.identity import (
    RECORD_NAME,
    check_work,
    record_work,
    work_identity,
)


@dataclass(frozen=True)
class Drawn:
    """Stands for `write.Sampling`, which needs torch."""

    new_tokens: int = 6
    temperature: float = 0.8


@pytest.fixture
def work(tmp_path, target_bundle):
    """A work folder with data for the tiny target."""
    work = tmp_path / "work"
    record_work(work, identity(target_bundle.folder))
    put(work, "data/index.jsonl")
    return work


def identity(bundle, head=None, seed=0, sampling=Drawn()):
    return work_identity(bundle, head, seed, sampling)


def put(work, name, text="[]\n"):
    (work / name).parent.mkdir(parents=True, exist_ok=True)
    (work / name).write_text(text)


@pytest.fixture
def other_bundle(tmp_path):
    """The same model as `target_bundle`, to be changed."""
    return tiny_bundle("llama", tmp_path / "other", capacity=512, context=512)[1]


def test_the_same_training_goes_on(work, target_bundle, other_bundle):
    check_work(work, identity(target_bundle.folder))
    check_work(work, identity(other_bundle))


def quantized(data):
    data["quantization"] = {"method": "int4", "bits": 4, "block": 32, "detail": "blocks of 32"}


def named(data):
    data["name"] = "another"


def trained_on(data):
    data["source"]["sha256"] = "f" * 64


def with_other_words(data):
    data["tokenizer"]["sha256"] = "e" * 64


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (quantized, r"weights fp32 of .* instead of int4 \(blocks of 32\)"),
        (named, "target tiny-llama instead of another"),
        (trained_on, "instead of fp32 of ffffffffffff"),
        (with_other_words, "tokenizer .* instead of eeeeeeeeeeee"),
    ],
)
def test_data_of_another_target_are_refused(work, other_bundle, change, told):
    edit_manifest(other_bundle, change)
    with pytest.raises(OptionError, match=told) as caught:
        check_work(work, identity(other_bundle))
    assert "--work" in str(caught.value)


def test_data_of_another_head_are_refused(work, target_bundle, other_bundle):
    edit_manifest(other_bundle, quantized)
    check_work(work, identity(target_bundle.folder, target_bundle.folder))
    with pytest.raises(OptionError, match=r"output head tiny-llama fp32 .* int4"):
        check_work(work, identity(target_bundle.folder, other_bundle))


def test_data_of_other_prompts_seeds_and_sampling_are_refused(work, target_bundle, monkeypatch):
    folder = target_bundle.folder
    with pytest.raises(OptionError, match="seed 0 instead of 7"):
        check_work(work, identity(folder, seed=7))
    sampling = replace(Drawn(), new_tokens=9)
    with pytest.raises(OptionError, match=r"new_tokens 6.* instead of new_tokens 9"):
        check_work(work, identity(folder, sampling=sampling))
    monkeypatch.setattr(prompt_texts, "NAMES", ["Zoe"])
    with pytest.raises(OptionError, match=r"prompts .* instead of"):
        check_work(work, identity(folder))


def test_another_chat_template_is_another_training(work, target_bundle, other_bundle):
    template = target_bundle.manifest.tokenizer.chat_template
    if template is None:
        edit_manifest(other_bundle, lambda d: d["tokenizer"].update(chat_template="chat.jinja"))
        (other_bundle / "chat.jinja").write_text("{{ messages[0]['content'] }}")
        edit_manifest(
            other_bundle,
            lambda d: d["files"].update({"chat.jinja": {"bytes": 0, "sha256": "0"}}),
        )
    else:
        (other_bundle / template).write_text("{{ messages[0]['content'] }}!")
    with pytest.raises(OptionError, match="chat template"):
        check_work(work, identity(other_bundle))


@pytest.mark.parametrize("left", ["data/index.jsonl", "vocab.i32", "head/checkpoint.pt"])
def test_what_nothing_tells_of_is_refused(left, tmp_path, target_bundle):
    put(tmp_path / "old", left)
    with pytest.raises(OptionError, match=rf"no {RECORD_NAME} tells .* remove that folder"):
        check_work(tmp_path / "old", identity(target_bundle.folder))


def test_a_folder_without_data_is_free(tmp_path, target_bundle):
    put(tmp_path / "empty", "data/index.jsonl", "")
    for name in ("empty", "absent"):
        check_work(tmp_path / name, identity(target_bundle.folder))


def test_a_damaged_record_is_told(work, target_bundle):
    for text in ("{", "3", json.dumps([1])):
        (work / RECORD_NAME).write_text(text)
        with pytest.raises(BundleError, match="damaged"):
            check_work(work, identity(target_bundle.folder))
