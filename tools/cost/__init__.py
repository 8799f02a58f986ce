"""The cost model: what the compiled kernels hold (`facts`), what the layer launches (`triton_layer`, `cuda_layer`), what a
GPU can do (`machines`), and the time that follows (`model`). Command: tools/cost_model.py."""
