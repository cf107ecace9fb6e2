import dataclasses

import numpy as np
import pytest

from forerun.errors import SourceError, UnsupportedError
from forerun.export.sources import expected_shapes, open_source


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_and_folder_are_the_same_model(tmp_path, tiny, arch, tied):
    weights = tiny.weights(arch, tied)
    file = open_source(tiny.gguf(tmp_path / "m.gguf", arch, weights))
    folder = open_source(tiny.folder(tmp_path / "m", arch, weights))
    assert file.names() == folder.names() == set(weights)
    for name, wanted in weights.items():
        # Gemma's norms pass through 1 + w in float32.
        np.testing.assert_allclose(file.tensor(name), wanted, atol=2e-7, rtol=0)
        assert file.tensor(name).dtype == np.float32
        np.testing.assert_array_equal(folder.tensor(name), wanted)
    same = dataclasses.replace(file.config, licence="", norm_eps=1e-5)
    assert same == dataclasses.replace(folder.config, licence="")
    assert file.config.norm_eps == pytest.approx(1e-5)


def test_expected_shapes_are_those_of_the_weights(tmp_path, tiny):
    for arch in tiny.architectures:
        source = open_source(tiny.folder(tmp_path / arch, arch))
        wanted = {name: w.shape for name, w in tiny.weights(arch).items()}
        assert expected_shapes(source.config) == wanted


def test_gguf_settings(tmp_path, tiny):
    extra = {
        "llama.attention.sliding_window": 24,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.chat_template": "{{ x }}",
        "general.sampling.temp": 0.5,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    config = open_source(tiny.gguf(tmp_path / "m.gguf", extra=extra)).config
    assert (config.sliding_window, config.layer_window) == (24, (True, True))
    assert (config.bos, config.eos, config.add_bos) == (1, (2, 7), True)
    assert config.chat_template == "{{ x }}" and config.generation == {"temperature": 0.5}
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert config.licence == "apache-2.0" and config.tied


def test_gguf_rotary_factors_are_settings_not_weights(tmp_path, tiny):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    weights = tiny.weights("llama")
    source = open_source(
        tiny.gguf(tmp_path / "a", weights=weights | {"rope_freqs.weight": factors})
    )
    assert source.config.rope_scaling == {"rope_type": "factors", "factors": factors.tolist()}
    assert source.names() == set(weights)
    for bad in (factors[:4], -factors):
        with pytest.raises(UnsupportedError, match="rope_freqs"):
            open_source(tiny.gguf(tmp_path / "b", weights=weights | {"rope_freqs.weight": bad}))


def test_unknown_gguf_tensors_are_refused(tmp_path, tiny):
    weights = tiny.weights("llama") | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    with pytest.raises(SourceError, match="attn_sinks"):
        open_source(tiny.gguf(tmp_path / "m.gguf", weights=weights))


def test_tokenizer_metadata_is_handed_on_without_prefix(tmp_path, tiny):
    found = open_source(tiny.gguf(tmp_path / "m.gguf")).tokenizer_files()
    assert found.json_path is None
    assert found.gguf["model"] == "gpt2" and found.gguf["tokens"][:2] == ["<0>", "<1>"]
    assert found.gguf["token_type"] == [3] * 3 + [1] * 45 and found.gguf["bos_token_id"] == 1


def test_tokenizer_of_a_folder_is_its_file(tmp_path, tiny):
    folder = tiny.folder(tmp_path / "m")
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        open_source(folder).tokenizer_files()
    (folder / "tokenizer.json").write_text("{}")
    assert open_source(folder).tokenizer_files().json_path == folder / "tokenizer.json"


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.expert_count": 8},
        {"llama.rope.dimension_count": 8},
        {"llama.attention.causal": False},
        {"llama.final_logit_softcapping": 30.0},
    ],
)
def test_gguf_settings_no_row_knows_are_unsupported(tmp_path, tiny, extra):
    with pytest.raises(UnsupportedError):
        open_source(tiny.gguf(tmp_path / "m.gguf", extra=extra))


@pytest.mark.parametrize(
    "extra",
    [
        {"tokenizer.ggml.eot_token_id": 48},
        {"tokenizer.ggml.add_bos_token": "yes"},
        {"llama.attention.sliding_window": "wide"},
        {"llama.rope.scaling.type": "linear"},
        {"llama.rope.scaling.type": 4},
        {"tokenizer.chat_template": 3},
    ],
)
def test_malformed_gguf_settings_are_source_errors(tmp_path, tiny, extra):
    with pytest.raises(SourceError, match=r"m\.gguf"):
        open_source(tiny.gguf(tmp_path / "m.gguf", extra=extra))


def test_other_architectures_are_named(tmp_path, tiny):
    path = tiny.gguf(tmp_path / "m.gguf", "qwen3")
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"bloom"))
    with pytest.raises(UnsupportedError, match=r"'bloom'.*llama"):
        open_source(path)


def test_what_is_no_source(tmp_path, tiny):
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for path in ("text.txt", "empty", "missing.gguf"):
        with pytest.raises(SourceError, match=path.split(".")[0]):
            open_source(tmp_path / path)
    path = tiny.gguf(tmp_path / "empty" / "only.gguf")
    assert open_source(tmp_path / "empty").origin == "only.gguf"
    assert open_source(tmp_path / "empty", "given").origin == "given"
    path.rename(tmp_path / "blob")
    assert open_source(str(tmp_path / "blob")).config.layers == tiny.layers


def test_hash_is_that_of_the_file(tmp_path, tiny):
    import hashlib

    path = tiny.gguf(tmp_path / "m.gguf")
    assert open_source(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_tensor_is_read_at_a_time(tmp_path, tiny):
    import tracemalloc

    path = tiny.gguf(tmp_path / "m.gguf", tokens=[f"<token {i}>" for i in range(48)])
    source = open_source(path)
    tracemalloc.start()
    try:
        source.tensor("model.norm.weight")
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()
