import pytest

from forerun.apps.bench import plan
from forerun.errors import OptionError

IDS = list(range(20_000))


def test_every_depth_and_run_has_a_turn_and_a_warm_up():
    made = plan.make_plan(IDS, [0, 512, 1900], 3)
    assert set(made) == {(depth, run) for depth in (0, 512, 1900) for run in (-1, 0, 1, 2)}


def test_prompts_have_the_promised_lengths():
    made = plan.make_plan(IDS, [0, 512, 1900], 2)
    assert [len(part.prompt) for part in made[1900, 0]] == [1900]
    first, decode = made[0, 0]
    assert (len(first.prompt), first.tokens) == (20, 1)
    assert (len(decode.prompt), decode.tokens) == (16, 64)


def test_without_depth_512_its_prefill_is_measured_at_depth_0():
    parts = plan.make_plan(IDS, [0, 100], 1)[0, 0]
    assert [len(part.prompt) for part in parts if "prefill" in part.gives] == [512]


def test_no_two_prompts_begin_alike():
    made = plan.make_plan(IDS, [0, 512], 4)
    for depth in (0, 512):
        begins = [part.prompt[:8] for run in range(-1, 4) for part in made[depth, run]]
        assert len(set(begins)) == len(begins)


def test_a_short_text_is_refused():
    with pytest.raises(OptionError, match="too few for depth 1900"):
        plan.make_plan(IDS[:1903], [1900], 5)


def test_the_context_holds_the_longest_measure():
    for depths in ([0], [512], [0, 1900], [4000]):
        made = plan.make_plan(IDS, depths, 1)
        needed = max(len(p.prompt) + p.tokens for turn in made.values() for p in turn)
        assert plan.context_for(depths) >= needed
