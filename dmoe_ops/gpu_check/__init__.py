"""`make gpu-check` (= python -m dmoe_ops.gpu_check, in the repository): every GPU test, the sanitizers, times per kernel and
the benchmarks, within --minutes, on a machine that may have no network. `--rehearse` takes the same way without a GPU."""
