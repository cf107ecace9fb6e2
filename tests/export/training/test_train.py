import importlib.util
import json
import shlex
from dataclasses import replace

import pytest
from tiny import tiny_bundle

from forerun.apps.cli.main import main
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


def test_without_torch_the_command_looks_at_nothing_else(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    assert main(["train-drafter", "--kind", "tree", "--model", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'pip install "forerun[train]"' in said


def test_the_help_tells_what_is_needed(capsys):
    assert main(["train-drafter", "--help"]) == 0
    assert 'pip install "forerun[train]"' in capsys.readouterr().out


def test_an_unknown_kind_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "require_torch", lambda: None)
    with pytest.raises(OptionError, match="head or model"):
        train_drafter(TrainRequest("tree", tmp_path, tmp_path, tmp_path))
    with pytest.raises(OptionError, match="head or model"):
        command(kind="tree")


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """What the command asks for, with models that are pulled in name only."""
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path))
    for variant in ("int4", "int4-exact", "fp32"):
        folder = tmp_path / "models" / "some-model" / variant
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    asked = []
    monkeypatch.setattr(train, "require_torch", lambda: None)
    monkeypatch.setattr(
        train, "train_drafter", lambda request, progress: asked.append(request) or {}
    )
    return asked


@pytest.mark.parametrize(
    "words",
    [
        "--model some-model",
        "--kind model --model some-model:int4-exact --head-of some-model:fp32 "
        "--tokens 5000 --max-minutes 7.5 --seed 3",
    ],
)
def test_the_command_of_a_card_asks_for_the_same_training(words, requests):
    assert main(["train-drafter", *words.split()]) == 0
    command = shlex.split(requests[0].command)
    assert command[0] == "forerun"
    assert main(command[1:]) == 0
    assert requests[0] == requests[1]
    assert "--head-of some-model:fp32" in requests[0].command or "--head-of" not in words


def test_the_command_of_a_card_names_variants_and_no_places(requests, tmp_path, monkeypatch):
    main(["train-drafter", "--model", "some-model", "--work", str(tmp_path / "w")])
    assert requests[0].command == (
        "forerun train-drafter --kind head --model some-model:int4 "
        "--tokens 1000000 --max-minutes 240 --seed 0"
    )
    elsewhere = tmp_path / "a place" / "my bundle"
    elsewhere.mkdir(parents=True)
    (elsewhere / "manifest.json").write_text("{}")
    monkeypatch.chdir(elsewhere)
    main(["train-drafter", "--model", ".", "--out", str(tmp_path / "o")])
    assert "--model 'my bundle' " in requests[1].command
    assert str(tmp_path) not in requests[1].command


def test_forms_of_a_model_are_trained_for_in_folders_of_their_own(requests):
    for model in ("some-model:int4", "some-model:int4-exact"):
        main(["train-drafter", "--model", model])
    assert requests[0].work != requests[1].work


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


def test_a_folder_of_another_training_is_refused(small, target_bundle, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    request = TrainRequest("model", target_bundle.folder, out, work, tokens=1000, minutes=0.01)
    train_drafter(request)
    data = (work / "data" / "index.jsonl").read_bytes()
    with pytest.raises(OptionError, match="seed 0 instead of 1"):
        train_drafter(replace(request, seed=1))
    with pytest.raises(OptionError, match="seed 0 instead of 1"):
        train_drafter(replace(request, kind="head", tokens=9_000, seed=1))
    assert (work / "data" / "index.jsonl").read_bytes() == data


def test_a_head_of_other_sizes_is_refused(small, target_bundle, tmp_path):
    _, other = tiny_bundle("llama", tmp_path / "other", vocab=300)
    request = TrainRequest("head", target_bundle.folder, tmp_path / "o", tmp_path / "w", other)
    with pytest.raises(OptionError, match=r"300 ids.*--head-of"):
        train_drafter(request)
    assert not (tmp_path / "w").exists()
