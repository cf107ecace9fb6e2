import importlib.util
import json

import pytest

from forerun.apps.cli.train_drafter import train_drafter as command
from forerun.errors import OptionError, UnsupportedError
from forerun.export.training import prompts, train
from forerun.export.training.train import TrainRequest, require_torch, train_drafter
from forerun.runtime.drafting.folder import check_files, load_info


def test_without_torch_one_line_says_so(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    with pytest.raises(UnsupportedError, match=r"forerun\[train\]"):
        require_torch()


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(OptionError, match="head or model"):
        train_drafter(TrainRequest("tree", tmp_path, tmp_path, tmp_path))
    with pytest.raises(OptionError, match="head or model"):
        command(kind="tree")


@pytest.fixture
def small(monkeypatch):
    pytest.importorskip("torch")
    from forerun.export.training import write

    monkeypatch.setattr(prompts, "_HELD_OUT_PER_TEMPLATE", 1)
    sampling = write.Sampling(new_tokens=6)
    monkeypatch.setattr(write, "Sampling", lambda: sampling)
    for name, value in (("_VOCAB", 64), ("_DATA_SHARE", 1e6), ("_LEAST_MINUTES", 0.01)):
        monkeypatch.setattr(train, name, value)


def test_no_time_for_data_is_told(small, target_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_DATA_SHARE", 0.0)
    request = TrainRequest("head", target_bundle.folder, tmp_path / "o", tmp_path / "w")
    with pytest.raises(OptionError, match="max-minutes"):
        train_drafter(request)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_the_command_leaves_a_drafter(kind, small, target_bundle, tmp_path, capsys):
    stages = []
    out = tmp_path / "out"
    command(
        kind=kind,
        model=str(target_bundle.folder),
        out=out,
        work=tmp_path / "work",
        max_minutes=0.01,
        tokens=1000,
        as_json=True,
    )
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(out) and set(said["acceptance"]) >= {"1", "2", "3"}
    info = load_info(out)
    check_files(info, out)
    assert info.kind == kind and info.vocab.size == 64
    assert info.training["steps"] >= 1
    assert (tmp_path / "work" / f"{kind}.log").read_text().count("acceptance") >= 1
    request = TrainRequest(
        kind, target_bundle.folder, out, tmp_path / "work", tokens=1000, minutes=0.01
    )
    train_drafter(request, lambda stage, done, total: stages.append(stage))
    again = load_info(out)
    assert again.training["steps"] > info.training["steps"]
    assert again.training["answer_tokens"] == info.training["answer_tokens"]
    assert set(stages) == {"train"}
