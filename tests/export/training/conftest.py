"""Made-up training data, and a tiny target."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_bundle

sys.path.insert(0, str(Path(__file__).parent))

from training_data import fill_store


@pytest.fixture
def store(tmp_path):
    return fill_store(tmp_path / "data")


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def target_bundle(tmp_path_factory):
    """A tiny llama bundle with room for prompts of bytes."""
    folder = tmp_path_factory.mktemp("target")
    manifest, bundle = tiny_bundle("llama", folder, capacity=512, context=512)
    return SimpleNamespace(manifest=manifest, folder=bundle)
