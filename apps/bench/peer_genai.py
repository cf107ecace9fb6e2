"""Worker for onnxruntime-genai; run with ``python -m``."""

from __future__ import annotations

import importlib
import json
import time
from importlib import metadata
from typing import Any

from forerun.apps.bench.machine import peak_rss_mb
from forerun.apps.bench.worker import serve


class _Peer:
    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        # By name: only the extra `peers` has it.
        og: Any = importlib.import_module("onnxruntime_genai")
        self._og = og
        config = og.Config(request["model"])
        threads = {"intra_op_num_threads": request["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = og.Model(config)
        # How it drafts from the text's own n-grams; none of it is plain decoding.
        self._speculative: dict[str, Any] = request.get("speculative") or {}
        return {"version": metadata.version("onnxruntime-genai")}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        prompt, tokens = np.asarray(request["prompt"], np.int32), request["tokens"]
        total = len(prompt) + tokens
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=total + 1, do_sample=False)
        if not request.get("eos"):
            # This is how this library is told to write on after an end token.
            params.set_search_options(min_length=total)
        if self._speculative:
            params.set_speculative_options(**self._speculative)
        generator = self._og.Generator(self._model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        steps = 0
        while steps < tokens - 1 and not generator.is_done():
            generator.generate_next_token()
            steps += 1
        end = time.perf_counter()
        written = generator.get_sequence(0)[len(prompt) :]
        return {
            "prefill_s": first - start,
            "first_token_s": first - start,
            "decode_s": end - first,
            "steps": steps,
            "tokens": [int(token) for token in written],
            **(_drafting(generator.get_speculative_stats()) if self._speculative else {}),
        }

    def memory(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"peak_rss_mb": peak_rss_mb()}


def _drafting(stats: dict[str, Any]) -> dict[str, int]:
    return {
        "proposed": stats["draft_tokens_proposed"],
        "accepted": stats["draft_tokens_accepted"],
        "rounds": stats["rounds"] + stats["standard_fallback_steps"],
    }


def main() -> None:
    """Serve requests until told to quit."""
    peer = _Peer()
    serve({"load": peer.load, "measure": peer.measure, "memory": peer.memory})


if __name__ == "__main__":
    main()
