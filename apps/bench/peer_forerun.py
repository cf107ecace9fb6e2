"""Worker for forerun itself, through the same session that users get; run with ``python -m``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.apps.bench.machine import peak_rss_mb, version
from forerun.apps.bench.worker import serve

if TYPE_CHECKING:
    from forerun.runtime.text import Text


class _Peer:
    _text: Text | None = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        if "drafter" in request:
            return self._load_drafted(request)
        from forerun.runtime.manifest import load_manifest
        from forerun.runtime.runner import Runner
        from forerun.runtime.session import Session
        from forerun.runtime.tokenizer import Tokenizer

        folder = Path(request["model"])
        manifest = load_manifest(folder)
        manifest.check_files(folder)
        self._runner = Runner(manifest, folder, threads=request["threads"])
        self._session = Session(self._runner, Tokenizer(manifest, folder))
        return {"version": version("forerun")}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        # No prompt may profit from what the one before left in the cache.
        self._session.reset()
        return self._plain(request) if self._text is None else self._drafted(request)

    def _load_drafted(self, request: dict[str, Any]) -> dict[str, Any]:
        """Plain decoding is a drafter too, ``none``; answers then end where the model ends them."""
        from forerun.runtime.load import load

        if self._text is not None:
            self._text.close()
        drafter, threads = request["drafter"], request["threads"]
        self._text = load(request["model"], threads=threads, drafter=drafter)
        self._session = self._text.session()
        return {"version": version("forerun")}

    def _drafted(self, request: dict[str, Any]) -> dict[str, Any]:
        events = list(self._session.generate(request["prompt"], max_tokens=request["tokens"]))
        tokens = [event.token for event in events if event.token is not None]
        stats = events[-1].stats
        assert stats is not None
        steps = max(len(tokens) - 1, 0)
        return {
            "prefill_s": stats.ttft_ms / 1e3,
            "first_token_s": stats.ttft_ms / 1e3,
            "decode_s": stats.tpot_ms * steps / 1e3,
            "steps": steps,
            "tokens": tokens,
            "rounds": stats.rounds,
            "proposed": stats.proposed,
            "accepted": stats.accepted,
        }

    def _plain(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt, runner = request["prompt"], self._runner
        start = time.perf_counter()
        source = self._session.generate_ids(prompt, max_tokens=request["tokens"], stop_ids=())
        tokens = [next(source)[0]]
        first, inside = time.perf_counter(), runner.session_time
        tokens += [token for token, _ in source]
        end = time.perf_counter()
        spent, steps = end - first, len(tokens) - 1
        return {
            "prefill_s": first - start,
            "first_token_s": first - start,
            "decode_s": spent,
            "steps": steps,
            "session_share": (runner.session_time - inside) / spent if steps else None,
            "tokens": tokens,
        }

    def memory(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"peak_rss_mb": peak_rss_mb()}


def main() -> None:
    """Serve requests until told to quit."""
    peer = _Peer()
    serve({"load": peer.load, "measure": peer.measure, "memory": peer.memory})


if __name__ == "__main__":
    main()
