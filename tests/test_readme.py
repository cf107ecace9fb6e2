"""What README.md and docs/ show is true: Python runs, and command lines are ones we have."""

import dataclasses
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import forerun

ROOT = Path(forerun.__file__).resolve().parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = {"bash", "console", "sh", "shell"}
TIMEOUT_S = 120
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^ *\2`*[ \t]*$", re.M | re.S)
_OPERATORS = re.compile(r"[|&;()]+")
_REDIRECTIONS = re.compile(r"[<>]+&?")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    line: int
    language: str
    code: str


def blocks_of(markdown):
    found = []
    for match in _FENCE.finditer(markdown):
        indent, language, code = match.group(1), match.group(3).lower(), match.group(4)
        code = re.sub(rf"^{indent}", "", code, flags=re.M)
        found.append(Block(markdown[: match.start()].count("\n") + 1, language, code))
    return found


def commands_of(code):
    """Simple commands of a block of shell, as lists of words; the output it shows is left out."""
    lines = code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines for words in _split(line) if words]


def _split(line):
    # The number right before a redirection belongs to it.
    lexer = shlex.shlex(
        re.sub(r"(?<!\S)\d(?=[<>])", "", line), posix=True, punctuation_chars="|&;()<>"
    )
    lexer.whitespace_split = True
    commands, skip_next = [[]], False
    for word in lexer:
        if _OPERATORS.fullmatch(word):
            commands.append([])
        elif _REDIRECTIONS.fullmatch(word):
            skip_next = True
            continue
        elif not skip_next and not (not commands[-1] and _ASSIGNMENT.match(word)):
            commands[-1].append(word)
        skip_next = False
    return commands


def parse(words):
    """Let the command's own parser read a line of the README; nothing is run.

    Options, their values, arguments that are needed: all of it is checked.
    """
    import typer.main

    from forerun.apps.cli.main import build

    command, context = typer.main.get_command(build()), None
    name, rest = "forerun", list(words[1:])
    while True:
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "commands"):
            return context
        given = [*getattr(context, "_protected_args", ()), *context.args]
        if not given:
            return context
        name, command, rest = command.resolve_command(context, given)


def refusal(words):
    """None, or why the parser does not take a line."""
    import typer

    try:
        parse(words)
    except typer.Exit as leave:
        return None if leave.exit_code == 0 else f"exit code {leave.exit_code}"
    except Exception as error:
        tell = getattr(error, "format_message", None)
        return tell() if tell else repr(error)
    return None


def option_names():
    """Every option of every command."""
    import typer.main

    from forerun.apps.cli.main import build

    commands, names = [typer.main.get_command(build())], set()
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        names |= {name for param in command.params for name in param.opts}
    return names | {"--help"}


def command_names():
    """Names of the commands, without their groups."""
    import typer.main

    from forerun.apps.cli.main import build

    return set(getattr(typer.main.get_command(build()), "commands", {}))


TEXTS = {page: page.read_text("utf-8") for page in PAGES if page.is_file()}
BLOCKS = [(page, block) for page, text in TEXTS.items() for block in blocks_of(text)]
# `code` between the words of a sentence.
SPANS = [
    span for text in TEXTS.values() for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
]
PYTHON = [(page, block) for page, block in BLOCKS if block.language in ("python", "py")]
COMMANDS = [
    (f"{page.name}, line {block.line}", words)
    for page, block in BLOCKS
    if block.language in SHELLS
    for words in commands_of(block.code)
] + [
    ("a page", words)
    for span in SPANS
    if span.startswith("forerun ")
    for words in commands_of(span)
]


def test_readme_shows_python_and_commands():
    assert README.is_file(), "README.md is missing"
    assert PYTHON, "README.md has no ```python block"
    shown = {words[1] for _, words in COMMANDS if words[0] == "forerun" and len(words) > 1}
    assert {"pull", "generate", "chat"} <= shown


@pytest.mark.model
@pytest.mark.parametrize(
    "page, block", PYTHON, ids=[f"{page.name}-{block.line}" for page, block in PYTHON]
)
def test_python_of_the_pages_runs(page, block, tmp_path):
    """As a user would: a fresh Python in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", block.code],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{page.name}, line {block.line}:\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(
    "place, words",
    [pair for pair in COMMANDS if pair[1][0] == "forerun"],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_command_of_the_pages_is_one_we_have(place, words, capsys):
    why = refusal(words)
    assert why is None, f"{place}: {shlex.join(words)}: {why}"


@pytest.mark.parametrize(
    "span",
    sorted({s for s in SPANS if " " in s.strip() and s.split()[0] in command_names()}),
)
def test_a_command_named_without_the_program_is_one_we_have(span, capsys):
    # Such spans may leave out arguments, and `...` stands for more of the same.
    for words in commands_of(span.replace("...", "")):
        why = refusal(["forerun", *words])
        assert why is None or why.startswith("Missing "), f"`{span}`: {why}"


@pytest.mark.parametrize(
    "name", sorted({" ".join(w[1:2]) for _, w in COMMANDS if w[0] == "forerun"} - {""})
)
def test_help_of_a_shown_command(name, capsys):
    from forerun.apps.cli.main import main

    assert main([name, "--help"] if name[0] != "-" else [name]) == 0
    assert capsys.readouterr().out


def test_make_targets_of_the_readme_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    shown = {
        word
        for _, words in COMMANDS
        if words[0] == "make"
        for word in words[1:]
        if not word.startswith("-") and "=" not in word
    }
    assert shown <= targets, f"the Makefile has no {shown - targets}"


def test_options_between_the_words_are_there():
    shown = {name for span in SPANS for name in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span)}
    assert shown <= option_names(), f"no command has {shown - option_names()}"


def test_every_field_of_generate_json_is_documented():
    names = ["text", "tokens", "finish_reason", "seed", "model", "logprobs", "stats"]
    names += [field.name for field in dataclasses.fields(forerun.Stats)]
    spans = " ".join(SPANS)
    assert not [name for name in names if not re.search(rf"\b{name}\b", spans)]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([\w-]+))?\)", TEXTS[page])
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)
            assert anchor in [
                re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads
            ]


SAMPLE = """
Text.

```python
x = 1
```
1. Item
   ```console
   $ FORERUN_HOME=/models forerun pull gemma3-270m --accept-terms   # with its terms
   pulled
   $ git diff | forerun generate - --system "Say (what) changed; now" \\
       --max-tokens 80 2> log.txt && forerun bench text --runs 3 > table.txt
   ```
~~~json
{"forerun": 1}
~~~
"""


def test_blocks_and_commands_are_found():
    blocks = blocks_of(SAMPLE)
    assert [(b.language, b.line) for b in blocks] == [("python", 4), ("console", 8), ("json", 14)]
    assert blocks[0].code == "x = 1\n"
    assert commands_of(blocks[1].code) == [
        ["forerun", "pull", "gemma3-270m", "--accept-terms"],
        ["git", "diff"],
        ["forerun", "generate", "-", "--system", "Say (what) changed; now", "--max-tokens", "80"],
        ["forerun", "bench", "text", "--runs", "3"],
    ]
    assert commands_of("make demo\nforerun chat\n") == [["make", "demo"], ["forerun", "chat"]]


@pytest.mark.parametrize(
    "line, named",
    [
        ("forerun genrate hi", "genrate"),
        ("forerun generate hi --colour red", "--colour"),
        ("forerun generate hi --max-tokens many", "--max-tokens"),
        ("forerun generate hi there", "there"),
        ("forerun bench poetry", "poetry"),
        ("forerun export a.gguf", "OUT"),
    ],
)
def test_wrong_commands_would_be_found(line, named):
    why = refusal(line.split())
    assert why is not None and named in why
    assert refusal(["forerun", "--version"]) is None
    assert refusal(["forerun", "generate", "hi", "--help"]) is None
