"""`forerun evaluate` as a user calls it, on a very small model."""

import json

import pytest

QUICK = ("--quick", "--context", "64", "--tokens", "192")


def run(forerun, *arguments):
    done = forerun("evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    return done


def refused(forerun, words, *arguments):
    done = forerun("evaluate", *arguments)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert words in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.count("\n") == 1, "nothing was measured before"


def test_one_bundle_is_one_object_with_every_promised_field(forerun):
    done = run(forerun, forerun.model, "--against", forerun.model, *QUICK, "--json")
    row = json.loads(done.stdout)
    names = (
        "bundle against perplexity kl_mean kl_p99 top1_agreement recall bytes_per_weight "
        "kv_bytes_per_token decode_tok_s peak_rss_mb agreement_tokens by_context by_text "
        "recall_by_depth weight_bytes kv"
    )
    assert set(names.split()) <= set(row)
    assert row["top1_agreement"] == 1 and list(row["by_context"]) == ["64"]
    stages = {line.split(":")[1].strip() for line in done.stderr.splitlines()}
    assert "evaluate" in stages, "progress is told"


def test_several_are_rows_of_a_table_or_of_one_object(forerun):
    both = (forerun.model, forerun.model, "--against", forerun.model, *QUICK)
    rows = json.loads(run(forerun, *both, "--json").stdout)["rows"]
    assert len(rows) == 2 and rows[0]["kl_mean"] == rows[1]["kl_mean"]
    table = run(forerun, *both).stdout
    assert "KL p99" in table and table.count("fp32") == 2


def test_layouts_and_shares_are_combined(forerun):
    refused(forerun, "skip", forerun.model, "--skipping", "off,0.5", *QUICK)
    layouts = (forerun.model, "--kv", "fp32", "--skipping", "off", "--window", "off")
    row = json.loads(run(forerun, *layouts, *QUICK, "--json").stdout)
    assert (row["kv"], row["ffn_skip"], row["window"]) == ("fp32", None, None)
    refused(forerun, "int4", forerun.model, "--kv", "fp32,int4", *QUICK)


def test_saved_rows_are_drawn_without_a_model(forerun, tmp_path):
    pytest.importorskip("matplotlib")
    row = {"model": "m", "label": "int4", "kl_mean": 0.3, "weight_bytes": 1e8}
    row |= {"kv_bytes_per_token": 46080, "decode_tok_s": {"median": 50.0}}
    (tmp_path / "a.json").write_text(json.dumps(row))
    saved = ("--from", tmp_path / "a.json", "--from", tmp_path / "a.json")
    done = run(forerun, *saved, "--plot", tmp_path / "a.png", "--json")
    assert json.loads(done.stdout)["rows"] == [row, row]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a BUNDLE"),
        (("--from", "x.json", "--against", "x"), "needs a BUNDLE"),
        (("--from", "x.json"), "--from needs --plot"),
        (("MODEL", "--plot", "x.png"), "--plot needs --against"),
        (("MODEL", "--against", "MODEL", "--plot", "x.pdf"), "must end in .png"),
        (("MODEL", "--context", "64,many"), "must be numbers"),
        (("MODEL", "--context", "64,64"), "different names"),
        (("MODEL", "--context", "64,"), "different names"),
        (("MODEL", "--context", "99999"), "a context must be in 16.."),
        (("MODEL", "--window", "few"), "must be numbers"),
        (("MODEL", "--text", "absent.txt"), "cannot be read"),
        (("MODEL", "--kv", "int3"), "int3"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(forerun, arguments, words):
    refused(forerun, words, *(forerun.model if word == "MODEL" else word for word in arguments))


def test_a_text_of_the_users(forerun, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("abcdefgh " * 60)
    row = json.loads(run(forerun, forerun.model, "--text", path, *QUICK, "--json").stdout)
    assert list(row["by_text"]) == ["text"]
    path.write_text("abc")
    refused(forerun, "fewer than the context", forerun.model, "--text", path, *QUICK)
