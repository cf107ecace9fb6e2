"""Pictures of quality: what is drawn, what is refused, and labels that cover nothing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.apps.bench import quality_plot
from forerun.apps.bench.plot_labels import choose_place
from forerun.apps.bench.quality_plot import check_plot, write_quality_plot
from forerun.apps.bench.quality_points import common_depth, read_saved, shared_weights, to_points
from forerun.errors import OptionError

FRAME = (0.0, 0.0, 1000.0, 800.0)


def row(label, kl, **more):
    about = {"model": "m", "label": label, "kl_mean": kl, "weight_bytes": 90e6}
    speed = {"median": 90.0, "min": 80.0, "max": 95.0}
    return {**about, "kv_bytes_per_token": 46080, "decode_tok_s": speed, **more}


ROWS = [
    row("fp32", 0.0, weight_bytes=540e6),
    row("int8", 0.002, decode_tok_s={"median": 60.0}),
    row("int4", 0.31),
    row("int4, KV int8", 0.311, kv="int8", kv_bytes_per_token=11520),
    row("int4, window 512", 0.9, window=512),
    row("int4, skip 0.1", 0.34, ffn_skip="0.1"),
    row("int4, skip 0.3", 0.61, ffn_skip="0.3"),
]
PEER = {"runtime": "llama.cpp", "weights": "Q4_0", "bytes": 92e6, "kl_mean": 0.42, "model": "m"}
PEER["kv_bytes_per_token"] = 23040


def test_points_count_weights_and_the_cache():
    points = {point.label: point for point in to_points([*ROWS, PEER])}
    assert points["int4"].megabytes == pytest.approx(90 + 4096 * 46080 / 1e6)
    assert points["KV int8"].megabytes == pytest.approx(90 + 4096 * 11520 / 1e6)
    assert points["window 512"].megabytes == pytest.approx(90 + 512 * 46080 / 1e6)
    families = {label: point.family for label, point in points.items()}
    assert families == {
        "fp32": "weights",
        "int8": "weights",
        "int4": "weights",
        "KV int8": "kv",
        "window 512": "kv",
        "skip 0.1": "skip",
        "skip 0.3": "skip",
        "llama.cpp Q4_0": "peer",
    }
    assert points["llama.cpp Q4_0"].is_other_text and not points["llama.cpp Q4_0"].tok_s


def test_labels_keep_the_weights_where_they_differ():
    labels = [p.label for p in to_points([row("int4, KV int8", 1, kv="int8"),
                                          row("int8, KV int8", 1, kv="int8")])]  # fmt: skip
    assert labels == ["int4, KV int8", "int8, KV int8"]


def test_the_layout_is_told_of_weights_whose_own_is_another():
    exact = row("int4-exact", 0.04, kv_bytes_per_token=11520)
    named = {**exact, "label": "int8-rows", "kv_layout": "int8"}
    usual = [{**one, "kv_layout": "fp32"} for one in ROWS[:3]]
    labels = [point.label for point in to_points([*usual, named])]
    assert labels == ["fp32", "int8", "int4", "int8-rows, KV int8"]
    # A file that names no layout is read with the rows that name it.
    with_kv = [*ROWS, row("int4, KV fp32", 0.31, kv="fp32"), exact]
    assert [point.label for point in to_points(with_kv)][-1] == "int4-exact, KV int8"
    assert [point.label for point in to_points([*ROWS[:3], exact])][-1] == "int4-exact"
    other = {**exact, "model": "n"}
    assert [point.label for point in to_points([*with_kv[:-1], other])][-1] == "int4-exact"


def timed(label, **rates):
    by_depth = {depth.removeprefix("at"): {"median": rate} for depth, rate in rates.items()}
    return row(label, 0.1, decode_by_depth=by_depth)


def test_speeds_are_those_of_the_largest_depth_that_all_have():
    points = to_points([timed("int4", at64=9, at1024=8), timed("int8", at64=7, at1024=6, at4096=5)])
    assert common_depth(points) == "1024"
    assert [point.tok_s["1024"] for point in points] == [8, 6]
    assert common_depth(to_points([timed("int4", at64=9), timed("int8", at1024=7)])) is None
    assert common_depth(to_points([row("int4", 0.1), timed("int8", at1024=7)])) is None
    assert common_depth(to_points([row("int4", 0.1)])) == ""
    assert common_depth([]) is None


def test_weights_are_shared_or_not():
    assert shared_weights(to_points(ROWS)) == "int4"
    assert shared_weights(to_points([*ROWS, row("int8, KV int8", 0.1, kv="int8")])) is None
    assert shared_weights(to_points(ROWS[:3])) is None


def drawn_texts(monkeypatch, rows, path):
    """Labels of the axes, texts within them, and words of the legend of a picture."""
    from matplotlib.figure import Figure

    texts = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        for axes in self.axes:
            texts.append(axes.get_xlabel())
            texts.extend(text.get_text() for text in axes.texts)
        texts.extend(text.get_text() for legend in self.legends for text in legend.get_texts())
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    write_quality_plot(rows, path)
    return texts


def test_the_picture_says_depth_layouts_and_weights(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = [{**timed(one["label"], at64=9, at1024=8), **{k: v for k, v in one.items()
             if k != "decode_tok_s"}} for one in ROWS]  # fmt: skip
    texts = drawn_texts(monkeypatch, rows, tmp_path / "a.png")
    assert "decoding at depth 1,024, tokens per second" in texts
    assert {"KV cache (int4 weights)", "skipped feed-forward blocks (int4 weights)"} <= set(texts)
    mixed = [*rows, {**timed("int8, KV int8", at64=5), "kv": "int8"}]
    texts = drawn_texts(monkeypatch, mixed, tmp_path / "b.png")
    assert "decoding at depth 64, tokens per second" in texts
    assert "KV cache" in texts and "int8, KV int8" in texts
    texts = drawn_texts(monkeypatch, [*rows, timed("int8", at7=1)], tmp_path / "c.png")
    assert "speeds were measured at different depths" in texts
    assert "decoding, tokens per second" in drawn_texts(monkeypatch, ROWS, tmp_path / "d.png")


def test_our_own_rows_of_bench_quality_are_left_out():
    ours = {**PEER, "runtime": "forerun"}
    assert [p.label for p in to_points([ours, PEER])] == ["llama.cpp Q4_0"]
    with pytest.raises(OptionError, match="nothing to draw"):
        to_points([ours])


def test_what_was_not_measured_is_refused():
    with pytest.raises(OptionError, match=r"int4 cannot be drawn.*--against"):
        to_points([row("int4", None)])


@pytest.mark.parametrize("text", ["[]", "{", '{"rows": []}', '{"rows": [1]}', '{"a": 1}'])
def test_files_that_hold_no_figures(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"x\.json"):
        read_saved(path)


def test_saved_rows_of_both_commands(tmp_path):
    one, many, bench = (tmp_path / f"{i}.json" for i in range(3))
    one.write_text(json.dumps(ROWS[1]))
    many.write_text(json.dumps({"rows": ROWS}))
    peer = {key: value for key, value in PEER.items() if key != "model"}
    bench.write_text(json.dumps({"model": "m", "rows": [peer]}))
    rows = [row for path in (one, many, bench) for row in read_saved(path)]
    assert rows == [ROWS[1], *ROWS, PEER]
    with pytest.raises(OptionError, match="cannot be read"):
        read_saved(tmp_path / "absent.json")


def test_the_picture_has_two_panels_a_model_and_is_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = []
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", [*ROWS, row("x", 0.1, model="n"), PEER])):
        path = tmp_path / f"{name}.png"
        write_quality_plot(rows, path)
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(tuple(int.from_bytes(data[i : i + 4], "big") for i in (16, 20)))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sizes[0] == (1950, 990) and sizes[2] == (1950, 1980)


def test_no_label_covers_another_or_a_point(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    seen = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        renderer = self.canvas.get_renderer()
        for axes in self.axes:
            texts = [text.get_window_extent(renderer) for text in axes.texts]
            marks = [line.get_transform().transform(line.get_xydata()) for line in axes.lines
                     if line.get_marker() not in ("None", None, "")]  # fmt: skip
            places = [axes.transData.transform((line.get_xdata()[0], 1))[0] for line in axes.lines
                      if line.get_linestyle() == "--"]  # fmt: skip
            assert len(places) == 1, "the reference"
            assert not any(text.x0 < places[0] < text.x1 for text in texts)
            seen.append((texts, [mark for group in marks for mark in group]))
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    crowd = [row(f"int4, KV number {i}", 0.3 + i / 1000, kv="x") for i in range(9)]
    write_quality_plot([*ROWS, *crowd], tmp_path / "a.png")
    assert len(seen) == 2
    for texts, marks in seen:
        assert len(texts) == len(ROWS) + len(crowd)
        for index, text in enumerate(texts):
            assert not any(text.overlaps(other) for other in texts[index + 1 :])
            assert not any(text.contains(*mark) for mark in marks)


def test_matplotlib_is_asked_for_by_name(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(quality_plot.importlib, "import_module", absent)
    with pytest.raises(OptionError, match=r'pip install "forerun\[plot\]"'):
        check_plot(tmp_path / "a.png")


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OptionError, match=r"must end in \.png"):
        check_plot(tmp_path / "a.svg")
    with pytest.raises(OptionError, match="not a folder"):
        check_plot(tmp_path / "none" / "a.png")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(150, 850), st.floats(150, 650)), min_size=1, max_size=12))
def test_a_free_place_is_found_near_a_point(spots):
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    left, bottom, _ = choose_place(spots[0], (70, 12), taken, FRAME, 12)
    box = (left, bottom, left + 70, bottom + 12)
    for other in taken:
        assert not (box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and
                    other[1] < box[3])  # fmt: skip
    assert abs(left - spots[0][0]) < 250 and abs(bottom - spots[0][1]) < 250


def test_the_first_place_is_to_the_right():
    left, bottom, ring = choose_place((500, 400), (60, 10), [], FRAME, 8)
    assert (left, bottom, ring) == (508, 395, 0)
    left, *_ = choose_place((990, 400), (60, 10), [], FRAME, 8)
    assert left + 60 < 990, "at the right edge it goes to the left"
