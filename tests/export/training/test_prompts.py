from collections import Counter
from itertools import islice

from forerun.export.training.prompts import prompt_batches, templates


def encode(text):
    return list(text.encode())


def batches(seed, count=40):
    return list(islice(prompt_batches(seed, 32, encode), count))


def test_there_are_many_kinds_of_templates():
    rows = templates()
    kinds = Counter(category for category, _, _ in rows)
    assert len(rows) >= 120 and len(kinds) >= 15
    assert len({text for _, text, _ in rows}) == len(rows)


def test_the_seed_alone_decides():
    assert batches(3) == batches(3)
    assert batches(3) != batches(4)


def test_whole_templates_are_held_out_and_come_first():
    flat = [p for batch in batches(0) for p in batch]
    held = [p.held_out for p in flat]
    assert held == sorted(held, reverse=True) and any(held) and not all(held)
    unseen = {p.template for p in flat if p.held_out}
    assert unseen.isdisjoint(p.template for p in flat if not p.held_out)
    assert len(unseen) == sum(held_out for _, _, held_out in templates())
    assert all(p.greedy for p in flat if p.held_out)


def test_a_third_is_greedy_and_nothing_comes_twice():
    flat = [p for batch in batches(1, 60) for p in batch if not p.held_out]
    assert 0.25 < sum(p.greedy for p in flat) / len(flat) < 0.42
    filled = [bytes(p.ids) for p in flat if "{" in templates()[p.template][1]]
    assert len(set(filled)) == len(filled)


def test_prompts_of_like_length_share_a_batch():
    spread = [max(map(len, ids)) - min(map(len, ids)) for ids in lengths(batches(0)[6:38])]
    assert sum(spread) / len(spread) < 90


def lengths(groups):
    return [[p.ids for p in group] for group in groups]


def test_too_long_prompts_are_left_out():
    flat = [p for batch in islice(prompt_batches(0, 32, encode, 50), 20) for p in batch]
    assert max(len(p.ids) for p in flat) <= 50
