"""The first layers of SmolLM2-135M, with their real weights, on Qualcomm's NPU or its simulator."""

import numpy as np
import pytest

from forerun.devices.home import home
from forerun.export.export import export_model
from forerun.export.shorter import FirstLayers
from forerun.export.sources import open_source
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.runner import Runner
from forerun.runtime.session import Session
from forerun.runtime.static_runner import StaticRunner
from forerun.runtime.tokenizer import Tokenizer

pytestmark = [pytest.mark.model, pytest.mark.npu]
pytest.importorskip("onnxruntime_qnn", reason="the NPU's plugin: pip install onnxruntime-qnn")

LAYERS, ANSWER = 2, 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    files = list((home() / "downloads" / "smollm2-135m").glob("*.gguf"))
    if not files:
        pytest.fail("these tests need source weights: run `forerun pull smollm2-135m`")
    source = FirstLayers(open_source(files[0]), LAYERS)
    out = tmp_path_factory.mktemp("smollm2") / "bundle"
    return export_model(source, out, name="first-layers", capacity=64, static=True), out


def test_real_weights_fit_into_half_precision_and_drafts_change_nothing(bundle):
    manifest, folder = bundle
    npu = StaticRunner(manifest, folder, device="qnn")
    ids = [504, 3575, 282, 4649, 314, 7042, 30, 504]
    expected = Runner(manifest, folder).step(ids, want="all")
    found = npu.step(ids, want="all")
    assert np.abs(found - expected).max() < 0.05 * expected.std()
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))
    session = Session(npu, Tokenizer(manifest, folder))
    told = []
    for drafter in (None, NgramDrafter()):
        session.reset()
        events = list(session.generate(ids, max_tokens=ANSWER, drafter=drafter))
        told.append([event.token for event in events if event.token is not None])
    assert len(told[0]) == ANSWER and told[0] == told[1]
    stats = events[-1].stats
    assert stats.drafter == "ngram" and stats.verify_ms > stats.draft_ms > 0
    npu.close()
