"""What the stages minimise: squared error of mixers' outputs, and KL of next-token distributions.

Both are sums over tokens weighted by `weights`; the caller divides by the total weight of the whole
global batch, so a token counts the same whatever batch, process or accumulation it fell into
(the original divides by the batch, padding included: spec 9.6).

The KL never holds a (tokens, vocabulary) matrix: the head's product, both softmaxes and the
gradient are made for a few hundred tokens at a time, forward and backward in one pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Elements of one (tokens, vocabulary) piece in float32, of which a few are alive at a time. On CUDA
# a smaller one would spend its time reading the head's weights.
PIECE = {"cuda": 1 << 25, "cpu": 1 << 22}


def matching_error(
    student: Tensor, target: Tensor, weights: Tensor, *, relative: bool = False
) -> Tensor:
    """Squared error per token (mean over features), summed over tokens by weight (spec 6.2).

    Args:
        student, target: (rows, seq, ...) of the same shape; compared in float32 at least.
        weights: (rows, seq).
        relative: divide by the target's mean square, so that layers of any scale count alike.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    target = target.to(wide).flatten(2)
    per_token = (student.to(wide).flatten(2) - target).square().mean(-1)  # (rows, seq)
    if relative:
        power = (target.square().mean(-1) * weights).sum() / weights.sum().clamp(min=1e-9)
        per_token = per_token / power.clamp(min=1e-9)
    return (per_token * weights).sum()


class TopK(NamedTuple):
    """A teacher's distribution for each of n tokens, cut to its k likeliest entries.

    The mass that is left is one more bucket; KL over the k + 1 buckets is a lower bound of the KL
    and exact where the student spreads the rest as the teacher does.
    """

    indices: Tensor  # (n, k) int64
    logprobs: Tensor  # (n, k) float, of the teacher at its temperature


def logits_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor,
    *, tau: float = 1.0, piece: int | None = None,
) -> Tensor:  # fmt: skip
    """KL(teacher || student) of next tokens times tau^2, summed over tokens by weight (spec 6.3).

    Args:
        hidden: (n, hidden) of the student after its final norm; gets a gradient.
        head: (vocab, hidden), the student's; gets a gradient if it asks for one.
        teacher_hidden, teacher_head: likewise, without gradients. The widths may differ.
        weights: (n,) float32.
        tau: temperature of both softmaxes.
        piece: elements of the largest (tokens, vocab) piece; None: what suits the device.
    """
    teacher = (teacher_hidden.detach(), teacher_head.detach())
    return _HeadKL.apply(hidden, head, weights, tau, piece, *teacher)  # pyright: ignore


def topk_kl(
    hidden: Tensor, head: Tensor, teacher: TopK, weights: Tensor,
    *, tau: float = 1.0, piece: int | None = None,
) -> Tensor:  # fmt: skip
    """`logits_kl` against a stored teacher, over its k likeliest tokens and the rest as one."""
    return _HeadKL.apply(hidden, head, weights, tau, piece, *teacher)  # pyright: ignore


@torch.no_grad()
def teacher_topk(
    hidden: Tensor, head: Tensor, k: int, *, tau: float = 1.0, piece: int | None = None
) -> TopK:
    """The teacher's k likeliest next tokens for each row of `hidden` (n, hidden)."""
    indices, logprobs = [], []
    for part in hidden.split(_tokens_at_a_time(head, piece)):
        best = _log_softmax(part, head, tau).topk(k, dim=-1)
        indices.append(best.indices)
        logprobs.append(best.values)
    return TopK(torch.cat(indices), torch.cat(logprobs))


class _HeadKL(torch.autograd.Function):
    """Gradients are made in the forward pass, while the distributions are at hand."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, head: Tensor, weights: Tensor, tau: float,
        piece: int | None, teacher: Tensor, teacher_part: Tensor,
    ) -> Tensor:  # fmt: skip
        stored = not teacher.is_floating_point()  # TopK's indices and logprobs
        for_hidden, for_head = ctx.needs_input_grad[:2]  # pyright: ignore
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_head = None
        if for_head:
            grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        step = _tokens_at_a_time(head, piece)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            student = _log_softmax(hidden[rows], head, tau)  # (tokens, vocab)
            weight = weights[rows].to(student.dtype)
            if stored:
                kl, error = _against_topk(student, teacher[rows], teacher_part[rows])
            else:
                kl, error = _against_all(student, _log_softmax(teacher[rows], teacher_part, tau))
            total += tau**2 * (kl * weight).sum()
            if grad_hidden is not None or grad_head is not None:
                # d KL tau^2 / d z = tau (p_S - p_T)
                error = error.mul_(tau * weight[:, None]).to(_product_dtype(hidden, head))
                if grad_hidden is not None:
                    grad_hidden[rows] = error @ head.to(error.dtype)
                if grad_head is not None:
                    grad_head += error.T @ hidden[rows].to(error.dtype)
        grad_head = None if grad_head is None else grad_head.to(head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)  # pyright: ignore[reportArgumentType]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The stored gradients times the one that comes in."""
        saved = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        scaled = (None if g is None else g * grad.to(g.dtype) for g in saved)
        return (*scaled, None, None, None, None, None)


def _against_all(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL per token of log-probabilities, and p_S - p_T; overwrites both."""
    likely = teacher.exp()
    kl = teacher.sub_(student).mul_(likely).sum(-1)
    return kl, student.exp_().sub_(likely)


def _against_topk(student: Tensor, indices: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a cut teacher; its rest r_T is spread as the student spreads its own."""
    tiny = torch.finfo(student.dtype).tiny
    logprobs = logprobs.to(student.dtype)
    kept, likely = student.gather(1, indices), logprobs.exp()  # (tokens, k)
    rest = (1 - likely.sum(-1, keepdim=True)).clamp(min=0.0)
    # Summed over what is left, not 1 - sum: that would lose all digits of a small rest.
    probability = student.exp_()
    student_rest = probability.scatter(1, indices, 0.0).sum(-1, keepdim=True).clamp(min=tiny)
    kl = (likely * (logprobs - kept)).sum(-1)
    kl += (rest * (rest.clamp(min=tiny).log() - student_rest.log())).sum(-1)
    error = probability * (1 - rest / student_rest)
    return kl, error.scatter_(1, indices, kept.exp() - likely)


def _log_softmax(hidden: Tensor, head: Tensor, tau: float) -> Tensor:
    """(n, vocab) log-probabilities, float32 (float64 for float64)."""
    dtype = _product_dtype(hidden, head)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        # Logits rounded to half precision would drown a small KL and its gradient.
        if dtype != wide and hidden.is_cuda:
            logits = torch.mm(hidden.to(dtype), head.to(dtype).T, out_dtype=wide)
        else:
            logits = hidden.to(wide) @ head.to(wide).T
    return torch.log_softmax(logits / tau if tau != 1.0 else logits, dim=-1)


def _product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """What the head's products are made in: half precision where either side is that already."""
    half = [x.dtype for x in (hidden, head) if x.dtype in (torch.bfloat16, torch.float16)]
    return half[0] if half else torch.promote_types(hidden.dtype, head.dtype)


def _tokens_at_a_time(head: Tensor, piece: int | None) -> int:
    return max(1, (piece or PIECE.get(head.device.type, PIECE["cpu"])) // len(head))
