"""Every architecture leaves the exporter checked; nothing wrong gets out."""

import numpy as np
import pytest
from tiny import CONFIGS, tiny_bundle, tiny_source

from forerun.errors import ExportMismatch, OptionError, SpaceError, UnsupportedError
from forerun.export import bundle as bundle_module
from forerun.export.arch import ARCHITECTURES, rotary_tables
from forerun.export.export import export_model
from forerun.export.reference import reference_logits
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner


def test_every_architecture_has_a_tiny_model():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", CONFIGS)
def test_export_equals_reference(arch, tmp_path):
    manifest, folder = tiny_bundle(arch, tmp_path)
    assert manifest.checks[0].value <= manifest.checks[0].bound
    assert load_manifest(folder) == manifest
    load_manifest(folder).check_files(folder, full=True)
    source = tiny_source(arch, tmp_path / "again")
    ids = np.arange(40) % 200
    runner = Runner(manifest, folder, threads=1)
    logits = runner.step(ids, want="all")
    expected = reference_logits(source, ARCHITECTURES[arch], ids)
    np.testing.assert_allclose(logits, expected, atol=2e-4 * expected.std() + 1e-5)


def test_window_matters_to_the_test_model(tmp_path):
    source = tiny_source("mistral", tmp_path)
    ids = np.arange(40)
    with_window = reference_logits(source, ARCHITECTURES["mistral"], ids)
    source.config = type(source.config)(**{**vars(source.config), "sliding_window": None})
    without = reference_logits(source, ARCHITECTURES["mistral"], ids)
    assert np.abs(with_window - without).max() > 0.1


def test_mismatch_is_found_and_nothing_is_written(tmp_path):
    source = tiny_source("llama", tmp_path / "source")
    original, calls = source.tensor, []

    def lying(name):
        """The reference reads each tensor after the exporter did: give it another one."""
        calls.append(name)
        tensor = original(name)
        second = calls.count(name) == 2 and name.endswith("layers.1.mlp.down_proj.weight")
        return tensor * 1.1 if second else tensor

    source.tensor = lying
    with pytest.raises(ExportMismatch) as error:
        export_model(source, tmp_path / "out", name="x", capacity=64)
    assert error.value.tensor == "logits" and error.value.error > error.value.bound
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_unknown_tensor_is_refused(tmp_path):
    source = tiny_source("llama", tmp_path / "source")
    source.tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    with pytest.raises(UnsupportedError, match="q_norm"):
        export_model(source, tmp_path / "out", name="x", capacity=64)


@pytest.mark.parametrize("capacity", [0, -1, 15, 257, 10**9])
def test_capacity_out_of_range(capacity, tmp_path):
    with pytest.raises(OptionError, match=r"16\.\.256"):
        export_model(
            tiny_source("llama", tmp_path / "source"), tmp_path / "o", name="x", capacity=capacity
        )


def test_unknown_architecture(tmp_path):
    source = tiny_source("llama", tmp_path / "source")
    source.config = type(source.config)(**{**vars(source.config), "architecture": "mamba"})
    with pytest.raises(UnsupportedError, match="llama, mistral, qwen2"):
        export_model(source, tmp_path / "o", name="x")


def test_no_overwriting_of_other_folders(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(OptionError, match="not a bundle"):
        export_model(tiny_source("llama", tmp_path / "source"), tmp_path / "out", name="x")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bundle_module.shutil, "disk_usage", lambda p: type("U", (), {"free": 1000})()
    )
    with pytest.raises(SpaceError, match="MiB"):
        export_model(tiny_source("llama", tmp_path / "source"), tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()


def test_disk_full_while_writing(tmp_path, monkeypatch):
    import errno

    from forerun.export.writer import GraphWriter

    def full(self, name, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GraphWriter, "constant", full)
    with pytest.raises(SpaceError, match="full"):
        export_model(tiny_source("llama", tmp_path / "source"), tmp_path / "out", name="x")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_hidden_states(tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path, hidden_states=True)
    runner = Runner(manifest, folder, threads=1)
    logits = runner.step([1, 2, 3], want=[1, 2])
    assert logits.shape == (2, 258) and runner.hidden().shape == (2, 64)
    source = tiny_source("llama", tmp_path / "again")
    table = source.tensor("model.embed_tokens.weight")
    np.testing.assert_allclose(runner.hidden() @ table.T, logits, atol=1e-4)


def test_rope_scalings():
    config = CONFIGS["llama"]
    plain, _ = rotary_tables(config, 64, False)

    def scaled(**scaling):
        changed = type(config)(**{**vars(config), "rope_scaling": scaling})
        return rotary_tables(changed, 64, False)[0]

    np.testing.assert_allclose(scaled(rope_type="linear", factor=2.0)[::2], plain[:32], atol=1e-6)
    llama3 = scaled(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    np.testing.assert_allclose(llama3[:, 0], plain[:, 0], atol=1e-6)
    assert np.abs(llama3[:, -1] - plain[:, -1]).max() < 1e-3
    assert not np.allclose(llama3[:, 2], plain[:, 2], atol=1e-2)
    with pytest.raises(UnsupportedError, match="yarn"):
        scaled(rope_type="yarn")
    with pytest.raises(UnsupportedError, match="factor"):
        scaled(rope_type="linear")
