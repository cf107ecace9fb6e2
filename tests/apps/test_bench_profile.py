import json

import pytest
from tiny import tiny_bundle

from forerun.apps.bench.profile import run_profile
from forerun.apps.cli.main import main
from forerun.errors import ContextLimitError


def test_every_node_of_a_step_is_counted(tmp_path, capsys):
    _, folder = tiny_bundle("llama", tmp_path, capacity=64)
    result = run_profile(str(folder), [0, 20], 1, tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text()) == result
    nodes = {row["operator"]: row["nodes"] for row in result["rows"]}
    assert nodes["GroupQueryAttention"] == 3, "one a layer, whatever the prefill added"
    assert nodes["Gather"] == 3, "the embedding, and the wanted rows of two tensors"
    assert all(set(row["us"]) == {"0", "20"} for row in result["rows"])
    assert "GroupQueryAttention (3)" in capsys.readouterr().out


def test_command(tmp_path, capsys):
    _, folder = tiny_bundle("llama", tmp_path, capacity=64)
    assert main(["bench", "profile", "--model", str(folder), "--depths", "0,8"]) == 0
    assert "depth 8" in capsys.readouterr().out
    assert main(["bench", "profile", "--model", str(folder), "--depths", "x"]) == 2


def test_too_deep(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path, capacity=64)
    with pytest.raises(ContextLimitError, match="64"):
        run_profile(str(folder), [64], 1)
