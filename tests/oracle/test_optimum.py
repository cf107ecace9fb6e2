"""The same folder exported by optimum and run by its own runtime: same tokens."""

import numpy as np
import pytest
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM

from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner

# What the tracer of torch warns of is optimum's business.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 9, 40)
COUNT = 24


@pytest.fixture
def peer(tiny_model, row_name, tmp_path):
    tiny = tiny_model(row_name)
    main_export(str(tiny.folder), tmp_path, task="text-generation-with-past", do_validation=False)
    return tiny, ORTModelForCausalLM.from_pretrained(tmp_path, use_io_binding=False)


def test_same_tokens_as_optimum(peer, oracle):
    tiny, model = peer
    runner = Runner(load_manifest(tiny.bundle), tiny.bundle, threads=1)
    prompts = [np.random.default_rng(n).integers(3, 259, n).tolist() for n in LENGTHS]
    expected = [oracle.greedy_torch(model, [prompt], COUNT)[0] for prompt in prompts]
    found = [oracle.greedy_runner(runner, prompt, COUNT) for prompt in prompts]
    runner.close()
    oracle.same_tokens(expected, found, f"{tiny.name} against optimum", max_ties=1)


def test_logits_as_optimum(peer):
    tiny, model = peer
    ids = np.random.default_rng(3).integers(3, 259, 40)
    with torch.inference_mode():
        expected = (
            model(
                input_ids=torch.tensor(ids)[None],
                attention_mask=torch.ones((1, 40), dtype=torch.long),
            )
            .logits[0]
            .numpy()
        )
    runner = Runner(load_manifest(tiny.bundle), tiny.bundle, threads=1)
    found = runner.step(ids, want="all").reshape(40, -1).copy()
    runner.close()
    assert np.abs(found - expected).max() <= 2e-4 * expected.std()
