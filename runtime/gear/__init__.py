"""KV caches in GEAR's form: 4-bit codes, a few exact values, and low-rank corrections."""
