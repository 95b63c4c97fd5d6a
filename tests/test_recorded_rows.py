"""Many rows decoded by a recorded step say what the model's own step says."""

import pytest
import torch

import distilling
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.recorded_rows import RecordedRows
from tolerances import FUSED_HALF, STEPS

MISSING = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, MISSING])


def rows_of(kinds: list[int], device: str, room: int, dtype: torch.dtype = torch.float64):
    """A model with attention in some layers, and a state that has read rows of unequal lengths."""
    torch.manual_seed(0)
    model = from_scratch(distilling.config().with_attention_layers(kinds)).to(device, dtype)
    ids = torch.randint(10, 40, (3, 9), device=device)
    mask = torch.arange(9, device=device) < torch.tensor([[9], [4], [6]], device=device)
    _, state = model.prefill(ids, model.new_state(3, max_context=9 + room), attention_mask=mask)
    return model, state


@torch.inference_mode()
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("kinds", [[0, 1, 2, 3], [0, 2], []], ids=["teacher", "hybrid", "linear"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, STEPS["float64"]), (torch.bfloat16, FUSED_HALF)]
)
def test_it_says_what_steps_say(kinds, device, dtype, tolerance, monkeypatch):
    model, state = rows_of(kinds, device, 8, dtype)
    plain, rows = state.copy(), RecordedRows(model, state)
    tokens = torch.randint(10, 40, (5, 3), device=device)
    want = [model.step(token, plain)[0] for token in tokens]
    for i, token in enumerate(tokens):
        # One step ran, one was recorded: on CUDA Python has no part in more.
        if device == "cuda" and i == 2:
            monkeypatch.setattr(model, "encode", None)
        torch.testing.assert_close(rows.step(token), want[i], **tolerance._asdict())
    assert state.length.tolist() == [14, 9, 11]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_full_cache_is_an_error(device):
    rows = RecordedRows(*rows_of([0, 1, 2, 3], device, room=2))
    token = torch.full((3,), 11, device=device)
    for _ in range(2):
        rows.step(token)
    with pytest.raises(UserError, match="max_context"):
        rows.step(token)
