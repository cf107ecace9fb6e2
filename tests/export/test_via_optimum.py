import importlib.util

import pytest

from forerun.errors import UnsupportedError
from forerun.export import via_optimum


@pytest.mark.parametrize("missing", ["optimum", "torch", "transformers"])
def test_a_missing_extra_is_named_and_nothing_written(tmp_path, monkeypatch, missing):
    def find(name):
        return None if name.partition(".")[0] == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(UnsupportedError, match=rf"{missing}.*forerun\[optimum\]"):
        via_optimum.export_via_optimum(tmp_path / "model", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_parent_package_that_is_missing_is_no_crash(tmp_path, monkeypatch):
    def find(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(UnsupportedError):
        via_optimum.export_via_optimum(tmp_path / "model", tmp_path / "out")


def test_what_is_given_up_is_in_the_card():
    found = {
        "source": "x", "model_type": "gpt2", "task": via_optimum.TASK, "max_abs_error": 1e-5,
        "bound": 1e-3, "given_up": list(via_optimum.GIVEN_UP),
    }  # fmt: skip
    card = via_optimum._card("name", found)
    assert all(sentence in card for sentence in via_optimum.GIVEN_UP)
    assert "ORTModelForCausalLM" in card
