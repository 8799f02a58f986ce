"""What the tests of every router run over: selections, values of logits and biases, the golden files."""

import itertools

SELECTIONS = [
    *itertools.product(("topk_sum", "sum", "max", "union"), ("top_p", "top_n", "nonzero")),
    ("topk_sum", "all"),
]
PALETTES = {
    "normal": None,
    "ties": [-1.0, 0.0, -0.0, 0.5, 2.0],
    "equal": [0.25],
    "extreme": [-90.0, 90.0, -200.0, 200.0, 0.0, float("inf"), float("-inf")],
    "nan": [float("nan"), 0.0, 1.0, -1.0, 0.3, float("inf"), float("-inf")],
    "holes": [float("nan"), float("nan"), float("nan"), 0.5],
}
BIASES = {
    "none": None,
    "normal": None,
    "negative": [-0.9, -0.8, -2.0],  # votes below zero, and sums around it
    "cancel": [-0.5, 0.5],  # with equal logits of 0 votes sum to exactly zero
    "banned": [float("-inf"), float("nan"), 0.0, 0.1],
    "infinite": [float("-inf"), float("inf"), 0.0],
}
GOLDEN = [
    "llada2_mini_p60",
    "llada2_mini_p60_diffuse",
    "llada2_mini_p80",
    "nogroup_p70",
    "scarce_groups_e128",
    "small_p50",
]
