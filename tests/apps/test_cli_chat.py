"""`forerun chat` on a real, very small model: from a pipe, and at a pseudo-terminal."""

import contextlib
import json
import os
import re
import select
import time

import pytest

from forerun.apps.cli.chat import read_message


def talk(forerun, text, *options):
    return forerun("chat", "--model", forerun.model, "--max-tokens", 5, *options, input=text)


def test_each_line_of_a_pipe_gets_an_answer(forerun):
    done = talk(forerun, "hi\nwho?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "abcde\nabcde\n", "no prompt signs and no banner belong in a pipe"
    assert done.stderr == ""


def test_later_turns_reuse_the_cache(forerun):
    done = talk(forerun, "hi\nwho?\n", "--stats")
    first, second = done.stderr.splitlines()
    assert "cached" not in first
    prompt, cached = map(int, re.search(r"(\d+) prompt tokens \((\d+) cached\)", second).groups())
    # The second prompt holds the first one, the answer to it, and the new message.
    assert cached >= int(re.search(r"(\d+) prompt tokens", first)[1]) + 4
    assert prompt > cached


def test_messages_of_several_lines(forerun, tmp_path):
    saved = tmp_path / "talk.json"
    done = talk(forerun, f'one\\\ntwo\n"""\nthree\n\nfour\n"""\n//five\n/save {saved}\n')
    assert done.returncode == 0 and done.stdout == "abcde\n" * 3
    users = [m["content"] for m in json.loads(saved.read_text()) if m["role"] == "user"]
    assert users == ["one\ntwo", "three\n\nfour", "/five"]


def test_reset_forgets_and_system_is_set(forerun, tmp_path):
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    lines = f"hi\n/system Be brief.\n/save {first}\nyou\n/reset\n/save {second}\n/exit\nnot read\n"
    done = talk(forerun, lines, "--system", "Be long.")
    assert done.stdout == "abcde\nabcde\n"
    assert json.loads(first.read_text()) == [{"role": "system", "content": "Be brief."}]
    assert json.loads(second.read_text()) == [{"role": "system", "content": "Be brief."}]


MISTAKES = {
    "unknown command": "/rest",
    "save without a name": "/save",
    "save over a file": "/save {exists}",
    "save nowhere": "/save /nowhere/talk.json",
    "system without text": "/system",
    "too long": "x" * 700,
}


@pytest.mark.parametrize("line", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_the_chat_goes_on(forerun, tmp_path, line):
    exists = tmp_path / "exists"
    exists.write_text("precious")
    done = talk(forerun, f"hi\n{line.format(exists=exists)}\nhi\n")
    assert done.stdout == "abcde\nabcde\n"
    assert done.stderr.startswith("forerun: ") and done.stderr.count("\n") == 1
    assert done.returncode == 2
    assert exists.read_text() == "precious"


def test_bytes_that_are_not_utf8_are_refused_and_the_chat_goes_on(forerun):
    done = forerun(
        *("chat", "--model", forerun.model, "--max-tokens", 5),
        input=b"hi\n\xff\xfe\nhi\n",
        text=False,
    )
    assert done.stdout == b"abcde\nabcde\n"
    assert b"UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


def test_empty_lines_are_passed_over(forerun):
    assert talk(forerun, "\n  \nhi\n").stdout == "abcde\n"


def test_input_that_ends_inside_a_message_still_sends_it():
    lines = iter(['"""', "a", "b"])

    def line(_more):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    assert read_message(line) == "a\nb"
    with pytest.raises(EOFError):
        read_message(line)


class Terminal:
    """A process at a pseudo-terminal of its own."""

    def __init__(self, command, environment):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, environment)
        self.seen = ""

    def send(self, text):
        os.write(self.fd, text.encode())

    def expect(self, text, timeout=30.0):
        """Read until `text` came after what was expected before; returns what was skipped."""
        end = time.monotonic() + timeout
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come, but: {self.seen[-500:]!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"ended without {text!r}: {self.seen[-500:]!r}") from None
        skipped, _, self.seen = self.seen.partition(text)
        return skipped

    def wait(self, timeout=30.0):
        """Exit code, after reading what is left."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running: {self.seen[-500:]!r}")

    def close(self):
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(forerun):
    """Start `forerun` at a terminal."""
    pytest.importorskip("pty")
    opened = []

    def start(*arguments):
        environment = {**os.environ, "FORERUN_HOME": str(forerun.home), "TERM": "xterm"}
        command = [*forerun.command, *map(str, arguments)]
        opened.append(Terminal(command, environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat_and_ctrl_d_leaves(forerun, terminal):
    endless = ("--context", "slide", "--max-tokens", 10**9)
    chat = terminal("chat", "--model", forerun.model, *endless)
    chat.expect("> ")
    chat.send("hi\n")
    chat.expect("abcdefgh")
    chat.send("\x03")
    chat.expect("> ")
    chat.send("again\n")
    chat.expect("abcdefgh")
    chat.send("\x03")
    chat.expect("> ")
    # A signal in the instant before readline waits is seen with the next key only.
    time.sleep(0.5)
    chat.send("\x03")
    chat.expect("Ctrl-D leaves")
    chat.expect("> ")
    chat.send("\x04")
    assert chat.wait() == 0
    assert "Traceback" not in chat.seen


def test_history_is_kept_for_the_next_chat(forerun, terminal):
    pytest.importorskip("readline")
    chat = terminal("chat", "--model", forerun.model, "--max-tokens", 3)
    chat.expect("> ")
    chat.send("remember me\n")
    chat.expect("abc")
    chat.expect("> ")
    chat.send("/exit\n")
    assert chat.wait() == 0
    history = forerun.home / "chat_history"
    assert "remember me" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0, "what was said is nobody else's business"
    chat = terminal("chat", "--model", forerun.model, "--max-tokens", 3)
    chat.expect("> ")
    chat.send("\x1b[A\x1b[A")
    chat.expect("remember me")
    chat.send("\n")
    chat.expect("abc")
    chat.expect("> ")
    chat.send("\x04")
    assert chat.wait() == 0


def test_ctrl_c_in_generate_at_a_terminal(forerun, terminal):
    endless = ("--raw", "--context", "slide", "--max-tokens", 10**9)
    run = terminal("generate", "a", "--model", forerun.model, *endless)
    run.expect("bcdefgh")
    run.send("\x03")
    run.expect("interrupted after")
    assert run.wait() == 130
    assert "Traceback" not in run.seen


def test_control_characters_of_an_answer_do_not_steer_the_terminal(forerun, terminal):
    # 27 is escape: with the bias the model says nothing else.
    options = ("--max-tokens", 3, "--logit-bias", "27=1000")
    run = terminal("generate", "a", "--model", forerun.model, *options)
    run.expect("\N{SYMBOL FOR ESCAPE}" * 3)
    assert run.wait() == 0
    piped = forerun("generate", "a", "--model", forerun.model, *options)
    assert piped.stdout == "\x1b\x1b\x1b\n", "a pipe gets what the model said"
