"""`forerun quantize` as a user calls it: every option does what it says, or refuses."""

import json

import pytest
from tiny import tiny_bundle

from forerun.apps.cli.main import main
from forerun.apps.cli.quantize import bounds_text
from forerun.devices.home import VARIANTS
from forerun.quant.formats import FORMATS, KEPT, KEPT_BOUNDS, PLAIN_FORMATS
from forerun.quant.quantize import Wish

LIMITS = {
    "--max-kl": ("1e-9", "mean KL to float32"),
    "--max-kl-p99": ("1e-9", "99th percentile of KL"),
    "--min-agreement": ("1", "same best token"),
    "--max-perplexity": ("0.001", "perplexity by that of float32"),
}
METRICS = ("kl_mean", "kl_p99", "top1_agreement", "perplexity_ratio")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float32 bundle of random weights, which rounding changes; the alphabet's it does not."""
    return str(tiny_bundle("llama", tmp_path_factory.mktemp("random"))[1])


@pytest.fixture
def quantize(source, tmp_path, capsys):
    """Run the command; returns its code, standard output, standard error and the new folder."""

    def run(*arguments):
        capsys.readouterr()
        out = tmp_path / "out"
        code = main(["quantize", source, str(out), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out

    return run


def made(quantize, *arguments):
    """The JSON of a copy that was written."""
    code, told, errors, out = quantize(*arguments, "--max-kl", 9, "--json")
    assert code == 0, errors
    fields = json.loads(told)
    assert fields["path"] == str(out) and (out / "manifest.json").is_file()
    return fields


@pytest.mark.parametrize("form", ["int4-fast", "int8", "int8-rows"])
def test_weights_are_stored_as_asked(quantize, form):
    assert made(quantize, "--weights", form)["weights"] == form


def test_kv_is_what_the_copy_runs_by_itself(quantize):
    assert made(quantize)["kv"][0] == "fp32"
    assert made(quantize, "--kv", "int4")["kv"][0] == "int4"
    assert made(quantize, "--weights", "int4-exact")["kv"][0] == "int8"


def test_a_budget_widens_what_it_has_room_for(quantize):
    plain = made(quantize)
    assert "budget" not in plain["detail"]
    wide = made(quantize, "--budget", "2MB")
    assert "8 bits for" in wide["detail"] and "by a budget" in wide["detail"]
    assert plain["weight_bytes"] < wide["weight_bytes"] < 2_000_000
    assert wide["checks"]["kl_mean"] < plain["checks"]["kl_mean"]


def test_skipping_is_calibrated_where_it_is_asked_for(forerun, deep_source, tmp_path):
    assert forerun("export", deep_source, tmp_path / "fp32").returncode == 0
    for name, more in (("plain", ()), ("skip", ("--skipping",))):
        done = forerun("quantize", tmp_path / "fp32", tmp_path / name, "--weights", "int8", *more)
        assert done.returncode == 0, done.stderr
        answer = ("generate", "hi", "--model", tmp_path / name, "--skipping", "0.25")
        assert forerun(*answer).returncode == (0 if more else 2)
        assert ("skipping levels: " in done.stderr) is bool(more)


@pytest.mark.parametrize("option", LIMITS)
def test_every_limit_refuses_and_shows_all_that_was_measured(quantize, option):
    limit, words = LIMITS[option]
    code, told, errors, out = quantize("--weights", "int8", option, limit)
    assert code == 1 and told == "" and not out.exists()
    assert words in errors.splitlines()[-1] and "was not written" in errors.splitlines()[-1]
    rows = [line for line in errors.splitlines() if line.startswith("│")]
    assert len(rows) == 4
    for name, row in zip(LIMITS, rows, strict=True):
        assert LIMITS[name][1] in row
        assert ("NOT KEPT" in row) is (name == option)
        assert ("none" in row) is (name not in (option, "--max-kl"))


@pytest.mark.parametrize(("option", "metric"), list(zip(LIMITS, METRICS, strict=True)))
def test_a_refusal_as_json_is_one_object(quantize, option, metric):
    limit, _ = LIMITS[option]
    code, told, errors, out = quantize("--weights", "int8", option, limit, "--json")
    assert code == 1 and not out.exists() and "│" not in errors
    fields = json.loads(told)
    assert fields["is_written"] is False and set(fields["measures"]) == set(METRICS)
    found = fields["measures"][metric]
    assert found["limit"] == float(limit) and found["is_kept"] is False
    assert all(isinstance(one["value"], float) for one in fields["measures"].values())


def test_limits_that_are_kept_are_recorded(quantize):
    generous = ("--max-kl-p99", 50, "--min-agreement", 0, "--max-perplexity", 1000)
    assert set(METRICS) <= set(made(quantize, "--weights", "int8", *generous)["checks"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kv", "int3"), "int3"),
        (("--kv", "gear-kivi"), "chosen when a bundle is loaded"),
        (("--weights", "int8", "--budget", "2MB"), "4-bit form"),
        (("--budget", "much"), "--budget is 'much'"),
        (("--weights", "fp32"), "nothing would change"),
        (("--max-kl", "0"), "above 0"),
        (("--max-kl", "-1"), "0"),
        (("--max-kl", "nan"), "'nan'"),
        (("--min-agreement", "1.1"), "1"),
    ],
)
def test_what_does_not_go_is_refused_in_one_line(quantize, arguments, words):
    code, told, errors, out = quantize(*arguments)
    assert code == 2 and told == "" and errors.count("\n") == 1 and not out.exists()
    assert words in errors


@pytest.mark.parametrize("name", ["smollm2-135m:int4", "alphabet:fp32", "my-model:mine"])
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_the_name_of_a_pulled_model_is_no_folder(forerun, tmp_path, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    done = forerun(command, forerun.model, name)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert name in done.stderr and f"./{name.replace(':', '-')}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_colon_can_be_written_by_its_path(forerun, tmp_path):
    out = tmp_path / "alphabet:int8"
    assert forerun("quantize", forerun.model, out, "--weights", "int8").returncode == 0


def test_the_help_lists_all_forms_and_their_limits(capsys):
    assert main(["quantize", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert ", ".join(FORMATS) in words and ", ".join(PLAIN_FORMATS) in words
    assert bounds_text() in words
    forms, _, kept = bounds_text().partition(f"; of {KEPT} by --kv: ")
    told = dict(part.split(" for ") for part in forms.split("; "))
    for name in (*FORMATS, *PLAIN_FORMATS):
        bound = Wish(name).kept_limits.kl_mean
        assert name in told[f"{bound:g}"].split(", ")
    assert len(kept.split(", ")) == len(KEPT_BOUNDS)
    for layout in set(KEPT_BOUNDS) - {"fp32"}:
        bound = Wish(KEPT, kv=layout).kept_limits.kl_mean
        assert f"{bound:g} for {layout}" in kept.split(", ")
    assert main(["pull", "--help"]) == 0
    assert "|".join(VARIANTS) in capsys.readouterr().out
