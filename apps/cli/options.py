"""Options that several commands share, their ranges, and what is checked before a model loads."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from forerun.apps.cli.report import note
from forerun.devices.request import parse_devices
from forerun.errors import OptionError, PromptError

if TYPE_CHECKING:
    from forerun.runtime.types import SamplingParams

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_DRAFTER = "default"
# Of `forerun.runtime.load`, which takes too long to import for a help text.
MAX_THREADS = 1024

Model = Annotated[
    str,
    typer.Option("--model", metavar="NAME|PATH", help="A pulled model, NAME:fp32, or a bundle."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Stop after this many tokens of the answer.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="0 always takes the most probable token."),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", min=0, help="Keep the K most probable tokens; 0 keeps all."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, help="Keep this probability mass; 1 keeps all."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", min=0.0, max=1.0, help="Keep tokens at this share of the best one."),
]
TypicalP = Annotated[
    float | None,
    typer.Option("--typical-p", min=0.0, max=1.0, help="Locally typical sampling; 1 is off."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", min=0.0, help="Above 1 avoids seen tokens; 1 is off."),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option("--presence-penalty", help="Taken once from tokens the answer already has."),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option("--frequency-penalty", help="Taken per occurrence in the answer so far."),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="ID=VALUE", help="Add VALUE to a token; repeatable."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Same seed, same text. Without one, sampling draws a new seed."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the answer before this text; repeatable."),
]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="Instructions that stand before the prompt."),
]
Context = Annotated[
    str,
    typer.Option(
        "--context", metavar="error|slide", help="When the context is full: end, or drop old text."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=MAX_THREADS,
        help="Threads to compute with; chosen by a probe if absent.",
    ),
]
DrafterName = Annotated[
    str,
    typer.Option(
        "--drafter",
        metavar="NAME|PATH",
        show_default="auto where it cannot change the text (int4-exact), else none; "
        "with --device auto what was measured to be best",
        help="Guess ahead, several tokens at a time, with the same text: ngram, recycle, "
        "ngram+recycle, head, model, model+ngram, skip, auto, or a drafter's folder; none turns "
        "it off.",
    ),
]
Accept = Annotated[
    str,
    typer.Option(
        "--accept",
        metavar="match|relaxed",
        help="Which guesses stay: match is exact; relaxed is lossy, it keeps typical ones too.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME|auto",
        help="Where the model runs, see forerun devices; target=NAME,draft=NAME places a draft "
        "model too.",
    ),
]
AllowFallback = Annotated[
    bool,
    typer.Option("--allow-fallback", help="Go on on the CPU if the model's device fails."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
StatsLine = Annotated[bool, typer.Option("--stats", help="Print the measured figures to stderr.")]
Capacity = Annotated[
    int | None,
    typer.Option("--capacity", min=1, metavar="TOKENS", help="Longest sequence of the bundle."),
]


def sampling_params(
    given: dict[str, float | None],
    logit_bias: Sequence[str] = (),
    seed: int | None = None,
    defaults: dict[str, float] | None = None,
) -> SamplingParams:
    """Build the parameters of one run from options of which most are absent.

    Args:
        given: option values by field name of `SamplingParams`; None means it was not given.
        logit_bias: ``ID=VALUE`` texts.
        seed: the seed, or None to draw one if anything is random.
        defaults: values for what was not given, e.g. the model's own recommendation.

    Raises:
        OptionError: a value is not finite, negative where it may not be, or not ``ID=VALUE``.
    """
    from forerun.runtime.types import SamplingParams

    chosen: dict[str, float] = {}
    for name, value in given.items():
        if value is None:
            value = (defaults or {}).get(name)
        if value is None:
            continue
        if not math.isfinite(value):
            option = name.replace("_", "-")
            raise OptionError(f"--{option} is {value}; a finite number is needed")
        chosen[name] = int(value) if name == "top_k" else float(value)
    if chosen.get("repetition_penalty", 1.0) <= 0:
        raise OptionError("--repetition-penalty must be above 0; 1 is off")
    if seed is None:
        seed = secrets.randbits(32) if chosen.get("temperature", 0.0) > 0 else 0
    return SamplingParams(
        **chosen,  # type: ignore[arg-type]
        logit_bias=dict(_bias(text) for text in logit_bias),
        seed=seed,
    )


def _bias(text: str) -> tuple[int, float]:
    token, separator, value = text.partition("=")
    try:
        pair = int(token), float(value)
    except ValueError:
        separator = ""
        pair = 0, 0.0
    if not separator or pair[0] < 0 or math.isnan(pair[1]):
        raise OptionError(f"--logit-bias {text!r} is not ID=VALUE, e.g. 42=-5")
    return pair


def context_policy(value: str) -> Literal["error", "slide"]:
    """Return the policy for a full context.

    Raises:
        OptionError: it is neither ``error`` nor ``slide``.
    """
    if value not in ("error", "slide"):
        raise OptionError(f"--context {value!r} is not known; it can be error or slide")
    return cast(Literal["error", "slide"], value)


def accept_rule(value: str, drafter: str) -> str:
    """Return the accept rule; a lossy one is told on stderr.

    Raises:
        OptionError: there is no such rule, or no drafter whose guesses it could accept.
    """
    if value not in ("match", "relaxed"):
        raise OptionError(f"--accept {value!r} is not known; it can be match or relaxed")
    if value == "relaxed":
        if drafter in ("none", DEFAULT_DRAFTER):
            raise OptionError("--accept relaxed needs a drafter; add --drafter, e.g. ngram")
        note("--accept relaxed is lossy: the text may differ from what the model itself would say")
    return value


def devices(value: str, drafter: str) -> str:
    """Return the devices; a place for a drafter that there is none of is refused.

    Raises:
        OptionError: the text is no choice of devices, or places a draft model without naming one.
    """
    placed = parse_devices(value).draft
    if placed not in (None, "cpu") and drafter in ("none", DEFAULT_DRAFTER):
        raise OptionError(
            f"--device draft={placed} places a draft model, and there is none; add --drafter model"
        )
    return value


def stop_texts(texts: Sequence[str] | None) -> tuple[str, ...]:
    """Return the stop texts.

    Raises:
        OptionError: one of them is empty, which would end every answer at once.
    """
    if texts and not all(texts):
        raise OptionError("--stop was given an empty text; it needs at least one character")
    return tuple(texts or ())


def prompt_text(prompt: str) -> str:
    """Return the prompt as given, or all of standard input for ``-``.

    One line end at the end of standard input is dropped: it is the shell's, not the writer's.

    Raises:
        PromptError: the prompt is empty or is not UTF-8.
    """
    if prompt != "-":
        return checked_text(prompt, "the prompt")
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"standard input is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}); "
            "convert it first"
        ) from None
    text = text[:-1] if text.endswith("\n") else text
    return checked_text(text.removesuffix("\r"), "standard input")


def checked_text(text: str, where: str) -> str:
    """Return the text if it is a usable prompt.

    Raises:
        PromptError: it is empty, or holds bytes that are not UTF-8.
    """
    if not text:
        raise PromptError(f"{where} is empty; give at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptError(f"{where} is not UTF-8 text; convert it first") from None
    return text
