# SPDX-License-Identifier: BSD-3-Clause
"""The rows of a GPU, in the order of their value, and what others published for them. Nothing here runs a layer."""

from __future__ import annotations

from .workloads import Elementwise, Mixture, Row, Shape


def _mixture(T: int, D: int, F: int, E: int, K: int) -> Mixture:
    return Mixture(T, D, F, E=E, K=K)


MIXTURES = {
    "1": _mixture(40960, 768, 256, 128, 8),
    "2": _mixture(40960, 768, 512, 64, 4),
    "3": _mixture(40960, 768, 1024, 32, 2),
    "4": _mixture(24576, 1536, 256, 128, 8),
    "5": _mixture(24576, 1536, 512, 64, 4),
    "6": _mixture(24576, 1536, 1024, 32, 2),
    "7": _mixture(32768, 4096, 256, 256, 16),
    "8": _mixture(32768, 4096, 512, 128, 8),
    "9": _mixture(32768, 4096, 1024, 64, 4),
    "10": _mixture(32768, 4096, 512, 256, 16),
    "11": _mixture(32768, 4096, 1024, 128, 8),
    "12": _mixture(32768, 4096, 2048, 64, 4),
    "13": _mixture(32768, 2048, 768, 128, 8),  # Qwen3-30B
    "14": _mixture(8192, 2048, 768, 128, 8),
    "15": _mixture(8192, 4096, 14336, 8, 2),  # Mixtral
}

DENSE = {
    "a": Shape(8192, 4096, 14336),
    "b": Shape(8192, 4096, 11008),
    "c": Shape(9456, 1536, 4096),
    "d": Shape(8192, 8192, 16384, "gelu", bias=True),
}

ACTIVATION = Elementwise(T=16384, F=14336)


def _rows(shapes: dict[str, Shape]) -> list[Row]:
    return [Row(shape, "bfloat16", "training", 1, number, "cuda") for number, shape in shapes.items()]


def moe_rows() -> list[Row]:
    return _rows({**MIXTURES})


def dense_rows() -> list[Row]:
    return [Row(ACTIVATION, "bfloat16", "training", 1, "act", "cuda"), *_rows(DENSE)]


SOURCE = (
    "published, other machines: one H100, bf16; SonicMoE's figures 13 and 14, read off the bars to 2 %"
    " (13 and 14: Liger, torch; 15: one H200)"
)
Rate = tuple[float, "float | None"]  # TFLOP/s of forward and backward; None: not published
_NAMES = ("SonicMoE", "DeepGEMM++", "ScatterMoE", "MoMoE", "Megatron")
_FIGURES: dict[str, tuple[Rate, ...]] = {
    "1": ((336, 363), (235, 278), (181, 205), (149, 164), (107, 139)),
    "2": ((400, 400), (312, 322), (203, 243), (205, 224), (143, 160)),
    "3": ((404, 433), (367, 344), (235, 269), (235, 254), (175, 190)),
    "4": ((363, 404), (256, 273), (205, 211), (190, 184), (120, 132)),
    "5": ((431, 438), (350, 320), (233, 248), (260, 243), (167, 179)),
    "6": ((463, 465), (412, 342), (265, 280), (305, 280), (207, 214)),
    "7": ((427, 459), (278, 327), (260, 237), (241, 196), (149, 132)),
    "8": ((502, 510), (423, 380), (322, 303), (346, 275), (224, 216)),
    "9": ((551, 553), (506, 408), (367, 340), (410, 318), (290, 265)),
    "10": ((517, 525), (427, 397), (335, 314), (337, 267), (224, 199)),
    "11": ((557, 566), (517, 421), (380, 352), (423, 335), (284, 273)),
    "12": ((594, 585), (572, 442), (384, 369), (463, 367), (340, 314)),
}
PUBLISHED: dict[str, dict[str, Rate]] = {
    **{number: dict(zip(_NAMES, figures, strict=True)) for number, figures in _FIGURES.items()},
    "13": {"Liger": (337, 242), "torch grouped_mm": (242, None)},
    "14": {"Liger": (295, 168)},
    "15": {"LigerCute (H200)": (613, 406), "TE (H200)": (553, 452)},
}
