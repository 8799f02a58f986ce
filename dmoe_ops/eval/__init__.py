"""`dmoe eval`: GSM8K, MATH-500, ARC-C and MMLU as dMoE's authors evaluate, and with the defects of that mended."""
