"""Target and drafter on different devices: the text of plain decoding on the target's device."""

import pytest
from tiny import tiny_bundle

from forerun.errors import DeviceError, OptionError
from forerun.runtime.drafting import choice
from forerun.runtime.drafting.schedules import SCHEDULES
from forerun.runtime.load import load
from forerun.runtime.types import SamplingParams

PROMPT, TOKENS = [5, 6, 7, 8, 9, 5, 6, 7], 12
WARM = SamplingParams(temperature=0.8, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("two"), capacity=64)[1]


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Drafts are always four tokens; timing each width would compile a shader for each."""
    monkeypatch.setattr("forerun.runtime.load.measured_means", lambda *given: choice.Means())


def answer(text, **options):
    """(ids, figures) of an answer."""
    events = list(text.stream(PROMPT, max_tokens=TOKENS, **options))
    return [e.token for e in events if e.token is not None], events[-1].stats


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [SamplingParams(), WARM], ids=["greedy", "sampled"])
def test_a_target_on_the_gpu_with_ngrams_on_the_cpu(webgpu, folder, sampling):
    with load(folder, threads=1, device=webgpu) as text:
        plain, figures = answer(text, sampling=sampling)
        assert figures.devices == {"target": "webgpu", "draft": None}
        drafted, figures = answer(text, sampling=sampling, drafter="ngram")
        assert drafted == plain and figures.proposed
        assert figures.devices == {"target": "webgpu", "draft": "cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_draft_model_on_the_cpu_for_a_target_on_the_gpu(webgpu, folder, schedule):
    options = {"device": webgpu, "drafter": str(folder), "schedule": schedule}
    with load(folder, threads=1, spin=False, **options) as text:
        drafted, figures = answer(text)
        assert figures.devices == {"target": "webgpu", "draft": "cpu"}
        assert figures.schedule == schedule
        assert figures.accepted > figures.proposed // 2, "it drafts with the target's own weights"
        assert figures.draft_ms > 0 and figures.verify_ms > 0
        assert drafted == answer(text, drafter="none")[0]


@pytest.mark.gpu
def test_a_draft_model_on_the_gpu_for_a_target_on_the_cpu(webgpu, folder):
    device = f"target=cpu,draft={webgpu}"
    with load(folder, threads=1, device=device, drafter=str(folder)) as text:
        drafted, figures = answer(text)
        assert figures.devices == {"target": "cpu", "draft": "webgpu"}
        assert figures.accepted > figures.proposed // 2
        assert drafted == answer(text, drafter="none")[0]


def test_drafters_without_a_model_stay_on_the_cpu(folder):
    with pytest.raises(OptionError, match="'ngram' runs on the cpu, not on webgpu"):
        load(folder, threads=1, device="draft=webgpu", drafter="ngram")


def test_devices_that_are_not_here(folder):
    with pytest.raises(OptionError, match="'gpu' is unknown"):
        load("nowhere", device="gpu")
    with pytest.raises(DeviceError, match="pip install onnxruntime-gpu"):
        load(folder, threads=1, device="cuda")
    told = []
    with load(folder, device="cuda", allow_fallback=True, on_fallback=told.append) as text:
        assert answer(text)[1].devices["target"] == "cpu"
    assert "going on on the cpu" in told[0]
