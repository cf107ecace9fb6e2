"""The forms in which a bundle's weights can be stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """One way to store all matrices of a bundle.

    Attributes:
        method: of `METHODS`, for matrices.
        table: of `METHODS`, for the embedding and the head that shares its bytes.
        detail: for people.
        kl_bound: largest mean KL divergence to the float32 bundle that is let out.
        bytes_per_weight: size of a bundle, everything beside the weights included, for estimates.
        special: prefix of names of matrices, and the method for those instead.
        row_exact: verification of drafts is bit-equal to decoding: blocks of 32 or rows, an 8-bit
            KV cache, and the head in per-row integer products, which also flattens T(n).
        smooth: move outliers of activations into the weights before rounding.
    """

    method: str
    table: str
    detail: str
    kl_bound: float
    bytes_per_weight: float
    special: tuple[tuple[str, str], ...] = ()
    row_exact: bool = False
    smooth: bool = False


# The name for weights that stay as they are, where only the KV cache or skipping is wanted.
KEPT = "fp32"
# Largest mean KL divergence then, by the KV layout that runs by default. SmolLM2-135M loses 0,
# 0.00001, 0.008 and 0.58 with these layouts, Gemma 3 270M no more.
KEPT_BOUNDS = {"fp32": 0.001, "fp16": 0.01, "int8": 0.1, "int4": 0.75}

FORMATS = {
    "int4": WeightFormat("affine4", "gptq4", "4 bits, scale and offset for 32, GPTQ", 0.75, 1.0),
    # Blocks of 64 are read a quarter faster. Queries, keys and values are an eighth of the weights
    # and over a third of what that costs in KL.
    "int4-fast": WeightFormat(
        "gptq4-64",
        "gptq4-64",
        "4 bits, blocks of 64 (qkv with offsets for 32), GPTQ",
        0.75,
        0.9,
        special=(("qkv.", "affine4"),),
    ),
    "int4-exact": WeightFormat(
        "affine4",
        "gptq4",
        "4 bits (head, KV 8), scale and offset for 32, GPTQ",
        0.75,
        1.2,
        row_exact=True,
    ),
    "int8": WeightFormat("least8", "least8", "8 bits, blocks of 32, least error", 0.02, 1.3),
    "int8-rows": WeightFormat(
        "rows8", "least8", "8 bits by rows (KV 8), smoothed", 0.2, 1.6, row_exact=True, smooth=True
    ),
}

# What `int4` is compared with; not offered for pulling.
PLAIN_FORMATS = {
    "int4-range": WeightFormat("range4", "range4", "4 bits, blocks of 32, nearest", 3.0, 1.0),
    "int4-least": WeightFormat("least4", "least4", "4 bits, blocks of 32, least error", 3.0, 1.0),
    "int4-gptq": WeightFormat(
        "gptq4-64",
        "gptq4-64",
        "4 bits (qkv 8), blocks of 64, GPTQ",
        3.0,
        1.0,
        (("qkv.", "least8"),),
    ),
}
