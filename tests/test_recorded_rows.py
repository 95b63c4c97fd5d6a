"""Many rows decoded by a recorded step say what the model's own step says."""

import pytest
import torch

import distilling
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.recorded_rows import RecordedRows
from tolerances import STEPS

MISSING = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, MISSING])


def rows_of(kinds: list[int], device: str, room: int):
    """A model with attention in some layers, and a state that has read rows of unequal lengths."""
    torch.manual_seed(0)
    model = from_scratch(distilling.config().with_attention_layers(kinds)).to(device).double()
    ids = torch.randint(10, 40, (3, 9), device=device)
    mask = torch.arange(9, device=device) < torch.tensor([[9], [4], [6]], device=device)
    _, state = model.prefill(ids, model.new_state(3, max_context=9 + room), attention_mask=mask)
    return model, state


@torch.inference_mode()
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("kinds", [[0, 1, 2, 3], [0, 2], []], ids=["teacher", "hybrid", "linear"])
def test_it_says_what_steps_say(kinds, device):
    model, state = rows_of(kinds, device, room=8)
    plain, rows = state.copy(), RecordedRows(model, state)
    for token in torch.randint(10, 40, (5, 3), device=device):
        want, plain = model.step(token, plain)
        found = rows.step(token)
        torch.testing.assert_close(found, want, **STEPS["float64"]._asdict())
    assert state.length.tolist() == [14, 9, 11]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_full_cache_is_an_error(device):
    rows = RecordedRows(*rows_of([0, 1, 2, 3], device, room=2))
    token = torch.full((3,), 11, device=device)
    for _ in range(2):
        rows.step(token)
    with pytest.raises(UserError, match="max_context"):
        rows.step(token)
