"""ExecuTorch bundles of the small models, lowered once for all test modules: that takes a while."""

from functools import cache
from pathlib import Path

import pytest

from exported import ROOT, checkpoint


@cache
def pte_bundle(part: str, variant: str, quant: str = "none") -> Path:
    """The bundle of `exported.checkpoint(part, variant)`; a test without executorch is skipped."""
    pytest.importorskip("torchao")
    pytest.importorskip("executorch")
    from mmmamba_edge.export.to_executorch import export_executorch

    out = ROOT / f"{part}-{variant}-{quant}-pte"
    export_executorch(checkpoint(part, variant), out, quant=quant)
    return out
