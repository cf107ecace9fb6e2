"""`forerun chat`: a conversation at the terminal, or from a pipe line by line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.apps.cli import cache_options, options
from forerun.apps.cli.answers import collect, stats_line
from forerun.apps.cli.interrupt import cancel_on_interrupt
from forerun.apps.cli.output import emit, emit_answer, to_json
from forerun.apps.cli.progress import reporter
from forerun.apps.cli.report import note, note_lines
from forerun.errors import ForerunError, OptionError

if TYPE_CHECKING:
    from forerun.runtime.chat import Chat
    from forerun.runtime.text import Text

HELP = '''Talk with a model; it remembers the conversation.

End a line with \\ to go on in the next one, or write several lines between two lines of """.
Ctrl-C stops the answer and keeps the chat, Ctrl-D leaves. Sampling options that are not given
take the values the model's authors recommend.

\b
forerun chat
forerun chat --system "You are a pirate." --temperature 0.7 --stats
forerun chat --kv int4                  # an eighth of the memory for the conversation
forerun chat --window 2048              # a conversation without end
printf 'What is 2+2?\\nAnd 3+3?\\n' | forerun chat

\b
In the chat: /help, /reset, /system TEXT, /save FILE, /exit.
'''

_QUIET_S = 1.0
_BLOCK = '"""'
_HISTORY_LINES = 1000


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    system: options.System = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
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
    stats: options.StatsLine = False,
) -> int:
    """Talk with a model; `HELP` is what the user reads."""
    cache = cache_options.cache_arguments(locals())
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = {name: value for name, value in locals().items() if name in names}
    options.sampling_params(sampling, (), seed)
    rule = options.accept_rule(accept, drafter)
    policy, stops = options.context_policy(context), options.stop_texts(stop)
    from forerun.runtime.load import load

    where: dict[str, Any] = {
        "device": options.devices(device, drafter),
        "allow_fallback": allow_fallback,
    }
    where |= cache
    where |= {"drafter": drafter, "on_fallback": note, "on_placement": note_lines}
    with reporter(_QUIET_S) as show, load(model, threads=threads, **where) as text:
        show.close()
        params = options.sampling_params(sampling, (), seed, text.manifest.generation)
        how = {"sampling": params, "max_tokens": max_tokens, "stop": stops, "context": policy}
        how["accept"] = rule
        talk = Conversation(text.chat(system=system), how, stats)
        with _terminal_history() as interactive:
            if interactive:
                note(f"{text.manifest.name}, {_room(text)}; /help, /exit")
            return talk.run(interactive)


def _room(text: Text) -> str:
    """How long a conversation can become; a window has no end."""
    return "no end, old text is forgotten" if text.is_endless else f"context {text.capacity}"


@dataclass
class Conversation:
    """The loop of a chat: read a message, obey a command or answer it.

    Attributes:
        chat: the conversation of the runtime.
        how: keyword arguments of every `Chat.say`.
        stats: whether a line of figures follows each answer.
        code: exit code so far; errors of a piped conversation show in it.
    """

    chat: Chat
    how: dict[str, Any]
    stats: bool = False
    code: int = 0

    def run(self, interactive: bool) -> int:
        """Talk until Ctrl-D, /exit or the end of the input; return the exit code."""
        while True:
            try:
                message = read_message(lambda more: _line("... " if more else "> ", interactive))
                if not self._take(message):
                    break
            except KeyboardInterrupt:
                if not interactive:
                    raise
                emit("\n")
                note("there is nothing to stop; /exit or Ctrl-D leaves")
            except EOFError:
                if interactive:
                    emit("\n")
                break
            except ForerunError as error:
                note(str(error))
                self.code = error.exit_code
        return 0 if interactive else self.code

    def _take(self, message: str) -> bool:
        """Handle one message; False leaves the chat."""
        if message.startswith("/") and not message.startswith("//"):
            name, _, argument = message[1:].partition(" ")
            command = COMMANDS.get(name.strip())
            if command is None:
                known = ", ".join(f"/{known}" for known in COMMANDS)
                raise OptionError(f"/{name.strip()} is not a command; known: {known}")
            return command(self, argument.strip())
        if message.strip():
            message = message[1:] if message.startswith("//") else message
            self._answer(options.checked_text(message, "the message"))
        return True

    def _answer(self, message: str) -> None:
        with reporter(_QUIET_S) as show, cancel_on_interrupt(self.chat.cancel):

            def on_text(piece: str) -> None:
                show.close()
                emit_answer(piece)

            events = self.chat.say(
                message, on_prefill=lambda done, total: show("prefill", done, total), **self.how
            )
            answer = collect(events, on_text)
        emit("\n")
        if answer.finish_reason == "context":
            note("the context is full; /reset begins anew, --context slide drops old text")
        if self.stats:
            note(stats_line(answer.stats))


def _help(_conversation: Conversation, _argument: str) -> bool:
    for name, text in _TEXTS.items():
        note(f"/{name}: {text}")
    return True


def _reset(conversation: Conversation, _argument: str) -> bool:
    conversation.chat.reset()
    note("the conversation begins anew")
    return True


def _system(conversation: Conversation, argument: str) -> bool:
    if not argument:
        raise OptionError("/system needs a text, e.g. /system You are brief.")
    conversation.chat.system = options.checked_text(argument, "the system prompt")
    conversation.chat.reset()
    note("the system prompt is set and the conversation begins anew")
    return True


def _save(conversation: Conversation, argument: str) -> bool:
    if not argument:
        raise OptionError("/save needs a file name, e.g. /save talk.json")
    path = Path(argument).expanduser()
    lines = (to_json(message) for message in conversation.chat.messages)
    try:
        with open(path, "x", encoding="utf-8") as stream:
            stream.write("[\n" + ",\n".join(lines) + "\n]\n")
    except OSError as error:
        raise OptionError(f"cannot save to {path}: {error.strerror or error}") from None
    note(f"saved {len(conversation.chat.messages)} messages to {path}")
    return True


def _exit(_conversation: Conversation, _argument: str) -> bool:
    return False


COMMANDS: dict[str, Callable[[Conversation, str], bool]] = {
    "help": _help,
    "reset": _reset,
    "system": _system,
    "save": _save,
    "exit": _exit,
}
_TEXTS = {
    "help": "this list; a message that begins with // is sent with one /",
    "reset": "forget the conversation, keep the system prompt",
    "system": "set the system prompt and begin anew",
    "save": "write the conversation to a new JSON file",
    "exit": "leave; so does Ctrl-D",
}


def read_message(line: Callable[[bool], str]) -> str:
    r"""Read one message, which may span lines.

    Args:
        line: returns the next line without its end; the argument tells whether it continues a
            message; raises EOFError at the end.

    Returns:
        The message: one line, lines joined where they end in ``\``, or what stands between two
        lines of three quotes. The end of the input ends a message too.
    """
    first = line(False)
    if first.strip() == _BLOCK:
        return "\n".join(_until(line, lambda text: text.strip() == _BLOCK))
    parts = [first]
    while parts[-1].endswith("\\"):
        parts[-1] = parts[-1][:-1]
        try:
            parts.append(line(True))
        except EOFError:
            break
    return "\n".join(parts)


def _until(line: Callable[[bool], str], ends: Callable[[str], bool]) -> Iterator[str]:
    while True:
        try:
            text = line(True)
        except EOFError:
            return
        if ends(text):
            return
        yield text


def _line(prompt: str, interactive: bool) -> str:
    return input(prompt if interactive else "")


@contextmanager
def _terminal_history() -> Iterator[bool]:
    """Yield whether a person is at the terminal; then lines can be edited and are remembered."""
    # Bytes that are not UTF-8 must reach the check of the message instead of breaking the input.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield False
        return
    try:
        import readline
    except ImportError:
        yield True
        return
    from forerun.devices.home import home

    path = home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    except OSError:
        note(f"no history: {path} cannot be read")
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield True
    finally:
        try:
            readline.write_history_file(path)
        except OSError:
            note(f"the history could not be written to {path}")
