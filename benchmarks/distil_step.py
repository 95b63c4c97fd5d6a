"""A distillation step against a plain restatement of the original's: time and peak memory.

    python benchmarks/distil_step.py                       # a model that two CPU cores can take
    python benchmarks/distil_step.py --size full --device cuda --tokens 4096,8192

The plain step does what the original's does (spec 6.2, 6.3): attention matrices in full, one
backward pass for all layers at the end, both models' logits in float32. Ours is `distill`'s. Both
run on the same random weights and tokens, each in a process of its own, and their losses must
agree. Time is the median of a few steps without the optimiser's; memory the peak above what models
and optimiser hold, and in all.

MFU (model FLOP utilisation) is the arithmetic that a step cannot do without (`step_flops`:
products, causal attention and the SSD; nothing computed again) over the time and the card's dense
bfloat16 peak.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_edge.bench import peak_bytes
from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.distill.batches import Batch
from mmmamba_edge.distill.cuda_graph import RecordedStage
from mmmamba_edge.distill.distill_recipe import LogitsConfig, MatchingConfig, SecondConfig
from mmmamba_edge.distill.engine import Engine
from mmmamba_edge.distill.layer_matching import SCALE, LayerMatching
from mmmamba_edge.distill.logit_matching import LogitMatching
from mmmamba_edge.distill.student import (
    assemble,
    freeze,
    share_output_projection,
    train_only,
    trained,
)
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.layers import Attention
from mmmamba_edge.model.mixer import Mamba2Mixer, conv_kernel
from mmmamba_edge.model.recompute import Recompute
from mmmamba_edge.model.ssd import mamba_kernel
from mmmamba_edge.model.training_ops import has_triton

STAGES = {1: MatchingConfig(), 2: SecondConfig(), 3: LogitsConfig()}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, NVIDIA data sheets
CHUNK = 64  # of the SSD
SIZES = {  # hidden, MLP, heads, key/value heads, layers of the two halves, vocabulary
    "small": (512, 1536, 8, 4, 2, 6, 32_000),
    "full": (2048, 8192, 16, 8, 8, 24, 92_553),
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--tokens", default="1024,4096", help="lengths of the one row")
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=3, help="timed steps, after one to warm up")
    parser.add_argument(
        "--recompute", default="layers", choices=get_args(Recompute), help="of ours, in stage 3"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile ours")
    parser.add_argument("--cuda-graph", action="store_true", help="record ours as a CUDA graph")
    parser.add_argument("--no-kernels", action="store_true", help="ours without Triton kernels")
    parser.add_argument("--ours-only", action="store_true", help="leave the plain step out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows = []
    for stage in map(int, args.stages.split(",")):
        for tokens in map(int, args.tokens.split(",")):
            case = {"size": args.size, "stage": stage, "tokens": tokens, "device": args.device}
            more = {
                "repeat": args.repeat, "recompute": args.recompute, "compiled": args.compile,
                "cuda_graph": args.cuda_graph, "kernels": not args.no_kernels,
            }  # fmt: skip
            kinds = ("ours",) if args.ours_only else ("plain", "ours")
            found = {kind: _alone(kind=kind, **more, **case) for kind in kinds}
            losses = [side["loss"] for side in found.values() if "loss" in side]
            torch.testing.assert_close(losses[-1:], losses[:1], rtol=2e-2, atol=0)
            rows.append({**case, **found})
            if not args.json:
                print(_line(rows[-1]), file=sys.stderr)
    about = {"torch": torch.__version__, "cores": os.cpu_count(), "repeat": args.repeat}
    if args.device == "cuda":
        about["card"] = torch.cuda.get_device_name()
        about["SSD"] = "mamba-ssm" if mamba_kernel() else "PyTorch"
        about["conv"] = "causal-conv1d" if conv_kernel() else "PyTorch"
        about["training kernels"] = has_triton() and not args.no_kernels
    about |= {key: True for key in ("compile", "cuda_graph") if getattr(args, key)}
    print(json.dumps({**about, "rows": rows}) if args.json else _table(about, rows))
    return 0


def _alone(**case: Any) -> dict[str, Any]:
    """One measurement in a fresh process: peaks do not mix."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, kwds=case)


def measure(
    *, kind: str, stage: int, size: str, tokens: int, device: str, repeat: int,
    recompute: Recompute, compiled: bool, cuda_graph: bool, kernels: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Seconds a step, GiB at the peak (of the step alone, and in all), loss, FLOP and MFU.

    Or an error: out of memory.
    """
    torch.manual_seed(0)
    teacher, mixers = _models(size, device)
    for mixer in mixers.values():
        mixer.fused = kernels and kind == "ours"
    train_only(mixers, STAGES[stage].train)
    share_output_projection(teacher, mixers)
    ids = torch.randint(10, teacher.config.vocab_size, (1, tokens), device=device)
    lengths, weights = torch.tensor([tokens], device=device), torch.ones(1, tokens, device=device)
    batch = Batch(ids, lengths, weights, dense=True)
    engine = Engine(device, bf16=device == "cuda")
    step = _step(kind, stage, teacher, mixers, engine, batch, recompute, compiled, cuda_graph)
    parameters = trained(mixers).values()
    seconds, loss, before = [], 0.0, _memory(device)
    try:
        for _ in range(repeat + 1 + compiled):
            began = time.perf_counter()
            loss = float(step())
            seconds.append(time.perf_counter() - began)
            for p in parameters:
                if p.grad is not None:
                    p.grad.zero_()  # a graph adds to what is there
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return {"error": str(error).partition("\n")[0]}
    peak, median = _peak(device), statistics.median(seconds[-repeat:])
    flops = tokens * step_flops(stage, teacher.config, STAGES[stage].train, tokens)
    found = {
        "seconds": median, "peak_gib": peak - before, "peak_gib_in_all": peak, "loss": loss,
        "tokens_per_s": tokens / median, "trained": sum(p.numel() for p in parameters),
        "flops": flops,
    }  # fmt: skip
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    if limit := next((flop for name, flop in PEAK.items() if name in card), None):
        found["mfu"] = flops / median / limit
    return found


def step_flops(stage: int, config: Config, train: Collection[str], tokens: int) -> float:
    """Model FLOPs of a token: what the stage's mathematics needs, with nothing done twice.

    A product costs two per weight, forward; again two for its input's gradient and two for its
    weight's, where they are asked for. Stages 1 and 2 ask for weights' only: a layer's input is the
    teacher's, and nothing else is behind it. Attention reads half of `tokens` on average. The SSD
    is counted in chunks of 64, forward and twice that backward. Of the teacher's last layer they
    need nothing after its heads.
    """
    stack, vocab = config.llm, config.vocab_size
    hidden, key_value, layers = stack.hidden_size, stack.key_value_dim, len(config.layer_types)
    heads, head_dim = stack.num_attention_heads, stack.head_dim
    mixer = {
        "q_proj.weight": hidden * hidden, "k_proj.weight": hidden * key_value,
        "v_proj.weight": hidden * key_value, "g_proj.weight": hidden * hidden,
        "in_proj.weight": hidden * heads, "o_proj.weight": hidden * hidden,
    }  # fmt: skip
    mlp = 3 * hidden * stack.intermediate_size
    attention = 2 * hidden * (hidden + key_value) + 2 * hidden * tokens / 2
    ssd = heads * (CHUNK / 2 * 2 * head_dim + 2 * head_dim * head_dim)
    learnt = sum(size for name, size in mixer.items() if name in train)
    read_by_teacher = 2 * layers * (attention + mlp)
    if stage < 3:
        heads_only = sum(mixer.values()) - mixer["o_proj.weight"]
        read_by_teacher -= 2 * (hidden * hidden + mlp)
        return read_by_teacher + layers * (2 * heads_only + 3 * 2 * ssd + 2 * learnt)
    student = sum(mixer.values()) + mlp
    through_student = layers * (2 * 2 * student + 3 * 2 * ssd + 2 * learnt)
    return read_by_teacher + through_student + 3 * 2 * hidden * vocab


def _models(size: str, device: str) -> tuple[MMMamba, dict[int, Mamba2Mixer]]:
    hidden, inner, heads, kv_heads, first, second, vocab = SIZES[size]
    halves = [
        StackConfig(
            hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
            num_key_value_heads=kv_heads, rms_norm_eps=1e-5, rope_theta=1e6,
            max_position_embeddings=32768, layer_types=("attention",) * count,
        )
        for count in (first, second)
    ]  # fmt: skip
    config = Config(
        embedding=halves[0], llm=halves[1], vocab_size=vocab, image_size=448, patch_size=14,
        img_context_token_id=5, eos_token_id=2, template="internlm2-chat",
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        teacher = freeze(MMMamba(config).to(dtype))
        mixers = {i: Mamba2Mixer(config.stack_of(i)) for i in range(first + second)}
        for mixer in mixers.values():
            torch.nn.init.constant_(mixer.dt_bias, -4.0)
    return teacher, mixers


def _step(
    kind: str, stage: int, teacher: MMMamba, mixers: dict[int, Mamba2Mixer], engine: Engine,
    batch: Batch, recompute: Recompute, compiled: bool, cuda_graph: bool,
) -> Callable[[], Tensor]:  # fmt: skip
    if kind == "ours":
        if stage < 3:
            ours = LayerMatching(teacher, mixers, engine, compiled=compiled)
        else:
            ours = LogitMatching(teacher, mixers, engine, recompute=recompute, compiled=compiled)
        weight = batch.weights.sum()
        backward = RecordedStage(ours).backward if cuda_graph else ours.backward
        return lambda: backward(batch, 1 / weight)
    plain = plain_matching if stage < 3 else plain_logits
    student = assemble(teacher, mixers)

    def step() -> Tensor:
        with engine.autocast():
            loss = plain(teacher, student, batch.ids)
        loss.backward()
        return loss.detach()

    return step


# --- the original's steps, restated -------------------------------------------------------------


def plain_matching(teacher: MMMamba, student: MMMamba, ids: Tensor) -> Tensor:
    """Stages 1 and 2: every layer's graph is kept until the one backward pass."""
    x = teacher.embedding_model.llm_text_embeddings(ids)
    losses = []
    for layer, other in zip(teacher.layers, student.layers, strict=True):
        u = layer.attention_norm(x)
        assert isinstance(layer.attention, Attention)
        with torch.no_grad():
            target = materialised_attention(layer.attention, u)
        mixed = other.attention(u, None, heads_only=True)
        losses.append((mixed.float() - target.float()).square().mean())
        with torch.no_grad():
            x = x + layer.attention.wo(target)
            x = x + layer.feed_forward(layer.ffn_norm(x))
    return SCALE * torch.stack(losses).mean()


def materialised_attention(attention: Attention, u: Tensor) -> Tensor:
    """softmax(q k^T) v with the (heads, seq, seq) matrix in memory: (batch, seq, hidden)."""
    seq = u.shape[1]
    positions = torch.arange(seq, device=u.device)[None]
    q, k, v = attention.project(u, positions, None)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    future = torch.ones(seq, seq, dtype=torch.bool, device=u.device).triu(1)
    scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain_logits(teacher: MMMamba, student: MMMamba, ids: Tensor) -> Tensor:
    """Stage 3, per token: logits of both models in float32."""
    with torch.no_grad():
        target = F.softmax(teacher(ids).float(), dim=-1)
    student_log = F.log_softmax(student(ids).float(), dim=-1)
    return F.kl_div(student_log, target, reduction="batchmean") / ids.shape[1]


# --- measuring ----------------------------------------------------------------------------------


def _memory(device: str) -> float:
    """GiB in use now; the peak starts from here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    return _peak(device)


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_bytes() / 2**30


def _line(row: dict[str, Any]) -> str:
    return _table({}, [row]).splitlines()[-1]


def _table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stage | tokens | plain s | ours s | faster | MFU | plain GiB | ours GiB | less | all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, ours = row.get("plain", {}), row["ours"]
        cells = [
            _number(plain, "seconds", ".3f"), _number(ours, "seconds", ".3f"),
            _ratio(plain, ours, "seconds"), _number(ours, "mfu", ".1%"),
            _number(plain, "peak_gib", ".2f"), _number(ours, "peak_gib", ".2f"),
            _ratio(plain, ours, "peak_gib"), _number(ours, "peak_gib_in_all", ".1f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join([str(row["stage"]), str(row["tokens"]), *cells]) + " |")
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join([head, *lines] if head else lines)


def _number(side: dict[str, Any], key: str, form: str) -> str:
    if "error" in side:
        return "out of memory" if "memory" in side["error"] else side["error"]
    return format(side[key], form) if key in side else ""


def _ratio(plain: dict[str, Any], ours: dict[str, Any], key: str) -> str:
    return f"{plain[key] / ours[key]:.1f}x" if key in plain and key in ours else ""


if __name__ == "__main__":
    sys.exit(main())
