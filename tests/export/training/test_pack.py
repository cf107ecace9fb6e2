import numpy as np
import pytest
from tiny import tiny_bundle

from forerun.errors import OptionError, UnsupportedError
from forerun.export.training.pack import DrafterFacts, write_drafter_files
from forerun.export.training.place import drafter_folder
from forerun.runtime.drafting.folder import check_files, check_target, load_info, read_vocab
from forerun.runtime.manifest import Check, Lowering, TensorSpec

SCORES = {
    "1": 0.5,
    "2": 0.4,
    "tokens_per_round": 1.7,
    "by_category": {"story": {"1": 0.6, "tokens_per_round": 1.9}},
}
FORM = Lowering(
    "step.onnx",
    {"ids": TensorSpec("ids", "int64", ("R", 2))},
    {"logits": TensorSpec("logits", "float32", ("R", 3))},
)


@pytest.fixture
def folder(tmp_path):
    manifest, _ = tiny_bundle("llama", tmp_path / "target")
    out = tmp_path / "drafter"
    with drafter_folder(out) as place:
        (place / "step.onnx").write_bytes(b"graph")
        facts = DrafterFacts(
            "head",
            "tiny-head",
            manifest,
            64,
            (1, 2),
            {"step": FORM},
            SCORES,
            {"minutes": 2.0, "answer_tokens": 288482},
            (Check("torch", "error", 0.01, 0.1),),
            "forerun train-drafter",
        )
        write_drafter_files(place, facts, np.array([2, 5, 9]))
    return manifest, out


def test_the_runtime_reads_what_was_written(folder):
    manifest, out = folder
    info = load_info(out)
    check_files(info, out)
    # The taps of a tiny bundle are what its exporter chose.
    check_target(info, manifest)
    vocab = read_vocab(info, out)
    assert list(vocab.to_target) == [2, 5, 9]
    assert vocab.to_draft([5, 6]) == [1, 3]
    assert info.graphs["step"] == FORM
    assert info.training == {
        "minutes": 2.0,
        "answer_tokens": 288482,
        "acceptance_1": 0.5,
        "acceptance_2": 0.4,
        "tokens_per_round": 1.7,
        "acceptance_1_story": 0.6,
    }


def test_a_drafter_of_another_model_is_refused(folder, tmp_path):
    _, out = folder
    other, _ = tiny_bundle("llama", tmp_path / "other", vocab=300)
    with pytest.raises(UnsupportedError):
        check_target(load_info(out), other)


def test_the_card_tells_where_it_is_from(folder):
    card = (folder[1] / "README.md").read_text()
    for text in ("tiny-llama", "| 2 | 0.400 |", "| story | 0.600 | 1.90 |", "train-drafter"):
        assert text in card
    for text in ("tiny-llama, fp32", "answer tokens: 288,482", 'pip install "forerun[train]"'):
        assert text in card


def test_only_drafters_are_replaced(folder, tmp_path):
    _, out = folder
    with drafter_folder(out) as place:
        (place / "drafter.json").write_text("{}")
    assert [p.name for p in out.iterdir()] == ["drafter.json"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    with pytest.raises(OptionError, match="not a drafter"), drafter_folder(tmp_path / "photos"):
        pass


def test_a_failure_leaves_the_old_one(folder):
    _, out = folder
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(RuntimeError), drafter_folder(out):
        raise RuntimeError
    assert sorted(p.name for p in out.iterdir()) == before
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".drafter")]
