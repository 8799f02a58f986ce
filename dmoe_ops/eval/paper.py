"""What the paper reports, in its own units: (experts, accuracy in per cent) on MATH500, GSM8K, ARC-C and MMLU (`ORDER`).

Source: dMoE (arXiv 2605.30876), tables 2, 3 and 4; LLaDA2.0-mini, 256 experts, top 8, blocks of 32.
"""

from __future__ import annotations

import math

ORDER = ("math500", "gsm8k", "arc-c", "mmlu")
# Of the released run, fscdc/dMoE evaluations/result_summary_be_adaptive/gsm8k: experts, strict and soft accuracy.
RELEASED = {"gsm8k": (14.72, 86.96, 87.57)}
BASE = ((70.0, 72.0), (71.5, 90.8), (65.9, 84.4), (70.6, 88.6))
TABLE_2 = {
    "base": BASE,
    "top-k halved": ((43.5, 52.6), (44.3, 72.4), (42.2, 74.0), (43.8, 61.5)),
    "DES-S": ((41.0, 70.8), (41.9, 90.7), (39.9, 83.3), (41.4, 87.1)),
    "DES-V": ((36.9, 71.8), (37.0, 90.5), (36.8, 82.3), (37.0, 85.6)),
    "DES-S*": ((12.9, 53.8), (13.2, 74.0), (13.0, 62.9), (13.0, 70.7)),
    "DES-V*": ((13.0, 53.0), (12.9, 73.5), (13.0, 49.1), (13.0, 72.6)),
    "dMoE": ((14.1, 71.0), (14.7, 88.6), (15.0, 85.8), (14.5, 87.4)),
}
ROW_OF: dict[tuple[str, int | None], str] = {  # of table 2, by policy and its setting
    ("top4", 4): "top-k halved",
    ("des_seq", 3): "DES-S",
    ("des_seq", 1): "DES-S*",
    ("des_vote", 38): "DES-V",
    ("des_vote", 13): "DES-V*",
}
TABLE_3 = {  # by the threshold p of the test, trained at 0.6
    0.4: ((10.3, 69.8), (10.3, 85.0), (10.5, 83.7), (10.3, 85.9)),
    0.5: ((11.5, 70.0), (11.7, 87.0), (11.9, 84.8), (11.6, 87.0)),
    0.6: ((14.1, 71.0), (14.7, 88.6), (15.0, 85.8), (14.5, 87.4)),
    0.7: ((19.0, 72.6), (19.9, 90.5), (20.2, 86.4), (19.6, 87.8)),
    0.8: ((27.1, 74.2), (28.1, 91.7), (28.2, 86.9), (27.9, 89.3)),
}
TABLE_4 = {  # by block size: token routing, dMoE
    32: (BASE, TABLE_2["dMoE"]),
    24: (
        ((60.7, 73.6), (62.2, 91.0), (57.8, 82.3), (61.6, 88.9)),
        ((15.4, 74.4), (16.0, 90.4), (16.4, 87.2), (15.8, 85.9)),
    ),
    16: (
        ((48.6, 71.2), (49.8, 90.5), (47.0, 86.9), (49.6, 88.5)),
        ((15.9, 71.2), (16.5, 90.6), (16.8, 85.6), (16.4, 88.1)),
    ),
    8: (
        ((31.5, 71.0), (32.2, 90.1), (31.1, 87.7), (32.3, 87.4)),
        ((14.2, 73.0), (14.6, 89.6), (15.1, 86.5), (14.6, 85.9)),
    ),
}


def mean(row) -> tuple[float, float]:
    """Experts and accuracy, averaged over the four benchmarks."""
    return tuple(sum(column) / len(row) for column in zip(*row))


def summary(row, base=BASE) -> tuple[float, float, float]:
    """Experts, experts as a share of `base`, and the share of its accuracy that is kept."""
    (experts, accuracy), (all_experts, all_accuracy) = mean(row), mean(base)
    return experts, experts / all_experts, accuracy / all_accuracy


def reported(policy: str, routing, block_length: int) -> dict[str, tuple[float, float]]:
    """Experts and accuracy of each set, where a table has a row for the policy and its settings (a `BlockRouting`)."""
    if policy == "token":
        row = TABLE_4.get(block_length, (None, None))[0]
    elif policy == "dmoe" and routing.top_p == 0.6:
        row = TABLE_4.get(block_length, (None, None))[1]
    elif block_length != 32:
        row = None
    elif policy == "dmoe":
        row = TABLE_3.get(routing.top_p)
    else:
        setting = dict(top4=routing.top_k, des_seq=routing.union_k, des_vote=routing.capacity).get(policy)
        row = TABLE_2.get(ROW_OF.get((policy, setting), ""))
    return dict(zip(ORDER, row)) if row else {}


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval)."""
    share, width = right / n, z * z / n
    middle = (share + width / 2) / (1 + width)
    half = z * math.sqrt(share * (1 - share) / n + width / n / 4) / (1 + width)
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
