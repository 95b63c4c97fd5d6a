"""What the stages minimise: squared error of mixers' outputs, and KL of next-token distributions.

Both are sums over tokens weighted by `weights`; the caller divides by the total weight of the whole
global batch, so a token counts the same whatever batch, process or accumulation it fell into
(the original divides by the batch, padding included: spec 9.6).

The KL never holds a (tokens, vocabulary) matrix: the head's product, both softmaxes and the
gradient are made for a few hundred tokens at a time, forward and backward in one pass.
"""

from collections.abc import Callable
from functools import cache
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
    return weighted_error(*token_errors(student, target), weights, relative=relative)


def token_errors(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square of student minus target over features, and of the target: (rows, seq) each."""
    wide = torch.promote_types(student.dtype, torch.float32)
    target = target.to(wide).flatten(2)
    error = (student.to(wide).flatten(2) - target).square().mean(-1)
    return error, target.square().mean(-1)


def weighted_error(error: Tensor, power: Tensor, weights: Tensor, *, relative: bool) -> Tensor:
    """`matching_error` from what `token_errors` returns."""
    if relative:
        mean = (power * weights).sum() / weights.sum().clamp(min=1e-9)
        error = error / mean.clamp(min=1e-9)
    return (error * weights).sum()


class TopK(NamedTuple):
    """A teacher's distribution for each of n tokens, cut to its k likeliest entries.

    The mass that is left is one more bucket; KL over the k + 1 buckets is a lower bound of the KL
    and exact where the student spreads the rest as the teacher does.
    """

    indices: Tensor  # (n, k) int64
    logprobs: Tensor  # (n, k) float, of the teacher at its temperature


def logits_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor,
    *, tau: float = 1.0, piece: int | None = None, compiled: bool = False,
) -> Tensor:  # fmt: skip
    """KL(teacher || student) of next tokens times tau^2, summed over tokens by weight (spec 6.3).

    Args:
        hidden: (n, hidden) of the student after its final norm; gets a gradient.
        head: (vocab, hidden), the student's; gets a gradient if it asks for one.
        teacher_hidden, teacher_head: likewise, without gradients. The widths may differ.
        weights: (n,) float32.
        tau: temperature of both softmaxes.
        piece: elements of the largest (tokens, vocab) piece; None: what suits the device.
        compiled: torch.compile what is between the products: fewer passes over each piece.
    """
    teacher = (teacher_hidden.detach(), teacher_head.detach())
    return _HeadKL.apply(hidden, head, weights, tau, piece, compiled, *teacher)  # pyright: ignore


def topk_kl(
    hidden: Tensor, head: Tensor, teacher: TopK, weights: Tensor,
    *, tau: float = 1.0, piece: int | None = None,
) -> Tensor:  # fmt: skip
    """`logits_kl` against a stored teacher, over its k likeliest tokens and the rest as one."""
    return _HeadKL.apply(hidden, head, weights, tau, piece, False, *teacher)  # pyright: ignore


@torch.no_grad()
def teacher_topk(
    hidden: Tensor, head: Tensor, k: int, *, tau: float = 1.0, piece: int | None = None
) -> TopK:
    """The teacher's k likeliest next tokens for each row of `hidden` (n, hidden)."""
    indices, logprobs = [], []
    for part in hidden.split(_tokens_at_a_time(head, piece)):
        best = _log_softmax(head_logits(part, head, len(head)), tau).topk(k, dim=-1)
        indices.append(best.indices)
        logprobs.append(best.values)
    return TopK(torch.cat(indices), torch.cat(logprobs))


class _HeadKL(torch.autograd.Function):
    """Gradients are made in the forward pass, while the distributions are at hand."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, head: Tensor, weights: Tensor, tau: float,
        piece: int | None, compiled: bool, teacher: Tensor, teacher_part: Tensor,
    ) -> Tensor:  # fmt: skip
        stored = not teacher.is_floating_point()  # TopK's indices and logprobs
        for_hidden, for_head = ctx.needs_input_grad[:2]  # pyright: ignore
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        vocab, half = len(head), _product_dtype(hidden, head)
        step = _tokens_at_a_time(head, piece)
        same = teacher_part is head or teacher_part.data_ptr() == head.data_ptr()
        head = _aligned(head)
        if not stored:
            teacher_part = head if same else _aligned(teacher_part)
        grad_head = None
        if for_head:
            grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        compare = _compiled_compare() if compiled else _compare
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = head_logits(hidden[rows], head, vocab)  # (tokens, rows of the head)
            weight = weights[rows].to(logits.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                if stored:
                    student = _log_softmax(logits, tau)
                    kl, error = _against_topk(student, teacher[rows], teacher_part[rows])
                    kl, error = (kl * weight).sum(), error.mul_(tau * weight[:, None]).to(half)
                else:
                    theirs = head_logits(teacher[rows], teacher_part, vocab)
                    kl, error = compare(logits, theirs, weight, tau, half)
                total += tau**2 * kl
                # d KL tau^2 / d z = tau (p_S - p_T) = error
                if grad_hidden is not None:
                    grad_hidden[rows] = error @ head.to(half)
                if grad_head is not None:
                    grad_head += error.T @ hidden[rows].to(half)
        grad_head = None if grad_head is None else grad_head[:vocab].to(head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)  # pyright: ignore[reportArgumentType]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The stored gradients times the one that comes in."""
        saved = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        scaled = (None if g is None else g * grad.to(g.dtype) for g in saved)
        return (*scaled, None, None, None, None, None, None)


def _compare(
    student: Tensor, teacher: Tensor, weight: Tensor, tau: float, half: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted KL of logits, and tau times weight times p_S - p_T."""
    student, teacher = _log_softmax(student, tau), _log_softmax(teacher, tau)
    likely = teacher.exp()
    kl = teacher.sub_(student).mul_(likely).sum(-1)
    error = student.exp_().sub_(likely)
    return (kl * weight).sum(), error.mul_(tau * weight[:, None]).to(half)


@cache
def _compiled_compare() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_compare, dynamic=False)


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


def _aligned(head: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of 64: on CUDA products of odd sizes take several times
    as long."""
    missing = -len(head) % 64
    if not head.is_cuda or not missing:
        return head
    return torch.cat([head, head.new_zeros(missing, head.shape[1])])


def head_logits(hidden: Tensor, head: Tensor, vocab: int) -> Tensor:
    """(n, rows of the head), float32 (float64 for float64); rows beyond `vocab` get no mass."""
    dtype = _product_dtype(hidden, head)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        # Logits rounded to half precision would drown a small KL and its gradient.
        if dtype != wide and hidden.is_cuda:
            logits = torch.mm(hidden.to(dtype), head.to(dtype).T, out_dtype=wide)
        else:
            logits = hidden.to(wide) @ head.to(wide).T
    logits[:, vocab:] = -1e4  # finite: -inf - -inf is no number
    return logits


def _log_softmax(logits: Tensor, tau: float) -> Tensor:
    return torch.log_softmax(logits / tau if tau != 1.0 else logits, dim=-1)


def _product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """What the head's products are made in: half precision where either side is that already."""
    half = [x.dtype for x in (hidden, head) if x.dtype in (torch.bfloat16, torch.float16)]
    return half[0] if half else torch.promote_types(hidden.dtype, head.dtype)


def _tokens_at_a_time(head: Tensor, piece: int | None) -> int:
    return max(1, (piece or PIECE.get(head.device.type, PIECE["cpu"])) // len(head))
