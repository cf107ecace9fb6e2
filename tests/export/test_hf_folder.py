import json

import numpy as np
import pytest

from forerun.errors import SourceError, UnsupportedError
from forerun.export.sources import open_source


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("files", [1, 3])
def test_weights_are_read_as_stored(tmp_path, tiny, arch, files):
    weights = tiny.weights(arch)
    source = open_source(tiny.folder(tmp_path / "m", arch, weights, files))
    assert source.config.architecture == arch and source.names() == set(weights)
    for name, wanted in weights.items():
        np.testing.assert_array_equal(source.tensor(name), wanted)


def config_of(folder):
    return open_source(folder).config


def test_window_settings(tmp_path, tiny):
    def windows(arch, **config):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        found = config_of(tiny.folder(folder, arch, config=config))
        return found.layer_window, found.sliding_window

    assert windows("mistral") == ((True, True), 24)
    assert windows("mistral", sliding_window=None) == ((False, False), None)
    assert windows("qwen2", sliding_window=9) == ((False, False), None)
    kept = {"use_sliding_window": True, "sliding_window": 9}
    assert windows("qwen2", **kept, max_window_layers=1) == ((False, True), 9)
    assert windows("gemma3") == ((True, True), 24)
    assert windows("gemma3", sliding_window_pattern=2) == ((True, False), 24)
    kinds = ["full_attention", "sliding_attention"]
    assert windows("gemma3", layer_types=kinds) == ((False, True), 24)


def test_rotary_settings_of_both_generations_of_transformers(tmp_path, tiny):
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = config_of(tiny.folder(tmp_path / "old", config={"rope_scaling": llama3}))
    new = {"rope_theta": None, "rope_parameters": {"rope_theta": 7000.0, **llama3}}
    new = config_of(tiny.folder(tmp_path / "new", config=new))
    assert old.rope_scaling == new.rope_scaling == llama3
    assert (old.rope_theta, new.rope_theta) == (5000.0, 7000.0)
    plain = {"rope_scaling": {"rope_type": "default"}}
    assert config_of(tiny.folder(tmp_path / "plain", config=plain)).rope_scaling is None


def test_gemma_has_two_bases_and_its_own_scale(tmp_path, tiny):
    config = {"rope_theta": 1e6, "query_pre_attn_scalar": 256}
    old = config_of(tiny.folder(tmp_path / "old", "gemma3", config=config))
    both = {
        "rope_theta": None,
        "rope_local_base_freq": None,
        "query_pre_attn_scalar": 256,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    assert config_of(tiny.folder(tmp_path / "new", "gemma3", config=both)) == old
    assert (old.rope_theta, old.rope_theta_local, old.query_scale) == (1e6, 1e4, 1 / 16)
    assert old.activation == "gelu_tanh"


def test_tokens_template_sampling_and_licence(tmp_path, tiny):
    folder = tiny.folder(tmp_path / "m", config={"eos_token_id": 2})
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\n# Model\n")
    generation = {"eos_token_id": [7, 2], "do_sample": True, "temperature": 0.6, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    tokenizer = {"add_bos_token": True, "chat_template": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = config_of(folder)
    assert (config.bos, config.eos, config.add_bos) == (1, (7, 2), True)
    assert config.generation == {"temperature": 0.6, "top_k": 20.0}
    assert (config.chat_template, config.licence) == ("D", "mit")
    (folder / "chat_template.jinja").write_text("J")
    (folder / "generation_config.json").write_text(json.dumps(generation | {"do_sample": False}))
    assert config_of(folder).chat_template == "J" and config_of(folder).generation == {}


@pytest.mark.parametrize(
    ("first", "adds"), [({"SpecialToken": {"id": "<s>"}}, True), ({"Sequence": {"id": "A"}}, False)]
)
def test_begin_token_follows_the_tokenizer_if_nothing_is_stated(tmp_path, tiny, first, adds):
    folder = tiny.folder(tmp_path / "m")
    after = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"single": [first]}]}
    (folder / "tokenizer.json").write_text(json.dumps({"post_processor": after}))
    assert config_of(folder).add_bos is adds


def test_hash_follows_weights_and_settings(tmp_path, tiny):
    folder = tiny.folder(tmp_path / "a", files=2)
    first = open_source(folder).sha256
    assert len(first) == 64 and open_source(folder).sha256 == first
    assert open_source(tiny.folder(tmp_path / "b", config={"rope_theta": 1.0})).sha256 != first


def test_tied_head_and_old_buffers_are_left_out(tmp_path, tiny):
    weights = tiny.weights("llama", tied=False)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = tiny.folder(tmp_path / "m", weights=weights, config={"tie_word_embeddings": True})
    assert open_source(folder).names() == set(tiny.weights("llama"))
    untied = tiny.folder(tmp_path / "u", weights=weights)
    assert "lm_head.weight" in open_source(untied).names()


UNSUPPORTED = {
    "architecture": {"model_type": "mamba"},
    "multimodal": {"text_config": {"a": 1}},
    "quantized": {"quantization_config": {"quant_method": "gptq"}},
    "softcap": {"attn_logit_softcapping": 50.0},
    "activation": {"hidden_act": "relu"},
    "mlp bias": {"mlp_bias": True},
    "partial rotary": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
MALFORMED = {
    "size is text": {"hidden_size": "64"},
    "size is float": {"hidden_size": 64.0},
    "size is bool": {"num_key_value_heads": True},
    "size is missing": {"intermediate_size": None},
    "zero": {"vocab_size": 0},
    "negative": {"num_hidden_layers": -1},
    "huge": {"num_hidden_layers": 1 << 40},
    "no heads": {"num_attention_heads": 0},
    "heads do not divide": {"num_key_value_heads": 3},
    "odd head": {"head_dim": 15},
    "another shape": {"intermediate_size": 128},
    "another vocabulary": {"vocab_size": 49},
    "end outside the vocabulary": {"eos_token_id": 48},
    "end is text": {"eos_token_id": "x"},
    "theta": {"rope_theta": -1.0},
    "theta is not finite": {"rope_theta": float("inf")},
    "epsilon": {"rms_norm_eps": 0.0},
    "scaling is text": {"rope_scaling": "linear"},
    "scaling factor": {"rope_scaling": {"type": "linear", "factor": "2"}},
    "scaling is zero": {"rope_scaling": {"type": "linear", "factor": 0}},
    "bias without tensors": {"attention_bias": True},
    "head without tensor": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_no_row_knows_is_unsupported(tmp_path, tiny, case):
    with pytest.raises(UnsupportedError):
        open_source(tiny.folder(tmp_path / "m", config=UNSUPPORTED[case]))


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_settings_are_source_errors(tmp_path, tiny, case):
    with pytest.raises(SourceError) as caught:
        open_source(tiny.folder(tmp_path / "m", config=MALFORMED[case]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "[" * 50_000])
def test_config_that_is_no_object(tmp_path, tiny, text):
    folder = tiny.folder(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        open_source(folder)


@pytest.mark.parametrize(
    "file", ["../m/model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 3, ""]
)
def test_index_may_not_leave_the_folder(tmp_path, tiny, file):
    folder = tiny.folder(tmp_path / "m", files=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(SourceError, match="folder"):
        open_source(folder)


def test_index_and_files_must_agree(tmp_path, tiny):
    folder = tiny.folder(tmp_path / "m", files=2)
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    table = good["weight_map"]
    other = {v: k for k, v in table.items()}
    swapped = table | {
        "model.norm.weight": next(f for f in other if f != table["model.norm.weight"])
    }
    less = {k: v for k, v in table.items() if k != "model.norm.weight"}
    for bad in (swapped, less, table | {"extra": next(iter(other))}, {}, [1]):
        path.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(SourceError):
            open_source(folder)
    path.write_text(json.dumps(good))
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(folder)


def test_tensors_nobody_would_use_are_refused(tmp_path, tiny):
    weights = tiny.weights("llama") | {"model.layers.0.extra.weight": np.ones(3, np.float32)}
    with pytest.raises(SourceError, match="extra"):
        open_source(tiny.folder(tmp_path / "m", weights=weights))
    weights = tiny.weights("llama")
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(SourceError, match="up_proj"):
        open_source(tiny.folder(tmp_path / "n", weights=weights))


def test_pickles_are_not_read(tmp_path, tiny):
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        open_source(folder)
