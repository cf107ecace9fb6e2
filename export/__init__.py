"""From source weights to checked ONNX bundles."""
