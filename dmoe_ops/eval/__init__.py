"""`dmoe eval`: GSM8K, MATH-500, ARC-C and MMLU as dMoE's authors evaluate, and with the defects of that mended.

scoring, grader: the answer of a text, and whether it is right. sets: items and prompts. answers: decoding. store: answers on
the disk. report: the JSON and the table, beside the figures of paper. command: `dmoe eval`. harness: an LM for lm-eval.
"""
