import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from forerun.apps.bench import prepare, quality
from forerun.apps.bench.quality import CONTEXT, FIRST, Judged, Tally, read_logits_file
from forerun.errors import OptionError
from forerun.quant.evaluate import log_softmax

VOCAB = 11
ROWS = CONTEXT - 1 - FIRST


def log_probabilities(seed, rows=ROWS):
    rng = np.random.default_rng(seed)
    return log_softmax(rng.standard_normal((rows, VOCAB)).astype(np.float32) * 3)


def make_pieces(count):
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, CONTEXT) for _ in range(count)]


def write_logits_file(path, pieces, blocks):
    """As llama.cpp writes it: steps of a 65,535th of the range of a row."""
    with open(path, "wb") as stream:
        stream.write(b"_logits_" + struct.pack("<3i", CONTEXT, VOCAB, len(pieces)))
        np.concatenate(pieces).astype("<i4").tofile(stream)
        for block in blocks:
            for row in block:
                low = max(row.min(), row.max() - 16)
                scale = np.float32((row.max() - low) / 65535)
                stream.write(struct.pack("<2f", scale, low))
                steps = np.where(row > low, np.rint((row - low) / scale), 0).astype("<u2")
                np.append(steps, np.zeros(VOCAB % 2, "<u2")).astype("<u2").tofile(stream)


def test_tally_is_the_definition():
    p, q = log_probabilities(1), log_probabilities(2)
    truth = np.random.default_rng(3).integers(0, VOCAB, ROWS)
    tally = Tally()
    tally.add(truth, p, q)
    found = tally.result()
    kl = [
        sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True))
        for x, y in zip(p, q, strict=True)
    ]
    nll = [-q[i, t] for i, t in enumerate(truth)]
    assert found["kl_mean"] == pytest.approx(np.mean(kl), abs=2e-6)
    assert found["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), abs=2e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nll)), abs=1e-3)
    assert found["top1_agreement"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=1e-4)
    assert found["positions"] == ROWS


def test_the_reference_has_no_divergence_to_itself():
    p = log_probabilities(1)
    tally = Tally()
    tally.add(np.zeros(ROWS, int), p, p)
    found = tally.result()
    assert (found["kl_mean"], found["top1_agreement"]) == (0, 1)


def test_llama_file_reads_back_within_its_rounding(tmp_path):
    pieces, blocks = make_pieces(2), [log_probabilities(1), log_probabilities(2)]
    path = tmp_path / "logits.bin"
    write_logits_file(path, pieces, blocks)
    for wanted, found in zip(blocks, read_logits_file(path, pieces), strict=True):
        assert found.shape == wanted.shape
        floor = wanted.max(1, keepdims=True) - 16
        np.testing.assert_allclose(found, np.maximum(wanted, floor), atol=16 / 65535)


def test_other_tokens_another_format_and_a_cut_file_are_refused(tmp_path):
    pieces, blocks = make_pieces(2), [log_probabilities(1), log_probabilities(2)]
    path = tmp_path / "logits.bin"
    write_logits_file(path, pieces, blocks)
    data = path.read_bytes()
    with pytest.raises(prepare.NotPrepared, match="other tokens"):
        list(read_logits_file(path, [pieces[1], pieces[0]]))
    path.write_bytes(data[:-7])
    with pytest.raises(prepare.NotPrepared, match="cut"):
        list(read_logits_file(path, pieces))
    path.write_bytes(b"GGUF" + data[4:])
    with pytest.raises(prepare.NotPrepared, match="another format"):
        list(read_logits_file(path, pieces))


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """`run_quality` with made-up runtimes in place of bundles and peers."""

    def reads(seed):
        return lambda pieces: (log_probabilities(seed + i) for i, _ in enumerate(pieces))

    manifest = SimpleNamespace(name="fake", model=SimpleNamespace(vocab=VOCAB))

    def fail(pieces):
        raise prepare.NotPrepared("its tool failed: killed")
        yield

    monkeypatch.setattr(quality, "find_bundle", lambda name: tmp_path)
    monkeypatch.setattr(quality, "load_manifest", lambda folder: manifest)
    monkeypatch.setattr(quality, "corpus_pieces", lambda *args: make_pieces(4))
    monkeypatch.setattr(quality, "_read_bundle", lambda folder, threads: reads(5))
    ours = [Judged("forerun", "fp32", 8, 4, reads(5)), Judged("forerun", "int4", 1, 4, reads(50))]
    monkeypatch.setattr(quality, "_bundles", lambda model, threads: (ours, {"forerun int8": "x"}))
    theirs = [Judged("llama.cpp", "Q4_0", 2, 2, fail)]
    monkeypatch.setattr(quality, "_peers", lambda *args: (theirs, {}))


def test_run_quality_compares_all_with_float32(ready, tmp_path, capsys):
    out = tmp_path / "q.json"
    result = quality.run_quality("fake", out, tokens=2048)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    same, other = result["rows"]
    assert same["kl_mean"] == 0
    assert other["kl_mean"] > 0.1
    assert same["positions"] == 4 * ROWS
    assert (other["runtime"], other["weights"], other["bytes"]) == ("forerun", "int4", 1)
    assert other["kv_bytes_per_token"] == 4
    assert result["left_out"] == {"forerun int8": "x", "llama.cpp Q4_0": "its tool failed: killed"}
    assert "its tool failed" in capsys.readouterr().out


def test_too_little_text_is_refused():
    with pytest.raises(OptionError, match="at least 2048"):
        quality.run_quality(tokens=2047)
