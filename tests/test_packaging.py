"""The tree and what may import what: one name for each module, torch only where it belongs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("export", "quant", "runtimes", "distill")
TORCH_FREE = ("mmmamba_edge", "runtimes")  # but for the model and torch_runner


def packages():
    """Import name -> folder, for every folder with an __init__.py."""
    found = {}
    for top in ("mmmamba_edge", *ROOMS):
        for init in sorted((ROOT / top).rglob("__init__.py")):
            folder = init.parent.relative_to(ROOT)
            if folder.parts[0] == "mmmamba_edge" and len(folder.parts) > 1:
                if folder.parts[1] in ROOMS:  # reached through a link
                    continue
            name = ".".join(folder.parts)
            found[name if top == "mmmamba_edge" else f"mmmamba_edge.{name}"] = folder
    return found


def modules():
    """Import name -> file, for every module of ours."""
    out = {}
    for package, folder in packages().items():
        for file in (ROOT / folder).glob("*.py"):
            out[package if file.stem == "__init__" else f"{package}.{file.stem}"] = file
    return out


def imports_of(file, *, top_level_only):
    """Modules that a file imports (without those inside functions or TYPE_CHECKING blocks)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_package_is_in_pyproject():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(packages())
    for package, folder in packages().items():
        if folder.parts[0] in ROOMS:
            assert setuptools["package-dir"][package] == folder.as_posix()


@pytest.mark.parametrize("room", ROOMS)
def test_links_point_to_the_rooms(room):
    assert (ROOT / "mmmamba_edge" / room).resolve() == ROOT / room


def test_no_module_is_named_like_a_dependency():
    taken = {"onnx", "onnxruntime", "torch", "tokenizers", "safetensors", "numpy", "executorch"}
    taken |= {"gguf", "optimum", "transformers", "accelerate", "torchao", "utils", "helpers"}
    assert not {name.rsplit(".", 1)[-1] for name in modules()} & taken


VERBS = ("check_", "quantize_")


def test_who_imports_whom():
    """core <- quant <- export; core <- distill; core <- runtimes, which import no other.

    quant's check_* and quantize_* modules, its two verbs, stand above all of them: they run what
    was exported, and read a checkpoint layer by layer.
    """
    allowed = {
        "quant": {"quant"},
        "export": {"export", "quant", "runtimes"},
        "distill": {"distill", "runtimes"},
        "runtimes": {"runtimes"},
    }
    wrong = []
    for name, file in modules().items():
        parts = name.split(".")
        room = parts[1] if len(parts) > 1 and parts[1] in ROOMS else None
        for target in imports_of(file, top_level_only=True):
            words = target.split(".")
            other = words[1] if words[0] == "mmmamba_edge" and len(words) > 1 else None
            may = allowed[room] if room else {"runtimes"}
            if parts[-1].startswith(VERBS) and room == "quant":
                may = set(ROOMS)
            elif words[-1].startswith(VERBS) and other == "quant":
                wrong.append(f"{name} imports {target}")
            if other in ROOMS and other not in may:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_torch_stays_in_its_rooms():
    wrong = []
    for name, file in modules().items():
        top = file.relative_to(ROOT).parts
        if top[0] not in TORCH_FREE or name.endswith(".torch_runner") or top[1] == "model":
            continue
        loads = {m.split(".")[0] for m in imports_of(file, top_level_only=True)}
        if loads & {"torch", "onnx", "onnxruntime", "executorch"}:
            wrong.append(name)
    assert wrong in ([], ["mmmamba_edge.runtimes.onnxruntime_runner"])


def test_import_and_help_load_no_torch():
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime'): sys.modules[name] = None\n"
        "import mmmamba_edge\n"
        "from mmmamba_edge.cli import main\n"
        "for argv in (['--help'], ['chat', '--help'], ['eval', '--help']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout


def test_files_stay_small():
    """Binary assets: 12 MiB a file, 40 MiB in all; no machine's paths or registry hosts."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in listed if (ROOT / name).is_file()}
    assert not [name for name, size in sizes.items() if size > 12 << 20]
    binary = (".safetensors", ".onnx", ".pte", ".png", ".npy", ".data", ".bin", ".jpg")
    assert sum(size for name, size in sizes.items() if name.endswith(binary)) < 40 << 20
    assert not [name for name in sizes if name.endswith((".pt", ".pth", ".pkl", ".pickle"))]
