from pathlib import Path

import pytest

from forerun.devices.home import find_bundle, home, installed, model_folder
from forerun.errors import OptionError, UnknownModelError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path))
    return tmp_path


def install(name, variant="int4"):
    folder = model_folder(name, variant)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_home_follows_the_environment(place, monkeypatch):
    assert home() == place
    monkeypatch.setenv("FORERUN_HOME", "~/models here")
    assert home() == Path.home() / "models here"
    monkeypatch.delenv("FORERUN_HOME")
    assert home() == Path.home() / ".forerun"


def test_names_variants_and_paths(place):
    int4, fp32 = install("tiny"), install("tiny", "fp32")
    assert find_bundle("tiny") == find_bundle("tiny:int4") == int4 == place / "models/tiny/int4"
    assert find_bundle("tiny:fp32") == fp32
    assert find_bundle(str(fp32)) == find_bundle(fp32) == fp32
    assert installed() == ["tiny:fp32", "tiny:int4"]


def test_unknown_models_name_what_there_is(place):
    install("tiny")
    with pytest.raises(UnknownModelError, match=r"tiny:int8.*installed: tiny:int4.*smollm2-135m"):
        find_bundle("tiny:int8")
    with pytest.raises(UnknownModelError, match="gemma3-270m"):
        find_bundle("other")


def test_only_folders_with_a_manifest_count(place):
    (place / "models/tiny/int4").mkdir(parents=True)
    (place / "models/.partial-tiny-int4/int4").mkdir(parents=True)
    (place / "models/.partial-tiny-int4/int4/manifest.json").write_text("{}")
    assert installed() == []
    with pytest.raises(UnknownModelError, match="installed: nothing"):
        find_bundle("tiny")
    with pytest.raises(UnknownModelError, match=r"manifest\.json"):
        find_bundle(place / "models/tiny/int4")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/etc", "A b", "..", ".hidden", "x:y", "é"])
def test_names_cannot_be_paths(place, name):
    with pytest.raises(UnknownModelError):
        find_bundle(name)


def test_model_folder_checks_its_arguments(place):
    with pytest.raises(OptionError, match="int4, int4-fast, int4-exact, int8, int8-rows, fp32"):
        model_folder("tiny", "int3")
    for name in ("..", "a/b", "", ".partial"):
        with pytest.raises(UnknownModelError):
            model_folder(name)
