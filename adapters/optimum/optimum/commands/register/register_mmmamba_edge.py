"""Makes `optimum-cli export onnx` know mmMamba; optimum-cli imports all modules of this namespace.

No command is added. Only the one that needs it pays for the import, which takes seconds.
"""

import sys

if sys.argv[1:3] == ["export", "onnx"]:
    import transformers_mmmamba_edge.optimum_onnx  # noqa: F401  (registers on import)
