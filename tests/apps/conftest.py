"""A model so small that a test can make it, and ways to run the command line on it.

The model says the alphabet: after ``a`` comes ``b``, after ``z`` comes ``a`` again, after digits
come digits, after anything else comes ``a``. Its bundle is made by ``forerun export``, so these
tests run the real exporter and the real runtime.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from forerun.apps.cli.main import main

HIDDEN, HEADS, FFN, CONTEXT = 64, 2, 64, 512
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMAND = [sys.executable, "-m", "forerun.apps.cli.main"]


def byte_tokenizer():
    """One token per byte, in byte order, and two special ones."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    shown = [b for b in range(256) if chr(b) in alphabet and chr(b) != "\u00ad"]
    hidden = [b for b in range(256) if b not in shown]
    names = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    assert set(names.values()) == set(alphabet)
    tokenizer = Tokenizer(models.BPE({names[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def following(token):
    """The token that the model wants after `token`."""
    for first, last in ("az", "AZ", "09"):
        if ord(first) <= token <= ord(last):
            return ord(first) if token == ord(last) else token + 1
    return ord("a")


def tiny_weights(layers=1):
    """Layers that add nothing, and a head that finds the embedding of the token before."""
    rng = np.random.default_rng(7)
    vocab = 258
    embedding = rng.standard_normal((vocab, HIDDEN)).astype(np.float32)
    head = np.zeros_like(embedding)
    alphanumeric = [t for t in range(128) if chr(t).isalnum()]
    # All other tokens look alike to the model, and share one direction of their own.
    others = [t for t in range(vocab) if t not in alphanumeric]
    embedding[:, 0], embedding[others] = 0, np.eye(1, HIDDEN) * 8
    for token in alphanumeric:
        head[following(token)] += embedding[token]
    head[ord("a"), 0] = 8
    layer = {
        "self_attn.q_proj": rng.standard_normal((HIDDEN, HIDDEN)) * 0.05,
        "self_attn.k_proj": rng.standard_normal((HIDDEN, HIDDEN)) * 0.05,
        "self_attn.v_proj": rng.standard_normal((HIDDEN, HIDDEN)) * 0.05,
        "self_attn.o_proj": np.zeros((HIDDEN, HIDDEN)),
        "mlp.gate_proj": rng.standard_normal((FFN, HIDDEN)) * 0.05,
        "mlp.up_proj": rng.standard_normal((FFN, HIDDEN)) * 0.05,
        "mlp.down_proj": np.zeros((HIDDEN, FFN)),
        "input_layernorm": np.ones(HIDDEN),
        "post_attention_layernorm": np.ones(HIDDEN),
    }
    tensors = {
        f"model.layers.{index}.{name}.weight": value
        for index in range(layers)
        for name, value in layer.items()
    }
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    tensors["model.norm.weight"] = np.ones(HIDDEN)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, value in tensors.items():
        end = offset + value.nbytes
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(value.tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_source(folder, layers=1):
    """Write the model as a folder in Hugging Face layout."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"chat_template": TEMPLATE, "eos_token": END, "bos_token": START}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_safetensors(folder / "model.safetensors", tiny_weights(layers))
    return folder


def run_command(*arguments, home, **options):
    """Run `forerun` in a process of its own; returns what `subprocess.run` returns."""
    environment = {**os.environ, "FORERUN_HOME": str(home), **options.pop("env", {})}
    options = {"capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([*COMMAND, *map(str, arguments)], env=environment, **options)


@pytest.fixture(scope="session")
def hf_source(tmp_path_factory):
    """The tiny model as source weights."""
    return write_source(tmp_path_factory.mktemp("source") / "alphabet")


@pytest.fixture(scope="session")
def deep_source(tmp_path_factory):
    """The same with eight layers, of which six can be skipped."""
    return write_source(tmp_path_factory.mktemp("deep") / "alphabet", layers=8)


@pytest.fixture(scope="session")
def cli_home(tmp_path_factory):
    """A home in which the tiny model is installed as ``alphabet``."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def bundle(hf_source, cli_home):
    """Path of the tiny model's bundle, made by the command line."""
    out = cli_home / "models" / "alphabet" / "fp32"
    done = run_command("export", hf_source, out, "--name", "alphabet", home=cli_home)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == out
    return out


@pytest.fixture(scope="session")
def layouts(bundle, tmp_path_factory):
    """The tiny model with every layout of the KV cache, its own being 32-bit float."""
    out = tmp_path_factory.mktemp("layouts") / "bundle"
    assert main(["quantize", str(bundle), str(out), "--weights", "int8"]) == 0
    return str(out)


@pytest.fixture(scope="session")
def skipping(deep_source, tmp_path_factory):
    """The tiny model with eight layers, of which feed-forward blocks can be skipped."""
    folder = tmp_path_factory.mktemp("skipping")
    assert main(["export", str(deep_source), str(folder / "fp32"), "--capacity", "256"]) == 0
    arguments = ["--weights", "fp32", "--skipping"]
    assert main(["quantize", str(folder / "fp32"), str(folder / "bundle"), *arguments]) == 0
    return str(folder / "bundle")


@pytest.fixture
def forerun(bundle, cli_home, monkeypatch, capsys):
    """Run a command on the tiny model: in this process, or in one of its own if it has input."""
    monkeypatch.setenv("FORERUN_HOME", str(cli_home))

    def run(*arguments, **options):
        if options:
            return run_command(*arguments, home=cli_home, **options)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)

    run.model, run.home, run.command = str(bundle), cli_home, COMMAND
    return run


@pytest.fixture
def endless(bundle, cli_home):
    """Start an answer without an end; a context manager that gives the process."""

    @contextlib.contextmanager
    def start(*options):
        environment = {**os.environ, "FORERUN_HOME": str(cli_home)}
        limits = ["--raw", "--context", "slide", "--max-tokens", "1000000000"]
        process = subprocess.Popen(
            [*COMMAND, "generate", "a", "--model", str(bundle), *limits, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    return start
