"""`forerun evaluate` as a user calls it, on a very small model."""

import json

import pytest
from tiny import tiny_bundle

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
    assert row["top1_agreement"] == 1 and row["kl_mean"] == row["kl_p99"] == 0
    assert row["perplexity"] == row["perplexity_against"] > 1
    assert list(row["by_context"]) == ["64"] and list(row["by_text"]) == [
        "prose",
        "reference",
        "code",
    ]
    assert row["weight_bytes"] > 0 and row["peak_rss_mb"] > 10
    stages = {line.split(":")[1].strip() for line in done.stderr.splitlines()}
    assert "evaluate" in stages, "progress is told"


def test_several_are_rows_of_a_table_or_of_one_object(forerun, layouts):
    both = (forerun.model, layouts, "--against", forerun.model, *QUICK)
    rows = json.loads(run(forerun, *both, "--json").stdout)["rows"]
    assert [row["label"] for row in rows] == ["fp32", "int8"]
    assert [row["bundle"] for row in rows] == [forerun.model, layouts]
    assert rows[0]["kl_mean"] == 0 < rows[1]["kl_mean"] < 0.02
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"]
    table = run(forerun, *both).stdout
    assert "KL p99" in table and [table.count(name) for name in ("│ fp32 ", "│ int8 ")] == [1, 1]


def test_layouts_and_shares_are_combined(forerun):
    refused(forerun, "skip", forerun.model, "--skipping", "off,0.5", *QUICK)
    layouts = (forerun.model, "--kv", "fp32", "--skipping", "off", "--window", "off")
    row = json.loads(run(forerun, *layouts, *QUICK, "--json").stdout)
    assert (row["kv"], row["ffn_skip"], row["window"]) == ("fp32", None, None)
    refused(forerun, "int4", forerun.model, "--kv", "fp32,int4", *QUICK)


def test_every_combination_is_a_row(forerun, layouts):
    cut = ("--kv", "fp32,fp16", "--window", "off,48", "--context", "64", "--tokens", "192")
    rows = json.loads(run(forerun, layouts, *cut, "--quick", "--json").stdout)["rows"]
    labels = ["int8, KV fp32", "int8, KV fp16", "int8, KV fp32, window 48"]
    assert {row["label"] for row in rows} == {*labels, "int8, KV fp16, window 48"}
    assert len(rows) == 4
    for row in rows:
        assert row["kv_bytes_per_token"] == (512 if row["kv"] == "fp32" else 256)
        assert row["window"] == (48 if "window" in row["label"] else None)


def test_a_window_forgets(forerun, tmp_path):
    # Attention of the alphabet's model adds nothing, so there is nothing to forget.
    _, folder = tiny_bundle("llama", tmp_path)
    how = ("--window", "off,40", "--speed-depths", "16", *QUICK)
    full, cut_off = json.loads(run(forerun, folder, *how, "--json").stdout)["rows"]
    assert (full["window"], cut_off["window"]) == (None, 40)
    assert full["perplexity"] != pytest.approx(cut_off["perplexity"], rel=1e-3)


def test_skipping_is_a_row_of_its_own(forerun, skipping):
    how = ("--skipping", "off,0.25", "--against", skipping, "--speed-depths", "16", *QUICK)
    rows = json.loads(run(forerun, skipping, *how, "--json").stdout)["rows"]
    assert [row["ffn_skip"] for row in rows] == [None, "0.25"]
    assert [row["label"] for row in rows] == ["fp32", "fp32, skip 0.25"]
    assert rows[0]["ffn_skipped"] == 0 < rows[1]["ffn_skipped"]


def test_what_is_asked_reaches_the_measurement(forerun, monkeypatch, tmp_path):
    """Options whose effect does not show in the figures of so small a model."""
    from forerun.quant import evaluate

    seen = []

    def fake(judged, against, *, plan, progress):
        seen.append((judged, against, plan))
        return [{"label": "x"}]

    monkeypatch.setattr(evaluate, "evaluate_all", fake)
    mine = tmp_path / "mine.txt"
    how = ("--threads", "3", "--text", mine, "--tokens", "200", "--context", "32,64")
    run(forerun, forerun.model, *how, "--speed-depths", "8,16", "--quick")
    (judged,), against, plan = seen.pop()
    assert judged.threads == 3 and against is None and plan.text == mine
    assert (plan.tokens, plan.contexts, plan.speed_depths) == (200, (32, 64), (8, 16))
    assert plan.prompts == evaluate.QUICK.prompts != evaluate.Plan().prompts
    run(forerun, forerun.model, "--quick", "--rounds", "4")
    assert seen.pop()[2].rounds == 4
    run(forerun, forerun.model)
    (judged,), _, plan = seen.pop()
    assert plan.rounds == evaluate.Plan().rounds
    assert judged.threads is None and plan.prompts == evaluate.Plan().prompts
    assert plan.contexts == (512,), "as far as the bundle reaches"


def test_depths_and_tokens_are_those_that_were_asked_for(forerun):
    less = ("--quick", "--context", "64", "--speed-depths", "8,128")
    rows = [
        json.loads(run(forerun, forerun.model, *less, "--tokens", count, "--json").stdout)
        for count in ("192", "384")
    ]
    assert list(rows[0]["decode_by_depth"]) == ["8", "128"]
    assert rows[1]["tokens"] == 2 * rows[0]["tokens"]


def test_without_rounds_nothing_is_timed(forerun):
    row = json.loads(run(forerun, forerun.model, *QUICK, "--rounds", "0", "--json").stdout)
    assert "decode_tok_s" not in row and "peak_rss_mb" not in row and row["perplexity"] > 1
    untimed = (forerun.model, "--rounds", "0", "--speed-depths", "8")
    refused(forerun, "--speed-depths needs --rounds", *untimed)
    refused(forerun, "--rounds needs a BUNDLE", "--from", "x", "--plot", "x.png", "--rounds", "0")


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
        (("--from", "x.json", "--plot", "x.png", "--against", "x"), "--against needs a BUNDLE"),
        (("--from", "x.json", "--plot", "x.png", "--kv", "int8"), "--kv needs a BUNDLE"),
        (("--from", "x.json", "--plot", "x.png", "--skipping", "0.1"), "--skipping needs a BUNDLE"),
        (("--from", "x.json", "--plot", "x.png", "--window", "64"), "--window needs a BUNDLE"),
        (("--from", "x.json", "--plot", "x.png", "--tokens", "64"), "--tokens needs a BUNDLE"),
        (("--from", "x.json", "--plot", "x.png", "--text", "x.txt"), "--text needs a BUNDLE"),
        (("--from", "x.json", "--plot", "x.png", "--context", "64"), "--context needs a BUNDLE"),
        (("--from", "x.json", "--plot", "x.png", "--speed-depths", "9"), "--speed-depths needs"),
        (("--from", "x.json", "--plot", "x.png", "--quick", "--threads", "1"), "--quick, --thre"),
        (("--from", "x.json"), "--from needs --plot"),
        (("MODEL", "--plot", "x.png"), "--plot needs --against"),
        (("MODEL", "--against", "MODEL", "--plot", "x.pdf"), "must end in .png"),
        (("MODEL", "--context", "64,many"), "must be numbers"),
        (("MODEL", "--context", "64,64"), "different names"),
        (("MODEL", "--context", "64,"), "different names"),
        (("MODEL", "--context", "99999"), "a context must be in 16.."),
        (("MODEL", "--window", "few"), "must be numbers"),
        (("MODEL", "--window", "9"), "36 to 512 rows, got 9"),
        (("MODEL", "--speed-depths", "0"), "must be from 1 on"),
        (("MODEL", "--tokens", "4"), "16"),
        (("MODEL", "--threads", "0"), "1"),
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
