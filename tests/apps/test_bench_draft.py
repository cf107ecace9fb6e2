import json
import re
import xml.dom.minidom
from dataclasses import asdict, fields
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest

from forerun.apps.bench import draft, draft_peers, draft_plot, draft_report, draft_turns
from forerun.apps.bench import simulate as simulation
from forerun.apps.bench.draft import Options
from forerun.apps.bench.draft_prompts import CATEGORIES, Prompt, load_prompts
from forerun.apps.bench.draft_rows import make_overall, make_rows, pairs_of
from forerun.apps.bench.draft_ties import Comparison, compare, first_difference
from forerun.apps.bench.draft_turns import PLAIN, Answer, Plan, measure, settings_for
from forerun.apps.bench.simulate import SimulatedRow
from forerun.apps.cli.bench_draft import names, numbers
from forerun.apps.cli.main import main
from forerun.devices import home
from forerun.errors import ContextLimitError, OptionError, UnsupportedError
from forerun.runtime.drafting import registry
from forerun.runtime.noise import gumbel
from forerun.runtime.types import SamplingParams, Stats

PROMPTS = tuple(Prompt(category, n, f"{category} {n}") for n in range(2) for category in ("a", "b"))


class FakeEngine:
    """Answers in a time that depends on the drafter, and notes who was asked in which order."""

    capacity, model, weights = 1000, "fake", "int4"
    eos, row_exact = frozenset({0}), False

    def __init__(self, seconds=None, texts=None, slower_runs=()):
        self.seconds = seconds or {PLAIN: 2.0, "fast": 1.0, "auto": 0.5}
        self.texts, self.slower_runs = texts or {}, slower_runs
        self.log, self.restarts, self.closed, self.manifest = [], 0, False, SimpleNamespace()

    def ids(self, text):
        return [len(text), *map(ord, text)]

    def answer(self, drafter, ids, params, max_tokens):
        if drafter == "broken":
            raise UnsupportedError("it has another tokenizer")
        self.log.append((drafter, bytes(ids[1:]).decode(), params.temperature, params.seed))
        tokens = tuple(self.texts.get(drafter, range(1, 12)))[:max_tokens]
        seconds = self.seconds[drafter] * (3 if self.restarts in self.slower_runs else 1)
        drafted = {} if drafter == PLAIN else {"serial": 1}
        stats = Stats(
            new_tokens=len(tokens),
            rounds=len(tokens) - 1 if not drafted else 5,
            proposed=0 if not drafted else 10,
            accepted=0 if not drafted else 6,
            schedule="plain" if not drafted else "serial",
            acceptance={} if not drafted else {"ngram": {1: [5, 4], 2: [5, 2]}},
            draft_ms=10.0,
            verify_ms=20.0,
        )
        return Answer(tokens, seconds, stats)

    def logprob(self, ids, token):
        return -0.1 * token

    def restart(self):
        self.restarts += 1

    def cancel(self):
        pass

    def close(self):
        self.closed = True


def a_plan(**changes):
    values = {
        "prompts": PROMPTS,
        "drafters": ("fast", "auto"),
        "settings": ((0.0, 0),),
        "repeat": 1,
        "max_tokens": 64,
    }
    return Plan(**{**values, **changes})


def test_the_prompt_set():
    path = resources.files("forerun.apps.bench") / "prompts/draft.json"
    texts = json.loads(path.read_text("utf-8"))
    assert list(texts) == list(CATEGORIES)
    assert all(10 <= len(group) <= 12 for group in texts.values())
    everything = [text for group in texts.values() for text in group]
    assert len(set(everything)) == len(everything)
    assert all(text == text.strip() and len(text) < 1200 for text in everything)
    # The trained drafters were shown these; a benchmark must not ask them again.
    trained = r"to a child|short story|List \w+ facts|advice to|email to a friend|disadvantages"
    assert not [text for text in everything if re.search(trained, text, re.IGNORECASE)]


def test_prompts_of_all_kinds_take_turns():
    some = load_prompts(["json", "copy"], 2)
    places = [(p.category, p.number) for p in some]
    assert places == [("json", 0), ("copy", 0), ("json", 1), ("copy", 1)]
    assert {p.category for p in load_prompts()} == set(CATEGORIES)
    with pytest.raises(OptionError, match=r"'poem' is not known; there are chat, .*json"):
        load_prompts(["poem"])
    with pytest.raises(OptionError, match="0 prompts"):
        load_prompts(limit=0)


def test_everyone_answers_each_prompt_and_the_order_is_rotated():
    engine = FakeEngine()
    samples = measure(engine, a_plan())
    asked = [(who, text) for who, text, *_ in engine.log[3:]]
    assert [text for _, text in asked] == [p.text for p in PROMPTS for _ in range(3)]
    rounds = [tuple(who for who, _ in asked[i : i + 3]) for i in range(0, 12, 3)]
    assert all(set(r) == {PLAIN, "fast", "auto"} for r in rounds)
    assert [r[0] for r in rounds] == [PLAIN, "fast", "auto", PLAIN]
    assert len(samples) == 12


def test_each_pass_begins_with_fresh_drafters():
    engine = FakeEngine()
    plan = a_plan(settings=settings_for([0.0, 0.8], 2), repeat=2)
    told = []
    measure(engine, plan, lambda stage, done, total: told.append((done, total)))
    assert engine.restarts == 6, "greedy and two seeds, twice"
    assert told[-1] == (plan.answers, plan.answers) == (72, 72)
    assert {(t, s) for _, _, t, s in engine.log} == {(0.0, 0), (0.8, 0), (0.8, 1)}


@pytest.mark.parametrize(("after", "kept"), [(2, 0), (7, 6), (14, 12), (20, 12)])
def test_an_interrupt_keeps_complete_prompts_of_the_first_pass_only(after, kept):
    engine = FakeEngine()

    def stopped():
        answers = len([1 for entry in engine.log if entry[1] in {p.text for p in PROMPTS}])
        return answers > after

    assert len(measure(engine, a_plan(repeat=2), stopped=stopped)) == kept


def rows_of(engine, **changes):
    pairs = pairs_of(measure(engine, a_plan(**changes)))
    found = {
        pair.key: compare(engine, [1], SamplingParams(), pair.plain.answer, pair.drafted.answer)
        for pair in pairs
    }
    return make_rows(pairs, found), make_overall(pairs, found)


def test_rows_and_overall():
    rows, overall = rows_of(FakeEngine(), repeat=3)
    places = {(r["category"], r["drafter"]) for r in rows}
    assert places == {(c, d) for c in "ab" for d in ("fast", "auto")}
    assert len(rows) == 4
    fast = next(r for r in rows if r["drafter"] == "fast")
    assert (fast["schedule"], fast["temperature"]) == ("serial", 0.0)
    assert {k: fast["speedup"][k] for k in ("median", "min", "max")} == dict.fromkeys(
        ("median", "min", "max"), 2.0
    )
    assert fast["steady"] is True
    assert fast["plain_tok_s"] == 5.0
    assert fast["tok_s"] == 10.0
    assert fast["tokens_per_round"] == 2.0
    assert fast["acceptance"] == 0.6
    assert fast["acceptance_by_depth"] == {"ngram": {"1": [30, 24], "2": [30, 12]}}
    assert (fast["draft_ms_per_round"], fast["verify_ms_per_round"]) == (2.0, 4.0)
    assert (fast["identical"], fast["texts"], fast["same_texts"]) == (True, 6, 6)
    assert fast["distinct_4grams"] == 1.0, "of the plain texts: 1 to 11"
    assert overall["drafter"] == "auto"
    assert overall["greedy"]["speedup"]["median"] == 4.0
    assert overall["greedy"]["mean_of_categories"] == 4.0
    assert "sampled" not in overall
    assert overall["by_drafter"]["fast"]["greedy"]["speedup"]["median"] == 2.0


def test_overall_is_time_over_time_and_not_a_mean_of_ratios():
    engine = FakeEngine()
    answer = engine.answer

    def slow_on_b(drafter, ids, params, max_tokens):
        found = answer(drafter, ids, params, max_tokens)
        factor = 9 if ids[1] == ord("b") and drafter == "fast" else 1
        return Answer(found.tokens, found.seconds * factor, found.stats)

    engine.answer = slow_on_b
    _, overall = rows_of(engine)
    fast = overall["by_drafter"]["fast"]["greedy"]
    assert fast["speedup"]["median"] == pytest.approx(8 / 20)
    assert fast["mean_of_categories"] == pytest.approx((2 + 2 / 9) / 2, abs=1e-3)


def test_a_shorter_text_is_compared_token_by_token():
    rows, _ = rows_of(FakeEngine(texts={"fast": range(1, 7)}))
    fast = next(r for r in rows if r["drafter"] == "fast")
    assert fast["speedup"]["median"] == 1.0, "half the tokens in half the time"
    assert not fast["identical"]


def test_runs_that_scatter_are_marked():
    rows, _ = rows_of(FakeEngine(slower_runs=(2,)), repeat=3)
    assert all(row["steady"] is False for row in rows)


def test_an_answer_of_one_token_has_no_speed():
    rows, overall = rows_of(FakeEngine(texts={name: [5] for name in (PLAIN, "fast", "auto")}))
    assert all(row["speedup"] is None and row["identical"] for row in rows)
    assert overall["greedy"]["speedup"] is None


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_a_difference_is_told_with_its_gap():
    def answer(*tokens):
        return Answer(tokens, 1.0, Stats())

    engine = FakeEngine()
    greedy = SamplingParams()
    same = compare(engine, [9], greedy, answer(1, 2), answer(1, 2))
    assert same == Comparison(True)
    assert not same.near_tie
    near = compare(engine, [9], greedy, answer(1, 2, 3), answer(1, 4, 3))
    assert (near.same, near.position, near.near_tie) == (False, 1, True)
    assert near.gap == pytest.approx(0.2)
    far = compare(engine, [9], greedy, answer(1, 2), answer(1, 40))
    assert (far.gap, far.near_tie) == (pytest.approx(3.8), False)
    ended = compare(engine, [9], greedy, answer(1, 2), answer(1))
    assert ended.gap == pytest.approx(0.2), "against the end of the text, which is id 0"
    drawn = compare(engine, [9, 9], SamplingParams(temperature=0.5, seed=3), answer(2), answer(4))
    noise = gumbel(3, 2, np.array([2, 4]))
    assert drawn.gap == pytest.approx(abs(0.2 + 0.5 * (noise[0] - noise[1])))
    engine.row_exact = True
    exact = compare(engine, [9], greedy, answer(1, 2, 3), answer(1, 4, 3))
    assert not exact.near_tie, "rows that compute the same cannot part"


@pytest.fixture
def ready(monkeypatch):
    """`draft.run` on a fake engine, whose registry has one drafter that cannot be opened."""
    engine = FakeEngine()
    monkeypatch.setattr(draft, "_open", lambda options: engine)
    monkeypatch.setattr(draft, "_known_drafters", lambda: ["none", "fast", "broken", "auto"])
    return engine


def test_run_writes_json_and_a_plot_and_prints_tables(ready, tmp_path, capsys):
    out, image = tmp_path / "draft.json", tmp_path / "draft.svg"
    result = draft.run(Options(limit=1, repeat=2, seeds=2), out, image)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    fields = {"category", "drafter", "schedule", "temperature", "speedup", "tokens_per_round"}
    assert all(fields | {"acceptance", "identical"} <= set(row) for row in result["rows"])
    assert len(result["rows"]) == 6 * 2 * 2
    assert result["overall"]["greedy"]["speedup"]["median"] == 4.0
    assert result["overall"]["sampled"]["speedup"]["median"] == 4.0
    assert result["left_out"] == {"broken": "it has another tokenizer"}
    assert (result["complete"], result["simulated"], result["peers"]) == (True, [], None)
    assert ready.closed
    shown = capsys.readouterr().out
    for part in ("4.00x", "rewrite", "temperature 0.8", "left out: broken: it has", "12 of 12"):
        assert part in shown, part
    drawn = xml.dom.minidom.parse(str(image))
    bars = [rect for rect in drawn.getElementsByTagName("rect") if rect.firstChild]
    assert len(bars) == len(result["rows"])


def test_texts_that_differ_are_said(ready, capsys):
    ready.texts = {"fast": [1, 2, 3, 5]}
    draft.run(Options(limit=1, repeat=1, temperatures=(0.0,)))
    out = capsys.readouterr().out
    assert "fast: 6 of 6 are not those of plain decoding; 6 of them part at a near-tie" in out
    assert "one run only" in out


def test_a_drafter_that_was_asked_for_must_work(ready):
    with pytest.raises(UnsupportedError, match="another tokenizer"):
        draft.run(Options(drafters=("broken",)))
    with pytest.raises(OptionError, match="always measured"):
        draft.run(Options(drafters=("none", "fast")))
    assert ready.closed


def test_an_answer_must_fit_into_the_context(ready):
    with pytest.raises(ContextLimitError, match="holds 1000"):
        draft.run(Options(max_tokens=990))


@pytest.mark.parametrize(
    "bad", [{"repeat": 0}, {"seeds": 0}, {"threads": 0}, {"max_tokens": 1}, {"temperatures": ()}]
)
def test_options_out_of_range(bad):
    with pytest.raises(OptionError):
        Options(**bad)


def test_a_simulation_needs_greedy_answers_and_says_so_before_it_loads(monkeypatch, capsys):
    monkeypatch.setattr(draft, "_open", lambda options: pytest.fail("the model was loaded"))
    assert main(["bench", "draft", "--simulate", "--temperatures", "0.8,1"]) == 2
    assert "add 0 to --temperatures" in capsys.readouterr().err
    assert Options(simulate=True, temperatures=(0.8, 0.0)).simulate


def simulated_row():
    """A row with 2 in every number."""
    values = {
        field.name: 2.0 if "float" in str(field.type) else 2 for field in fields(SimulatedRow)
    }
    return SimulatedRow(**{**values, "schedule": "optimistic"})


def test_simulated_figures_are_called_so(ready, monkeypatch, capsys):
    given = []

    def simulated(manifest, options, answers):
        given.extend(answers)
        return [asdict(row)]

    row = simulated_row()
    monkeypatch.setattr(draft, "simulated", simulated)
    options = Options(limit=2, repeat=2, simulate=True, categories=("json",))
    result = draft.run(options)
    assert result["simulated"] == [asdict(row)]
    shown = capsys.readouterr().out
    assert "SIMULATION" in shown
    assert "optimistic" in shown, "a schedule's name is never cut"
    texts = [prompt.text for prompt in load_prompts(["json"], 2)]
    assert given == [(ready.ids(text), tuple(range(1, 12))) for text in texts]


PEER = {"weights": "Q4_0", "category": "all", "distinct_4grams": 0.9, "steady": True}


def test_peers_are_shown_and_who_is_left_out(ready, monkeypatch, capsys):
    def measure_peers(drafter, tasks, eos, options, *callbacks):
        assert (drafter, eos, [task.category for task in tasks]) == ("auto", [0], ["copy"])
        speed = {"median": 1.5, "min": 1.4, "max": 1.6, "runs": [1.4, 1.6]}
        modes = {"plain": (120.0, None), "lookup": (180.0, speed)}
        rows = [
            {**PEER, "runtime": "peer", "mode": mode, "tok_s": {"median": rate}, "speedup": gain}
            for mode, (rate, gain) in modes.items()
        ]
        best = {"what": "plain decoding", "category": "all", "peer": "peer Q4_0 plain"}
        ratios = [{**best, "ratio": 2.5, "steady": False}]
        rows[1]["distinct_4grams"] = 0.3
        found = {"drafter": drafter, "rows": rows, "ratios": ratios}
        return {**found, "left_out": {"other": "not installed"}, "warnings": ["disturbed"]}

    monkeypatch.setattr(draft_peers, "measure_peers", measure_peers)
    options = Options(limit=1, repeat=1, categories=("copy",), peers=True)
    result = draft.run(options)
    assert set(result["peers"]) == {"drafter", "rows", "ratios"}
    shown = capsys.readouterr().out
    told = ("other: not installed", "disturbed", "peer Q4_0 go in circles")
    for part in ("180.0 (1.50x (1.40-1.60))", "~2.50x", *told):
        assert part in shown, part


def test_peers_that_cannot_be_measured_are_left_out(ready, monkeypatch):
    def measure_peers(*given):
        raise OptionError("no peer is installed")

    monkeypatch.setattr(draft_peers, "measure_peers", measure_peers)
    result = draft.run(Options(limit=1, repeat=1, categories=("copy",), peers=True))
    assert result["left_out"]["peers"] == "no peer is installed"
    assert result["rows"]


def test_the_simulation_runs_the_draft_model_on_the_answers(monkeypatch, tmp_path):
    given, closed = {}, []

    def open_drafter(name, context):
        given.update(name=name, threads=context.threads, spin=context.spin)
        return SimpleNamespace(close=lambda: closed.append(True))

    def simulate(manifest, recordings, drafter, progress):
        given["recordings"] = [(r.prompt, r.answer) for r in recordings]
        return [simulated_row()]

    monkeypatch.setattr(home, "find_bundle", lambda model: tmp_path)
    monkeypatch.setattr(registry, "open_drafter", open_drafter)
    monkeypatch.setattr(simulation, "simulate", simulate)
    rows = draft.simulated(SimpleNamespace(), Options(), [([1, 2], [3, 4])])
    assert rows == [asdict(simulated_row())]
    assert given == {
        "name": "model",
        "threads": 1,
        "spin": False,
        "recordings": [((1, 2), (3, 4))],
    }
    assert closed == [True]


@pytest.mark.parametrize(("speedup", "told"), [(1.06, False), (0.8, True)])
def test_a_disturbed_simulation_says_so(ready, monkeypatch, speedup, told):
    row = {**asdict(simulated_row()), "speedup": speedup, "replayed": 1.0}
    monkeypatch.setattr(draft, "simulated", lambda *given: [row])
    result = draft.run(Options(limit=1, repeat=1, simulate=True, categories=("json",)))
    assert any("off its own times" in line for line in result["warnings"]) == told


def test_no_draft_model_no_simulation(ready, monkeypatch):
    def simulated(manifest, options, answers):
        raise OptionError("there is no model drafter")

    monkeypatch.setattr(draft, "simulated", simulated)
    result = draft.run(Options(limit=1, repeat=1, simulate=True, categories=("json",)))
    assert result["simulated"] == []
    assert result["left_out"]["simulation"] == "there is no model drafter"


def test_the_legend_tells_the_limit_that_counts(monkeypatch):
    monkeypatch.setattr(draft_plot, "SCATTER_LIMIT", 0.35)
    assert "more than 35%" in draft_plot.plot({"rows": [], "model": "m"})


def test_plot_of_nothing_and_of_a_wrong_name(tmp_path):
    assert draft_plot.plot({"rows": [], "model": "m"}).startswith("<svg")
    with pytest.raises(OptionError, match=r"end in \.svg"):
        draft_plot.check_plot_path(tmp_path / "a.png")
    with pytest.raises(OptionError, match="not a folder"):
        draft_plot.check_plot_path(tmp_path / "no" / "a.svg")


def test_command(ready, monkeypatch, tmp_path, capsys):
    given = ["bench", "draft", "--limit", "1", "--repeat", "1", "--categories", "copy"]
    assert main([*given, "--temperatures", "0", "--drafters", "fast"]) == 0
    assert "2.00x" in capsys.readouterr().out
    assert main([*given, "--temperatures", "x"]) == 2
    assert main([*given, "--plot", str(tmp_path / "a.png")]) == 2
    real = draft_turns.measure
    monkeypatch.setattr(draft, "measure", lambda e, p, progress, stopped: real(e, p))
    monkeypatch.setattr(draft, "cancel_on_interrupt", FiredInterrupt)
    out = tmp_path / "part.json"
    assert main([*given, "--json", str(out)]) == 130
    assert json.loads(out.read_text())["complete"] is False


class FiredInterrupt:
    """Ctrl-C, as soon as there are figures."""

    fired = True

    def __init__(self, cancel):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def test_lists_on_the_command_line():
    assert names("--drafters", None) == ()
    assert names("--drafters", "a, b,a") == ("a", "b")
    assert numbers("--temperatures", "0,0.8") == (0.0, 0.8)
    for bad in ("", "a,", ","):
        with pytest.raises(OptionError):
            names("--drafters", bad)
    for bad in ("", "-1", "nan", "0;1"):
        with pytest.raises(OptionError):
            numbers("--temperatures", bad)


def test_notes_name_every_unsteady_figure():
    result = {
        "rows": [{"steady": False}, {"steady": True}],
        "warnings": ["busy"],
        "repeat": 3,
        "overall": {"by_drafter": {}},
        "left_out": {"head": "not trained"},
        "peers": None,
    }
    lines = draft_report.notes(result)
    assert lines[0] == "warning: busy"
    assert "marks 1 of 2 speed-ups" in lines[1]
    assert lines[2] == "left out: head: not trained"
