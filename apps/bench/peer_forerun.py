"""Worker for forerun itself, through the same session that users get; run with ``python -m``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from forerun.apps.bench.machine import peak_rss_mb, version
from forerun.apps.bench.worker import serve


class _Peer:
    def load(self, request: dict[str, Any]) -> dict[str, Any]:
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
        prompt, runner = request["prompt"], self._runner
        # No prompt may profit from what the one before left in the cache.
        self._session.reset()
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
