"""Benchmarks: each runtime in a process of its own, one working at a time, all interleaved."""
