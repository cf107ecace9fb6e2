"""Commands that make, measure and list bundles, on a real, very small model."""

import json
import os
import re
import subprocess

import pytest


def run_ok(forerun, *arguments):
    done = forerun(*arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def int8(bundle, cli_home, tmp_path_factory):
    """The tiny model with 8-bit weights, made by the command line."""
    from forerun.apps.cli.main import main

    out = tmp_path_factory.mktemp("int8") / "alphabet-int8"
    assert main(["quantize", str(bundle), str(out), "--weights", "int8"]) == 0
    return out


def test_quantized_bundle_answers(forerun, int8):
    done = run_ok(forerun, "generate", "hi", "--model", int8, "--max-tokens", 5)
    assert done.stdout == "abcde\n"


def test_quantize_prints_the_folder_and_tells_sizes_as_json(forerun, tmp_path):
    done = run_ok(forerun, "quantize", forerun.model, tmp_path / "a")
    assert done.stdout == f"{tmp_path / 'a'}\n"
    done = run_ok(forerun, "quantize", "alphabet:fp32", tmp_path / "b", "--json")
    fields = json.loads(done.stdout)
    assert fields["weights"] == "int4" and fields["path"] == str(tmp_path / "b")
    assert fields["bytes"] == sum(
        file.stat().st_size
        for file in (tmp_path / "b").iterdir()
        if not file.name.startswith(".") and file.name != "manifest.json"
    )


def test_quantize_onto_itself_is_refused(forerun, bundle):
    before = (bundle / "manifest.json").read_bytes()
    done = forerun("quantize", bundle, bundle)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (bundle / "manifest.json").read_bytes() == before


def test_export_tells_its_checks_as_json(forerun, hf_source, tmp_path):
    out = tmp_path / "named"
    done = run_ok(forerun, "export", hf_source, out, "--capacity", 64, "--json")
    fields = json.loads(done.stdout)
    assert fields["name"] == "named" and fields["path"] == str(out)
    assert fields["checks"] and all(c["value"] <= c["bound"] for c in fields["checks"])
    limited = forerun("generate", "x" * 64, "--raw", "--model", out, "--max-tokens", 9)
    assert limited.returncode == 0 and "context is full" in limited.stderr
    assert forerun("generate", "x" * 65, "--raw", "--model", out).returncode == 2


def test_export_of_damaged_weights_writes_nothing(forerun, hf_source, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in hf_source.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = forerun("export", source, tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("forerun: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_export_keeps_what_is_no_bundle(forerun, hf_source, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    assert forerun("export", hf_source, tmp_path).returncode == 2
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_progress_is_plain_lines_without_a_terminal(forerun, hf_source, tmp_path):
    done = run_ok(forerun, "export", hf_source, tmp_path / "out")
    lines = done.stderr.splitlines()
    assert lines and all(re.match(r"forerun: [a-z ]+: \d", line) for line in lines)
    assert any("(100 %)" in line for line in lines)


def test_progress_is_a_bar_at_a_terminal_and_the_result_stays_alone(forerun, hf_source, tmp_path):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    process = subprocess.run(
        [*forerun.command, "export", hf_source, tmp_path / "out"],
        env={**os.environ, "FORERUN_HOME": str(forerun.home), "TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    )
    os.close(slave)
    drawn = os.read(master, 1 << 20).decode()
    os.close(master)
    assert process.stdout == f"{tmp_path / 'out'}\n"
    assert "\x1b[" in drawn and "━" in drawn and "export" in drawn and "100 %" in drawn


def test_evaluate_as_json_and_as_a_table(forerun, int8):
    options = ("--context", 64, "--tokens", 128)
    done = run_ok(forerun, "evaluate", int8, "--against", forerun.model, *options, "--json")
    fields = json.loads(done.stdout)
    names = "bundle against perplexity kl_mean kl_p99 top1_agreement bytes_per_weight"
    assert set(names.split()) <= set(fields)
    assert fields["top1_agreement"] > 0.9
    table = run_ok(forerun, "evaluate", int8, *options).stdout
    assert "perplexity" in table and "bytes_per_weight" in table


def test_devices_names_the_processor(forerun):
    row = json.loads(run_ok(forerun, "devices", "--json").stdout)["devices"][0]
    assert row["name"] == "cpu" and row["available"] is True
    assert row["provider"] == "CPUExecutionProvider"
    table = run_ok(forerun, "devices").stdout
    assert "CPUExecutionProvider" in table and "yes" in table


def test_catalog_is_listed_without_fetching(forerun):
    models = json.loads(run_ok(forerun, "pull", "--list", "--json").stdout)["models"]
    licences = {model["name"]: model["licence"] for model in models}
    assert licences["smollm2-135m"] == "Apache-2.0"
    assert "smollm2-135m" in run_ok(forerun, "pull", "--list").stdout


def test_terms_must_be_accepted_by_a_flag(forerun):
    done = forerun("pull", "gemma3-270m")
    assert done.returncode == 2 and done.stdout == ""
    assert "--accept-terms" in done.stderr.splitlines()[-1]
    assert not (forerun.home / "models" / "gemma3-270m").exists()
