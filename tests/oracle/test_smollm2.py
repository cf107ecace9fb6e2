"""SmolLM2-135M as a whole: forerun's float32 bundle against transformers and optimum.

transformers reads the same GGUF file with its own reader, so nothing of forerun is on that side.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from forerun.export.catalog import find_entry
from forerun.export.export import export_model
from forerun.export.fetch import fetch
from forerun.export.sources import open_source
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner

# What the tracer of torch warns of is optimum's business.
pytestmark = pytest.mark.filterwarnings("ignore")

NAME = "smollm2-135m"
PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text("utf-8"))
COUNT = 64
OPTIMUM_PROMPTS, OPTIMUM_COUNT = 4, 24
LONG = 1200


@pytest.fixture(scope="module", autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gguf():
    return Path(fetch(find_entry(NAME)))


@pytest.fixture(scope="module")
def bundle(gguf, tmp_path_factory):
    """Exported anew: an installed bundle may come from an older exporter."""
    folder = tmp_path_factory.mktemp(NAME) / "fp32"
    export_model(open_source(gguf), folder, name=NAME)
    return folder


@pytest.fixture(scope="module")
def runner(bundle):
    runner = Runner(load_manifest(bundle), bundle, threads=2)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def model():
    """The weights as transformers dequantizes them, in float32, in a model without history."""

    from forerun.export.catalog import find_entry
    from forerun.export.fetch import fetch

    path = Path(fetch(find_entry(NAME)))
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = loaded.config
    config.quantization_config = None
    del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    return fresh


@pytest.fixture(scope="module")
def prompts(bundle):
    tokenizer = Tokenizer.from_file(str(bundle / load_manifest(bundle).tokenizer.file))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in PROMPTS]


def test_weights_are_the_same(gguf, model):
    """forerun's GGUF reader, its dequantization and its order of rows against transformers'."""
    source, state = open_source(gguf), model.state_dict()
    for name in sorted(source.names()):
        assert np.array_equal(source.tensor(name), state[name].numpy()), name


def test_logits_of_a_long_text(runner, model):
    ids = np.random.default_rng(5).integers(0, 49152, LONG)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor(ids)[None], logits_to_keep=200)
    expected = out.logits[0].numpy()
    runner.arena.rewind(0)
    runner.step(ids[:500], want="none")
    runner.step(ids[500:1000], want="none")
    found = runner.step(ids[1000:], want="all").reshape(200, -1)
    error, bound = np.abs(found - expected).max(), 2e-4 * expected.std()
    assert error <= bound, f"differs by {error:.3g}, allowed is {bound:.3g}"


def test_greedy_tokens_of_32_prompts(runner, model, prompts, oracle):
    assert len(prompts) == 32
    expected = oracle.greedy_torch(model, prompts, COUNT)
    found = [oracle.greedy_runner(runner, prompt, COUNT) for prompt in prompts]
    oracle.same_tokens(expected, found, f"{NAME} against transformers")


def test_optimum_export_gives_the_same_tokens(runner, model, prompts, oracle, tmp_path):
    model.save_pretrained(tmp_path / "hf")
    main_export(
        str(tmp_path / "hf"),
        tmp_path / "onnx",
        task="text-generation-with-past",
        do_validation=False,
    )
    other = ORTModelForCausalLM.from_pretrained(tmp_path / "onnx", use_io_binding=False)
    picked = [prompts[number] for number in range(0, 32, 32 // OPTIMUM_PROMPTS)]
    expected = oracle.greedy_torch(other, picked, OPTIMUM_COUNT)
    found = [oracle.greedy_runner(runner, prompt, OPTIMUM_COUNT) for prompt in picked]
    oracle.same_tokens(expected, found, f"{NAME} against optimum", max_ties=1)
