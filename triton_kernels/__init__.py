"""Triton kernels of dmoe_ops: one file per kernel family, kernels and their thin launchers.

A launcher writes into tensors that it is given; `backend` allocates scratch, and the ops above it validate.
"""

if __name__ == "triton_kernels":
    # OpenAI's package, vLLM and SGLang own that top-level name; a second one would break their look-ups.
    raise ModuleNotFoundError("this folder is the module dmoe_ops.triton_kernels", name="triton_kernels")

from triton import knobs


def _loops_under_numpy_2_4() -> None:
    """Lets interpreted kernels loop up to a number that they loaded: Triton 3.6 calls int() on an array of one element,
    which numpy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


if knobs.runtime.interpret:
    _loops_under_numpy_2_4()
