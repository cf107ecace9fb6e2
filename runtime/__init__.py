"""Run bundles: numpy, onnxruntime, tokenizers and jinja2, nothing else."""
