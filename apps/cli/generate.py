"""`forerun generate`: one prompt, streamed; or a file of prompts, resumable."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from forerun.apps.cli import cache_options, options
from forerun.apps.cli.answers import Answer, answer_json, collect, stats_line
from forerun.apps.cli.interrupt import cancel_on_interrupt
from forerun.apps.cli.output import emit, emit_answer, emit_json
from forerun.apps.cli.progress import Reporter, reporter
from forerun.apps.cli.report import Interrupted, note, note_lines
from forerun.errors import OptionError

if TYPE_CHECKING:
    from forerun.runtime.text import Text
    from forerun.runtime.types import SamplingParams

HELP = """Answer a prompt; the text is printed as it comes.

An instruction model gets the prompt through its chat template (--raw: as it is), a base model
continues the text. With --file, every line of a JSONL file is answered.

\b
forerun generate "Why is the sky blue?"
forerun generate "Write a haiku." --temperature 0.8 --top-p 0.95 --seed 7 --stats
git diff | forerun generate - --system "Describe this change." --max-tokens 80
forerun generate "Once upon a time" --raw --json
forerun generate "Correct the spelling: ..." --drafter ngram --stats
forerun generate "Summarise: ..." --kv int8 --kv-budget 64MB
forerun generate --file prompts.jsonl --out results.jsonl

\b
A line of prompts.jsonl: {"prompt": "...", "id": "a7", "system": "...", "max_tokens": 64, "seed": 3}
Only "prompt" is needed; "id" is the line number when absent. Run the same command again to go on
after an interruption: finished ids are skipped.
"""

_QUIET_S = 1.0

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="The prompt, or - to read it from standard input."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--file", metavar="JSONL", help="Answer every prompt of this file."),
]
ResultFile = Annotated[
    Path | None,
    typer.Option("--out", metavar="JSONL", help="Append the answers to this file."),
]
Logprobs = Annotated[bool, typer.Option("--logprobs", help="Log-probability of each token.")]
Raw = Annotated[bool, typer.Option("--raw", help="Leave the prompt as it is: no chat template.")]


@dataclass(frozen=True)
class Request:
    """What one run asks of the model, apart from the prompt.

    Attributes:
        sampling: how tokens are drawn.
        max_tokens: longest answer.
        stop: texts that end the answer.
        logprobs: whether log-probabilities are wanted.
        raw: whether the chat template is left out.
        system: instructions before the prompt.
        context: what happens when the context is full.
        drafter: name of what guesses ahead.
        accept: which guesses stay.
        device: where the model runs, and a draft model.
        allow_fallback: go on on the CPU if that device is missing or fails.
        cache: arguments of `forerun.load` about the KV cache and skipping.
    """

    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    raw: bool = False
    system: str | None = None
    context: Literal["error", "slide"] = "error"
    drafter: str = options.DEFAULT_DRAFTER
    accept: str = "match"
    device: str = "cpu"
    allow_fallback: bool = False
    cache: dict[str, Any] = field(default_factory=dict)

    def how_to_load(self) -> dict[str, Any]:
        """Arguments of `forerun.load` that this run asks for."""
        return {
            "drafter": self.drafter,
            "device": self.device,
            "allow_fallback": self.allow_fallback,
            "on_fallback": note,
            "on_placement": note_lines,
            **self.cache,
        }


def generate(
    prompt: Prompt = None,
    model: options.Model = options.DEFAULT_MODEL,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    system: options.System = None,
    raw: Raw = False,
    context: options.Context = "error",
    drafter: options.DrafterName = options.DEFAULT_DRAFTER,
    accept: options.Accept = "match",
    device: options.Device = "cpu",
    allow_fallback: options.AllowFallback = False,
    threads: options.Threads = None,
    kv: cache_options.KV = None,
    kv_budget: cache_options.KVBudget = None,
    window: cache_options.Window = None,
    skipping: cache_options.Skipping = "off",
    logprobs: Logprobs = False,
    as_json: options.Json = False,
    stats: options.StatsLine = False,
    file: PromptFile = None,
    out: ResultFile = None,
) -> None:
    """Answer a prompt or a file of prompts; `HELP` is what the user reads."""
    given = locals()
    request = _request(given)
    if file or out:
        if stats:
            raise OptionError("--stats is for one prompt; results of --file hold their figures")
        return _answer_file(prompt, file, out, model, threads, request, as_json)
    if prompt is None:
        raise OptionError("a prompt is needed: give it as text, - for standard input, or --file")
    _answer_one(options.prompt_text(prompt), model, threads, request, as_json, stats)


_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _request(given: dict[str, Any]) -> Request:
    if given["raw"] and given["system"] is not None:
        raise OptionError("--system needs the chat template, which --raw leaves out; drop one")
    if given["logprobs"] and not (given["as_json"] or given["file"]):
        raise OptionError("--logprobs are printed with --json only; add --json")
    # A batch must draw the same texts when it goes on, so its seed is never drawn.
    seed = 0 if given["file"] and given["seed"] is None else given["seed"]
    sampling = {name: given[name] for name in _SAMPLING}
    return Request(
        sampling=options.sampling_params(sampling, given["logit_bias"] or (), seed),
        max_tokens=given["max_tokens"],
        stop=options.stop_texts(given["stop"]),
        logprobs=given["logprobs"],
        raw=given["raw"],
        system=given["system"],
        context=options.context_policy(given["context"]),
        drafter=given["drafter"],
        accept=options.accept_rule(given["accept"], given["drafter"]),
        device=options.devices(given["device"], given["drafter"]),
        allow_fallback=given["allow_fallback"],
        cache=cache_options.cache_arguments(given),
    )


def answer(
    text: Text, prompt: str, request: Request, show: Reporter, on_text: Any = str
) -> tuple[Answer, bool]:
    """Answer one prompt; Ctrl-C cancels within one step.

    Returns:
        The answer, and whether Ctrl-C ended it.
    """

    def on_piece(piece: str) -> None:
        show.close()
        on_text(piece)

    with cancel_on_interrupt(text.cancel) as interrupt:
        events = text.stream(
            prompt,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            logprobs=request.logprobs,
            raw=request.raw,
            system=request.system,
            context=request.context,
            accept=request.accept,
            on_prefill=lambda done, total: show("prefill", done, total),
        )
        if interrupt.fired:
            # Ctrl-C came while the prompt was being prepared, before there was something to end.
            text.cancel()
        return collect(events, on_piece), interrupt.fired


def _answer_one(
    prompt: str,
    model: str,
    threads: int | None,
    request: Request,
    as_json: bool,
    stats: bool,
) -> None:
    from forerun.runtime.load import load

    with (
        reporter(_QUIET_S) as show,
        load(model, threads=threads, **request.how_to_load()) as text,
    ):
        done, interrupted = answer(text, prompt, request, show, str if as_json else emit_answer)
    if as_json:
        fields = answer_json(done, request.sampling.seed, request.logprobs)
        emit_json({**fields, "model": model})
    elif not done.text.endswith("\n"):
        emit("\n")
    if stats:
        note(stats_line(done.stats))
    if interrupted:
        raise Interrupted(f"interrupted after {len(done.tokens)} tokens")
    if done.finish_reason == "context":
        note("the answer ends here because the context is full; --context slide goes on")


def _answer_file(
    prompt: str | None,
    file: Path | None,
    out: Path | None,
    model: str,
    threads: int | None,
    request: Request,
    as_json: bool,
) -> None:
    from forerun.apps.cli.batch import BatchError, run_batch

    if prompt is not None or file is None or out is None:
        raise OptionError("a batch needs both --file and --out, and no PROMPT beside them")
    summary = run_batch(file, out, model, threads, request)
    if as_json:
        emit_json(summary)
    if summary["failed"]:
        raise BatchError(
            f"{summary['failed']} of {summary['prompts']} prompts have an error in {out} instead "
            "of an answer"
        )
