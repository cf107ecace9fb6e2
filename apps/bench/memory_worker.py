"""Worker that chats with one model and tells its memory part by part; run with ``python -m``.

Nothing heavy may be imported before the first request: what libraries take is measured too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.apps.bench.worker import serve

if TYPE_CHECKING:
    from forerun.runtime.chat import Chat

_STATUS = Path("/proc/self/status")
# Keys and values are the only memory of the process that is shared with nobody and yet of the
# shared kind: see `forerun.runtime.arena.lazy_zeros`.
_FIELDS = {"rss": "VmRSS", "kv": "RssShmem", "peak": "VmHWM"}


def read_memory() -> dict[str, float]:
    """MiB of this process: resident, of them the KV cache, and the most that was resident so far.

    Raises:
        OSError: the system has no such file; Linux has.
    """
    found: dict[str, int] = {}
    for line in _STATUS.read_text().splitlines():
        field, _, value = line.partition(":")
        if field in _FIELDS.values():
            found[field] = int(value.split()[0])
    return {name: found[field] / 1024 for name, field in _FIELDS.items()}


class _Model:
    _chat: Chat

    def libraries(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Import what a chat needs, and nothing of the model."""
        import numpy
        import onnxruntime

        from forerun.runtime import chat, load, open, runner, template, text, tokenizer

        ours = (chat, load, open, runner, template, text, tokenizer)
        self._imported = (numpy, onnxruntime, *ours)
        return read_memory()

    def tokenizer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Read the bundle's manifest and tokenizer."""
        from forerun.runtime.kv_request import KVRequest
        from forerun.runtime.manifest import load_manifest
        from forerun.runtime.tokenizer import Tokenizer

        self._folder = Path(request["model"])
        self._manifest, _ = KVRequest(request["kv"]).apply(load_manifest(self._folder))
        self._tokenizer = Tokenizer(self._manifest, self._folder)
        return read_memory()

    def session(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open the graph and run one token, which touches what is mapped of the weights."""
        from forerun.runtime.load import read_template
        from forerun.runtime.open import open_runner
        from forerun.runtime.text import Text

        runner = open_runner(self._manifest, self._folder, threads=request["threads"])
        runner.step([0])
        runner.arena.rewind(0)
        text = Text(runner, self._tokenizer, read_template(self._manifest, self._folder))
        self._chat = text.chat()
        return read_memory()

    def say(self, request: dict[str, Any]) -> dict[str, Any]:
        """One turn of the chat; answers with the tokens of all turns and the memory."""
        events = list(self._chat.say(request["message"], max_tokens=request["tokens"]))
        stats = events[-1].stats
        assert stats is not None
        return {"tokens": stats.prompt_tokens + stats.new_tokens, **read_memory()}


def main() -> None:
    """Serve requests until told to quit."""
    model = _Model()
    names = ("libraries", "tokenizer", "session", "say")
    serve({name: getattr(model, name) for name in names})


if __name__ == "__main__":
    main()
