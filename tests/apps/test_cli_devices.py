"""`forerun devices`, with and without a model."""

import json

import pytest

from forerun.apps.cli.costs import weight_bytes
from forerun.runtime.manifest import load_manifest


def run_ok(forerun, *arguments):
    done = forerun(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def measured(forerun, *options):
    return run_ok(forerun, "devices", "--model", forerun.model, "--threads", 1, *options)


def test_every_device_is_listed_with_what_it_needs(forerun):
    rows = json.loads(run_ok(forerun, "devices", "--json").stdout)["devices"]
    names = {row["name"]: row for row in rows}
    assert names["cpu"]["available"] is True and "webgpu" in names
    assert all(row["detail"] and row["holds"] for row in rows)


def test_a_model_is_measured_and_remembered(forerun, bundle):
    done = measured(forerun, "--fresh", "--json")
    assert "measure" in done.stderr
    fields = json.loads(done.stdout)
    assert fields["device"] == "cpu" and fields["threads"] == 1
    steps = fields["steps"]
    assert [row["rows"] for row in steps] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert steps[0]["ratio"] == 1 and all(len(row["ms"]) == len(fields["depths"]) for row in steps)
    assert {row["drafter"] for row in fields["drafters"]} >= {"ngram", "recycle"}
    assert all(row["c"] > 0 for row in fields["drafters"])
    manifest = load_manifest(bundle)
    memory = fields["memory"]
    assert memory["capacity"] == manifest.kv.capacity
    assert memory["kv_bytes_per_token"] == manifest.kv.nbytes_per_token
    assert memory["weights_mb"] == weight_bytes(manifest) / 1e6
    assert min(fields["bandwidth"][name] for name in ("gb_per_s", "one_thread_gb_per_s")) > 0
    again = measured(forerun, "--json")
    assert again.stdout == done.stdout and "measure" not in again.stderr


def test_a_model_as_a_table(forerun):
    table = measured(forerun).stdout
    for word in ("T(n) ms at 64", "T(n)/T(1)", "ngram", "GB/s", "KV cache per token", "tokens"):
        assert word in table


@pytest.mark.parametrize(
    "options, word",
    [
        (("--fresh",), "--model"),
        (("--threads", 2), "--model"),
        (("--device", "cpu"), "--model"),
        (("--model", "nothing-like-it"), "installed"),
        (("--model", "MODEL", "--device", "abacus"), "abacus"),
        (("--model", "MODEL", "--device", "qnn"), "npu"),
        (("--model", "MODEL", "--threads", 0), "--threads"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(forerun, options, word):
    done = forerun("devices", *(forerun.model if o == "MODEL" else o for o in options))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and word in done.stderr
