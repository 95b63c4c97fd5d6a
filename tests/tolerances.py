"""Every tolerance of the tests, with its reason. None is loosened without a measurement."""

from typing import NamedTuple


class Tolerance(NamedTuple):
    """As torch.testing.assert_close takes them."""

    rtol: float
    atol: float


# float32 logits against the original code's float32 run (golden INDEX: suggested 2e-4)
GOLDEN_LOGITS = Tolerance(0, 2e-4)
GOLDEN_MIXER = Tolerance(0, 1e-4)
GOLDEN_LOSS = Tolerance(1e-5, 0)  # values of 1 to 2,000

# chunked against the float64 oracle; measured 2e-6 relative in float32 at 130 steps
CHUNKED = {
    "float64": Tolerance(1e-10, 1e-10),
    "float32": Tolerance(3e-4, 1e-3),
    "float16": Tolerance(5e-3, 1e-2),
    "bfloat16": Tolerance(1e-2, 5e-2),
}
# with keys and values of 16, whose outputs reach 19 and whose small ones are differences of large
# ones: measured 0.08 in bfloat16 (PyTorch's operations, on a CPU and on a card)
CHUNKED_16 = CHUNKED | {"bfloat16": Tolerance(1e-2, 1e-1)}
# steps against one pass of the same dtype
STEPS = {"float64": Tolerance(1e-10, 1e-10), "float32": Tolerance(1e-5, 1e-5)}

# the same model in float64, padded or alone; measured below 1e-12. In float32 processors differ
# in the order of their sums: 3e-5 on one, 2e-5 on another.
PADDED = Tolerance(0, 1e-10)

# fused kernels against plain PyTorch in float32, logits up to 4; measured 5e-6 over 3 steps.
# On a GPU torch's own float32 products differ as much (no tf32 in them).
FUSED = Tolerance(1e-4, 5e-5)
# in bfloat16 plain PyTorch rounds between operations where the kernels do not: values of a few
# units, 8 bits each, over 40 steps
FUSED_HALF = Tolerance(0.05, 0.1)

# training kernels against plain PyTorch in float32, to a share of each tensor's largest value (the
# 1e-3 of a gradient that is 0): sums in another order, measured 5e-5. In half precision results
# round between operations, and gradients of decays are differences of sums: 2e-3 in float16.
TRAINING = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
