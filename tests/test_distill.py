"""`mmmamba-edge distill`: the stages chain, learn what they should, resume, and stop cleanly."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distilling
import mmmamba_edge.distill
from mmmamba_edge.cli import main
from mmmamba_edge.distill.distill_recipe import INHERITED, NEW, STEPS, read_distill_recipe
from mmmamba_edge.distill.mixer_file import mixers_of
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.distill.student import attention_layers
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from mmmamba_edge.model.tensor_names import layer_prefix


def distill(recipe, out, *more):
    return main(["distill", str(recipe), "--out", str(out), "--device", "cpu", *more])


def rows(folder, key="loss"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if key in (row := json.loads(line))]


def losses(folder, key="loss"):
    return torch.tensor([row[key] for row in rows(folder, key)])


def mixers(checkpoint):
    """{layer: {tensor: values}} of a checkpoint folder's Mamba-2 layers."""
    return mixers_of(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A finished run of all stages without attention; returns (recipe, run folder)."""
    folder = tmp_path_factory.mktemp("linear")
    recipe = distilling.make(folder)
    assert distill(recipe, folder / "run") == 0
    return recipe, folder / "run"


def test_stages_chain_and_learn(linear):
    recipe, run = linear
    for number, steps in ((1, 8), (2, 6), (3, 6)):
        logged = rows(run / f"stage{number}")
        assert [row["step"] for row in logged] == list(range(1, steps + 1))
        held_out = [
            row["validation_loss"] for row in rows(run / f"stage{number}", "validation_loss")
        ]
        assert held_out[-1] < held_out[0]
        assert {"loss", "lr", "grad_norm", "tokens_per_s", "memory_gib", "seconds"} <= set(
            logged[0]
        )
    model = load_model(run / "stage3" / "checkpoint")
    assert model.config.variant == "linear"
    assert torch.isfinite(model(torch.tensor([[11, 12, 13]])).float()).all()


def test_each_stage_trains_its_set_and_saves_every_mixer_tensor(linear):
    """spec 9.1: the original lost dt_bias and A_log_bias after stage 3; 9.15: it stepped on
    DeepSpeed alone."""
    recipe, run = linear
    seeded = recipe.parent / "seeded"
    main(["seed", str(recipe.parent / "teacher"), "--out", str(seeded)])
    before = mixers(seeded)
    learns = {1: set(NEW), 2: {*NEW, *INHERITED}, 3: {*NEW, *INHERITED} - set(STEPS)}
    for number in (1, 2, 3):
        after = mixers(run / f"stage{number}" / "checkpoint")
        assert after.keys() == before.keys() == set(range(4))
        for layer, tensors in after.items():
            for name, tensor in tensors.items():
                was = before[layer][name].to(tensor.dtype)
                assert torch.equal(tensor, was) == (name not in learns[number]), (number, name)
        before = after


def test_nothing_of_the_teacher_learns(linear):
    """spec 9.3: the original's shadow weights could be trained along with the student's."""
    recipe, run = linear
    teacher, student = (
        open_checkpoint(f) for f in (recipe.parent / "teacher", run / "stage3/checkpoint")
    )
    ours = {name for name in student.names() if ".attention." in name}
    for name in set(student.names()) - ours:
        assert torch.equal(student.get(name), teacher.get(name).bfloat16()), name
    for layer in range(4):
        prefix = f"{layer_prefix(student.config, layer)}attention."
        assert torch.equal(
            student.get(f"{prefix}o_proj.weight"), teacher.get(f"{prefix}wo.weight").bfloat16()
        )


def test_hybrid_keeps_the_teachers_attention(tmp_path):
    recipe = distilling.make(tmp_path, attention='"head-interleaved 2"')
    assert distill(recipe, tmp_path / "run") == 0
    assert open_checkpoint(tmp_path / "run/stage2/checkpoint").config.variant == "linear"
    student = open_checkpoint(tmp_path / "run/stage3/checkpoint")
    kinds = ("attention", "mamba2", "attention", "mamba2")
    assert student.config.layer_types == kinds
    teacher = open_checkpoint(tmp_path / "teacher")
    name = "language_model.model.layers.0.attention.wqkv.weight"
    assert torch.equal(student.get(name), teacher.get(name).bfloat16())


def test_stages_can_be_left_out_and_run_alone(tmp_path, capsys):
    recipe = distilling.make(tmp_path, stages="stages = [1, 3]")
    assert distill(recipe, tmp_path / "run", "--stage", "3") == 2
    assert "stage 1 is not finished there" in capsys.readouterr().err
    assert distill(recipe, tmp_path / "run", "--stage", "1") == 0
    assert distill(recipe, tmp_path / "run", "--stage", "3") == 0
    assert distill(recipe, tmp_path / "run", "--stage", "2", "--resume") == 2
    assert "the recipe has stages [1, 3]" in capsys.readouterr().err
    first, last = (mixers(tmp_path / f"run/stage{n}/checkpoint") for n in (1, 3))
    assert torch.equal(first[0]["dt_bias"].bfloat16(), last[0]["dt_bias"])


@pytest.mark.parametrize(
    "change",
    [
        ["stage1.match=output", "stage1.train=['in_proj.weight', 'o_proj.weight']"],
        ["stage1.relative=true"],
        ["stage3.topk=5", "stage3.tau=2.0"],
        ["stage3.recompute=nothing", "data.positions=answers"],
        ["student.inherit=false", "student.mimic=false"],
        ["engine.bf16=true"],
        ["engine.teacher_bits=8"],
        ["engine.teacher_bits=4", "engine.optimizer=adamw8bit"],
    ],
)
def test_options_run_and_learn(tmp_path, change):
    recipe = distilling.make(tmp_path)
    sets = [part for text in change for part in ("--set", text)]
    assert distill(recipe, tmp_path / "run", *sets) == 0
    for number in (1, 2, 3):
        held_out = [
            r["validation_loss"] for r in rows(tmp_path / f"run/stage{number}", "validation_loss")
        ]
        assert held_out[-1] < held_out[0], number


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_stage_learns_the_same(linear, tmp_path):
    recipe, whole = linear
    more = ("--stage", "1", "--set", "engine.compile=true")
    assert distill(recipe, tmp_path / "run", *more) == 0
    ours, theirs = (losses(run / "stage1") for run in (tmp_path / "run", whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_frozen_layers_are_rounded_and_checkpoints_are_not(tmp_path):
    from mmmamba_edge.model.bnb_layers import quantize_layers

    recipe = distilling.make(tmp_path)
    model = load_model(tmp_path / "teacher")
    ids = torch.tensor([[11, 12, 13, 14]])
    with torch.no_grad():
        plain = model(ids)
        errors = []
        for bits in (8, 4):
            rounded = load_model(tmp_path / "teacher")
            quantize_layers(rounded, bits)
            errors.append(float((rounded.to("cpu")(ids) - plain).norm() / plain.norm()))
    assert 0 < errors[0] < 0.02 < errors[1] < 0.5
    assert distill(recipe, tmp_path / "run", "--set", "engine.teacher_bits=4") == 0
    teacher = open_checkpoint(tmp_path / "teacher")
    student = open_checkpoint(tmp_path / "run/stage3/checkpoint")
    name = "language_model.model.layers.1.feed_forward.w2.weight"
    assert torch.equal(student.get(name), teacher.get(name).bfloat16())


@pytest.mark.parametrize("what", ["nothing", "cheap"])
def test_recomputing_changes_nothing(linear, tmp_path, what):
    recipe, run = linear
    (tmp_path / "run").mkdir()
    for number in (1, 2):
        shutil.copytree(run / f"stage{number}", tmp_path / f"run/stage{number}")
    assert (
        distill(recipe, tmp_path / "run", "--stage", "3", "--set", f"stage3.recompute={what}") == 0
    )
    ours, theirs = (mixers(f / "stage3/checkpoint") for f in (tmp_path / "run", run))
    for layer, tensors in ours.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[layer][name]), (layer, name)


@pytest.mark.parametrize("what", ["cheap", "layers"])
def test_recomputing_keeps_less(what):
    """Tensors kept for the backward pass: fewer bytes, the same gradients."""
    torch.manual_seed(0)
    model = from_scratch(distilling.config().with_attention_layers(set()))
    ids = torch.randint(10, 40, (2, 70))

    def kept_and_gradients():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.setdefault(t.data_ptr(), t.nbytes), t)[1], lambda t: t
        ):
            loss = model(ids).square().mean()
        model.zero_grad()
        loss.backward()
        return sum(sizes.values()), [p.grad for p in model.parameters() if p.grad is not None]

    model.recompute("nothing")
    before, want = kept_and_gradients()
    want = [gradient.clone() for gradient in want]
    model.recompute(what)
    after, got = kept_and_gradients()
    assert after < before * {"cheap": 0.75, "layers": 0.3}[what]
    torch.testing.assert_close(got, want)


def test_the_teachers_answers_are_kept_on_disk(tmp_path, monkeypatch):
    from mmmamba_edge.distill import logit_matching

    recipe = distilling.make(tmp_path, stages="stages = [3]")
    first = ["--set", "stage3.topk=5"]
    assert distill(recipe, tmp_path / "run", *first) == 0
    kept = list((tmp_path / "run/teacher-answers").glob("*.safetensors"))
    assert len(kept) == 6 + 8  # training steps, validation batches
    (tmp_path / "again").mkdir()
    (tmp_path / "run/teacher-answers").rename(tmp_path / "again/teacher-answers")
    monkeypatch.setattr(logit_matching, "teacher_topk", None)  # would be called
    assert distill(recipe, tmp_path / "again", *first) == 0
    assert torch.equal(losses(tmp_path / "run/stage3"), losses(tmp_path / "again/stage3"))


# --- killed, resumed, spread over processes ------------------------------------------------------

SLOW = """
import sys, time
from mmmamba_edge.distill import training
from mmmamba_edge.cli import main
plain = training.optimise
training.optimise = lambda *args: (time.sleep(0.1), plain(*args))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage, wait", [("stage1", 4), ("stage3", 3)])
def test_kill_9_and_resume_is_bit_for_bit(linear, tmp_path, stage, wait):
    recipe, whole = linear
    out = tmp_path / "run"
    args = ["distill", str(recipe), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *args], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    log = out / stage / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(rows(log.parent)) >= wait:
            break
        time.sleep(0.02)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / stage / "checkpoint").exists()
    assert distill(recipe, out, "--resume") == 0
    for number in (1, 2, 3):
        ours, theirs = (mixers(f / f"stage{number}/checkpoint") for f in (out, whole))
        for layer, tensors in ours.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, theirs[layer][name]), (number, layer, name)


def test_metrics_tell_each_step_once(tmp_path, monkeypatch):
    from mmmamba_edge.distill import training

    recipe = distilling.make(tmp_path, stages="stages = [1]")
    plain, calls = training.optimise, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "optimise", stopped)
        assert distill(recipe, tmp_path / "run") == 130
    with (tmp_path / "run/stage1/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # torn
    assert [row["step"] for row in rows_whole(tmp_path / "run/stage1")] == [1, 2, 3, 4, 5]
    (tmp_path / "run/stage1/.checkpoint.abc").mkdir()  # left by a kill while it was written
    assert distill(recipe, tmp_path / "run", "--resume") == 0
    assert [row["step"] for row in rows(tmp_path / "run/stage1")] == list(range(1, 9))
    assert not list((tmp_path / "run/stage1").glob(".*"))


def rows_whole(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if line.endswith("}") and "loss" in (row := json.loads(line))]


def test_a_trained_output_projection_is_handed_on(tmp_path):
    recipe = distilling.make(tmp_path, stages="stages = [1, 2]")
    sets = ["stage1.match=output", "stage1.train=['in_proj.weight', 'o_proj.weight']"]
    assert distill(recipe, tmp_path / "run", *[x for s in sets for x in ("--set", s)]) == 0
    first, second = (mixers(tmp_path / f"run/stage{n}/checkpoint") for n in (1, 2))
    wo = open_checkpoint(tmp_path / "teacher").get("embedding_model.encoder.0.attention.wo.weight")
    assert not torch.equal(first[0]["o_proj.weight"], wo)
    assert torch.equal(second[0]["o_proj.weight"], first[0]["o_proj.weight"].bfloat16())


def test_only_the_students_layers_are_converted_if_asked(tmp_path):
    recipe = distilling.make(tmp_path, attention="[0]", stages="stages = [1]")
    assert distill(recipe, tmp_path / "run", "--set", "stage1.layers=student") == 0
    kinds = open_checkpoint(tmp_path / "run/stage1/checkpoint").config.layer_types
    assert kinds == ("attention", "mamba2", "mamba2", "mamba2")


def test_8_bit_adamw_resumes_bit_for_bit(tmp_path, monkeypatch):
    from mmmamba_edge.distill import training

    recipe = distilling.make(tmp_path, stages="stages = [1]")
    more = ("--set", "engine.optimizer=adamw8bit")
    assert distill(recipe, tmp_path / "whole", *more) == 0
    plain = training.save_progress

    def save_then_die(*args, **named):
        plain(*args, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_progress", save_then_die)
        assert distill(recipe, tmp_path / "run", *more) == 130
    assert distill(recipe, tmp_path / "run", "--resume", *more) == 0
    ours, theirs = (mixers(tmp_path / f"{run}/stage1/checkpoint") for run in ("run", "whole"))
    assert all(torch.equal(ours[i][name], theirs[i][name]) for i in ours for name in ours[i])


STOPS_AT_5 = """
import sys
from mmmamba_edge.distill import training
from mmmamba_edge.cli import main
plain, calls = training.optimise, []
def stopping(*args):
    calls.append(1)
    if len(calls) == 6:
        sys.exit(0)
    return plain(*args)
training.optimise = stopping
sys.exit(main(sys.argv[1:]))
"""


def launched(recipe, out, launcher, *more, code=None):
    """`distill` in two processes, started as users would (or through `code`)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {
        "torch.distributed.run": ["--nproc-per-node", "2", "--master-port", port],
        "accelerate.commands.launch": [
            "--num_processes",
            "2",
            "--main_process_port",
            port,
            "--cpu",
        ],
    }[launcher]
    command = [sys.executable, "-m", launcher, *where]
    script = out.parent / "script.py"
    script.write_text(code or "")
    command += [str(script)] if code else ["-m", "mmmamba_edge"]
    command += ["distill", str(recipe), "--out", str(out), "--device", "cpu"]
    command += more
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        ("torch.distributed.run", ()),
        ("torch.distributed.run", ("--set", "engine.shard=true")),
        ("accelerate.commands.launch", ()),
    ],
    ids=["torchrun", "fsdp2", "accelerate"],
)
def test_two_processes_train_as_one(linear, tmp_path, launcher, more):
    """gloo, the same global batch: one loss curve, whatever the number of processes."""
    recipe, whole = linear
    launched(recipe, tmp_path / "run", launcher, *more)
    for number in (1, 2, 3):
        ours, theirs = (losses(run / f"stage{number}") for run in (tmp_path / "run", whole))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


@pytest.mark.slow
def test_a_sharded_run_resumes(linear, tmp_path):
    """Moments of sharded weights come back to the process that holds the weights."""
    recipe, whole = linear
    more = ("--stage", "1", "--set", "engine.shard=true")
    launched(recipe, tmp_path / "run", "torch.distributed.run", *more, "--set", "stage1.steps=8",
             code=STOPS_AT_5)  # fmt: skip
    assert rows(tmp_path / "run/stage1")[-1]["step"] == 5
    launched(recipe, tmp_path / "run", "torch.distributed.run", *more, "--resume")
    ours, theirs = (losses(run / "stage1") for run in (tmp_path / "run", whole))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_run_is_not_overwritten_or_mixed(linear, capsys):
    recipe, run = linear
    assert distill(recipe, run) == 2
    assert "a run is there; --resume goes on with it" in capsys.readouterr().err
    (run / "stage3/checkpoint").rename(run / "stage3/aside")
    try:
        assert distill(recipe, run, "--resume", "--set", "stage3.lr=1.0") == 2
        message = capsys.readouterr().err
        assert re.search(r"the run there has stage3 lr = 0.003, the recipe lr = 1.0", message)
    finally:
        (run / "stage3/aside").rename(run / "stage3/checkpoint")
    assert distill(recipe, run, "--resume", "--set", "stage1.lr=9.0") == 2  # finished long ago
    assert "stage1 lr = 0.01, the recipe lr = 9.0" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(
    tmp_path, capsys, monkeypatch
):
    from mmmamba_edge.distill.layer_matching import LayerMatching

    recipe = distilling.make(tmp_path)
    plain, calls = LayerMatching.backward, []

    def breaks(self, batch, factor):
        calls.append(1)
        return plain(self, batch, factor) * (float("nan") if len(calls) > 10 else 1.0)

    monkeypatch.setattr(LayerMatching, "backward", breaks)
    assert distill(recipe, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "the loss is nan at step 6" in message
    assert "stage1/progress.safetensors, of step 3; --resume goes on there" in message
    monkeypatch.undo()
    assert distill(recipe, tmp_path / "run", "--resume") == 0


def test_infinite_gradients_are_never_saved(tmp_path, capsys, monkeypatch):
    """The loss of a step is that of the weights before it: healthy, when the step ruins them."""
    from mmmamba_edge.distill import training

    recipe = distilling.make(tmp_path, stages="stages = [1]")
    plain, calls = training.optimise, []

    def poisoned(stage, optimizer, parameters, *rest):
        calls.append(1)
        if len(calls) == 6:  # a step that is saved
            hook = next(iter(parameters.values())).register_hook(lambda g: g * float("inf"))
            try:
                return plain(stage, optimizer, parameters, *rest)
            finally:
                hook.remove()
        return plain(stage, optimizer, parameters, *rest)

    monkeypatch.setattr(training, "optimise", poisoned)
    assert distill(recipe, tmp_path / "run") == 2
    assert "at step 6" in (message := capsys.readouterr().err) and "of step 3" in message
    saved = load_file(tmp_path / "run/stage1/progress.safetensors")
    assert all(torch.isfinite(x).all() for n, x in saved.items() if x.is_floating_point())
    monkeypatch.undo()
    assert distill(recipe, tmp_path / "run", "--resume") == 0


def test_a_full_disk_stops_with_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    from mmmamba_edge.distill import progress

    recipe = distilling.make(tmp_path)
    plain, calls = progress.save_file, []

    def full(tensors, path, metadata):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        plain(tensors, path, metadata)

    monkeypatch.setattr(progress, "save_file", full)
    assert distill(recipe, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message and "of step 3; --resume goes on there" in message
    assert not list((tmp_path / "run/stage1").glob(".mmmamba-*"))
    monkeypatch.undo()
    assert distill(recipe, tmp_path / "run", "--resume") == 0


@pytest.mark.parametrize("name", ["linear", "hybrid"])
def test_committed_recipes_are_the_papers(name):
    folder = Path(mmmamba_edge.distill.__file__).parent / "recipes"
    recipe = read_distill_recipe(folder / f"mmmamba-{name}.toml")
    stages = [recipe.stage(number) for number in (1, 2, 3)]
    assert [stage.lr for stage in stages] == [1e-3, 5e-4, 5e-5]
    assert [(s.steps, s.batch, s.warmup, s.decay) for s in stages] == [
        (20000, 128, 2000, 2000), (20000, 128, 2000, 2000), (20000, 64, 2000, 2000)
    ]  # fmt: skip
    assert {(s.clip, s.weight_decay) for s in stages} == {(5.0, 0.05)}
    kept = attention_layers(recipe.student.attention_layers, 32)
    assert kept == ({0, 4, 8, 12, 16, 20, 24, 28} if name == "hybrid" else set())


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ("none", set()),
        ("head-interleaved 2", {0, 4}),
        ("tail-interleaved 2", {3, 7}),
        ("head-stacked 3", {0, 1, 2}),
        ("tail-stacked 3", {5, 6, 7}),
        ((1, 6), {1, 6}),
    ],
)
def test_attention_layers_by_name(choice, kept):
    assert attention_layers(choice, 8) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.attention_layers=[9]", r"attention layers \[9\] do not exist"),
        ("student.attention_layers=head-interleaved 3", "must be a divisor of 4"),
        ("student.attention_layers=checkered 2", "head-interleaved"),
        ("stage1.train=['w']", "train: unknown w; known are A_log_bias"),
        ("stage1.train=['o_proj.weight']", "o_proj.weight learns nothing from the heads"),
        ("stage1.steps=0", "steps must be at least 1"),
        ("stage1.steps=3", "warmup 2 and decay 2 are longer than steps 3"),
        ("stage1.colour=1", r"\[stage1\]: unknown key colour"),
        ("stage2.lr=fast", "lr = 'fast': expected float"),
        ("engine.teacher_bits=5", "teacher_bits must be one of 16, 8, 4"),
        ("data.kind=rows", "kind must be one of conversations, scenes"),
        ("data.count=99", "48 scenes there, 99 asked for"),
        ("validation.folder=scenes", "is the training data; hold other rows out"),
        ("stages=[2, 1]", "each once, in rising order"),
        ("teacher=nowhere", "nowhere"),
    ],
)
def test_bad_recipes(tmp_path, capsys, change, message):
    recipe = distilling.make(tmp_path)
    assert distill(recipe, tmp_path / "run", "--set", change) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run/stage1").exists(), "a corrected recipe may use the folder"


def test_a_student_is_no_teacher(linear, capsys):
    recipe, run = linear
    student = run / "stage3" / "checkpoint"
    assert distill(recipe, run.parent / "x", "--teacher", str(student)) == 2
    assert "a linear model; distillation needs a teacher" in capsys.readouterr().err
