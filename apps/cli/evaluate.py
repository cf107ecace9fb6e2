"""`forerun evaluate`: what bundles are worth, alone or beside a reference, as table or picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.apps.cli import options
from forerun.apps.cli.output import emit_json, emit_table
from forerun.apps.cli.progress import reporter
from forerun.errors import OptionError

if TYPE_CHECKING:
    from forerun.quant.evaluate import Judged, Plan

HELP = """Measure what bundles are worth and what they cost.

Perplexity, recall from afar, size, speed and memory; with --against also the distance from that
bundle: KL divergence, the same best token, and how long greedy answers stay the same. The text is
built in: prose, reference text and code, all in the public domain.

\b
forerun evaluate smollm2-135m --against smollm2-135m:fp32
forerun evaluate smollm2-135m --against smollm2-135m:fp32 --kv fp32,int8,int4 --json
forerun evaluate smollm2-135m smollm2-135m:int8 --against smollm2-135m:fp32 --plot cost.png
forerun evaluate --from weights.json --from kv.json --plot cost.png

With several bundles, layouts or shares every combination is a row. Speed and memory are those of a
process of its own for each row, by turns.
"""

Bundles = Annotated[
    list[str] | None,
    typer.Argument(metavar="BUNDLE...", help="Bundles, or the NAMES of pulled models."),
]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="BUNDLE", help="The reference for KL and agreement."),
]
Layouts = Annotated[
    str | None,
    typer.Option("--kv", metavar="NAME,NAME,...", help="KV layouts; a bundle's default if absent."),
]
Skips = Annotated[
    str | None,
    typer.Option(
        "--skipping",
        metavar="SHARE,SHARE,...",
        help="Shares of the feed-forward blocks that decoding skips, or rules such as static:0.1, "
        "or default, or off.",
    ),
]
KvWindows = Annotated[
    str | None,
    typer.Option(
        "--window",
        metavar="N,N,...",
        help="Rows of a cache of first and newest tokens only, or off.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", help="Draw quality against bytes and speed."),
]
Saved = Annotated[
    list[Path] | None,
    typer.Option(
        "--from",
        metavar="FILE.json",
        help="Rows of an earlier --json, or of bench quality --json; repeatable.",
    ),
]
Windows = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="N,N,...",
        show_default="512,2048, as far as the bundle reaches",
        help="Tokens the model sees at once.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        min=16,
        show_default="9216",
        help="Tokens of text to measure on; at least one piece of each text and context.",
    ),
]
SpeedDepths = Annotated[
    str | None,
    typer.Option(
        "--speed-depths",
        metavar="N,N,...",
        show_default="64,1024, as far as the bundle reaches",
        help="Cached tokens at which decoding is timed.",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        min=0,
        max=100,
        show_default="2, with --quick 1",
        help="Processes by turns for speed and memory; 0 leaves both out.",
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Your own UTF-8 text, not the built-in ones."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=options.MAX_THREADS,
        show_default="one per core, 8 at most",
        help="Threads of every session, for quality and for speed.",
    ),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Measure less: coarser figures in a fraction of the time.")
]

_COLUMNS = {
    "perplexity": "perplexity",
    "kl_mean": "KL",
    "kl_p99": "KL p99",
    "top1_agreement": "top-1",
    "agreement_tokens": "agreement",
    "recall": "recall %",
    "bytes_per_weight": "B/weight",
    "kv_bytes_per_token": "KV B/token",
    "decode_tok_s": "tok/s",
    "peak_rss_mb": "peak MB",
}
# What a nested figure is shortened to in a table.
_PART = {"agreement_tokens": "mean", "decode_tok_s": "median"}
_HIDDEN = ("by_context", "by_text", "recall_by_depth_against", "decode_by_depth", "model", "label")

# Options that say how a bundle is measured, by the names of their parameters.
_MEASURING = {
    "against": "--against",
    "kv": "--kv",
    "ffn_skip": "--skipping",
    "window": "--window",
    "context": "--context",
    "tokens": "--tokens",
    "text": "--text",
    "speed_depths": "--speed-depths",
    "rounds": "--rounds",
    "quick": "--quick",
    "threads": "--threads",
}


def evaluate(
    bundles: Bundles = None,
    against: Against = None,
    kv: Layouts = None,
    ffn_skip: Skips = None,
    window: KvWindows = None,
    plot: Plot = None,
    saved: Saved = None,
    context: Windows = None,
    tokens: Tokens = None,
    text: TextFile = None,
    speed_depths: SpeedDepths = None,
    rounds: Rounds = None,
    quick: Quick = False,
    threads: Threads = None,
    as_json: options.Json = False,
) -> None:
    """Evaluate bundles; `HELP` is what the user reads."""
    given = locals()
    from forerun.apps.bench.quality_plot import check_plot, write_quality_plot
    from forerun.apps.bench.quality_points import read_saved

    _check_given(bundles, saved, plot, against)
    if not bundles:
        _check_unmeasured(given)
    if plot:
        check_plot(plot)
    rows = [row for path in saved or () for row in read_saved(path)]
    if bundles:
        from forerun.devices.home import find_bundle
        from forerun.quant.evaluate import evaluate_all

        judged = _rows(bundles, kv, ffn_skip, window, threads)
        reference = find_bundle(against) if against else None
        plan = _plan(context, tokens, text, quick, judged, reference)
        plan = _timed(plan, speed_depths, rounds)
        with reporter() as show:
            rows += evaluate_all(judged, reference, plan=plan, progress=show)
    if plot:
        write_quality_plot(rows, plot)
    if as_json:
        emit_json(rows[0] if len(rows) == 1 else {"rows": rows})
    else:
        _show(rows)


def _check_given(
    bundles: list[str] | None, saved: list[Path] | None, plot: Path | None, against: str | None
) -> None:
    if not bundles and not saved:
        raise OptionError("name a BUNDLE, or rows that were saved with --from FILE.json")
    if saved and not plot:
        raise OptionError("--from needs --plot FILE.png: saved rows are only drawn")
    if bundles and plot and not against:
        raise OptionError("--plot needs --against BUNDLE: it draws the distance from that")


def _check_unmeasured(given: dict[str, Any]) -> None:
    """Refuse options that say how to measure where nothing is."""
    useless = [
        option
        for name, option in _MEASURING.items()
        if given[name] is not None and given[name] is not False
    ]
    if useless:
        verb = "needs" if len(useless) == 1 else "need"
        raise OptionError(
            f"{', '.join(useless)} {verb} a BUNDLE; the rows of --from are measured already"
        )


def _rows(
    bundles: list[str],
    kv: str | None,
    ffn_skip: str | None,
    window: str | None,
    threads: int | None,
) -> list[Judged]:
    """Every combination of bundle, KV layout, window and skipping."""
    from forerun.devices.home import find_bundle
    from forerun.quant.evaluate import Judged

    shares = [None if word == "off" else word for word in _list("--skipping", ffn_skip)]
    windows = [None if word == "off" else word for word in _list("--window", window)]
    rows = [None if word is None else _number("--window", word) for word in windows]
    return [
        Judged(find_bundle(bundle), layout, share, size, threads)
        for bundle in bundles
        for layout in _list("--kv", kv)
        for size in rows
        for share in shares
    ]


def _list(option: str, text: str | None) -> list[Any]:
    if text is None:
        return [None]
    words = [word.strip() for word in text.split(",")]
    if "" in words or len(set(words)) < len(words):
        raise OptionError(f"{option} {text!r} must be different names with commas between")
    return words


def _number(option: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise OptionError(f"{option} must be numbers such as 512,2048, got {word!r}") from None


def _plan(
    context: str | None,
    tokens: int | None,
    text: Path | None,
    quick: bool,
    judged: list[Judged],
    reference: Path | None,
) -> Plan:
    from forerun.quant.evaluate import QUICK, Judged, Plan, contexts_within

    plan = QUICK if quick else Plan()
    if context is None:
        everyone = [*judged, Judged(reference)] if reference else judged
        contexts = contexts_within(everyone, plan.contexts)
    else:
        contexts = tuple(_number("--context", word) for word in _list("--context", context))
    given = plan.tokens if tokens is None else tokens
    if tokens is None:
        # Who asks for a long context wants at least one of it.
        given = max(given, *contexts)
    return dataclasses.replace(plan, contexts=contexts, tokens=given, text=text)


def _timed(plan: Plan, depths: str | None, rounds: int | None) -> Plan:
    plan = plan if rounds is None else dataclasses.replace(plan, rounds=rounds)
    if depths is None:
        return plan
    if not plan.rounds:
        raise OptionError("--speed-depths needs --rounds of 1 or more: nothing would be timed")
    numbers = tuple(_number("--speed-depths", word) for word in _list("--speed-depths", depths))
    if min(numbers) < 1:
        raise OptionError(f"--speed-depths must be from 1 on, got {min(numbers)}")
    return dataclasses.replace(plan, speed_depths=numbers)


def _show(rows: list[dict[str, Any]]) -> None:
    if len(rows) == 1 and "runtime" not in rows[0]:
        fields = ((k, v) for k, v in rows[0].items() if k not in _HIDDEN)
        emit_table(("measure", "value"), [(k, _cell(k, v)) for k, v in fields])
        return
    table = [
        (
            row.get("label") or f"{row.get('runtime', '')} {row.get('weights', '')}".strip(),
            *(_cell(name, row.get(name)) for name in _COLUMNS),
        )
        for row in rows
    ]
    emit_table(("method", *_COLUMNS.values()), table)


def _cell(name: str, value: Any) -> Any:
    """One cell: a list as words, a nested figure as its best-known part."""
    if name == "recall_by_depth":
        return ", ".join(f"{depth}: {one['recall']:.0f} %" for depth, one in value.items())
    if isinstance(value, dict):
        return value.get(_PART.get(name, "median"))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value
