"""`mmmamba-edge distill`: a teacher to mmMamba-linear or hybrid, in three stages."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from mmmamba_edge.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml", help="docs/distillation.md")
    parser.add_argument(
        "--stage", choices=("1", "2", "3", "all"), default="all",
        help="one stage, from the one before it in --out; default: all of the recipe's",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--init", type=Path, metavar="STUDENT",
        help="checkpoint whose mixers the first stage starts from, with a fresh optimiser",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--teacher", type=Path, help="checkpoint folder, instead of the recipe's")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override a key of the recipe, as in --set stage1.steps=100; may be repeated",
    )  # fmt: skip
    parser.epilog = (
        "example: mmmamba-edge distill distill/recipes/mmmamba-linear.toml --teacher HoVLE --out "
        "runs/linear\n"
        "         torchrun --nproc-per-node 8 -m mmmamba_edge distill RECIPE.toml --out runs/linear"
    )


def run(args: argparse.Namespace) -> int:
    """The verb."""
    from mmmamba_edge.distill import stage1, stage2, stage3
    from mmmamba_edge.distill.distill_recipe import read_distill_recipe
    from mmmamba_edge.distill.engine import Engine
    from mmmamba_edge.distill.run import open_run

    overrides = _overrides(args.set)
    if args.teacher:
        overrides["teacher"] = str(args.teacher.resolve())
    recipe = read_distill_recipe(args.recipe, overrides)
    engine = Engine(args.device, bf16=recipe.engine.bf16, shard=recipe.engine.shard)
    stages = {1: stage1.run_stage, 2: stage2.run_stage, 3: stage3.run_stage}
    wanted = recipe.stages if args.stage == "all" else (int(args.stage),)
    if not wanted or set(wanted) - set(recipe.stages):
        raise UserError(f"--stage {args.stage}: the recipe has stages {list(recipe.stages)}")
    try:
        whole = open_run(recipe, engine, args.out, resume=args.resume, init=args.init)
        for number in wanted:
            if whole.finished(number) is not None and args.resume:
                whole.check(number)
                continue
            before = [n for n in recipe.stages if n < number]
            start = whole.finished(before[-1]) if before else None
            if start is not None:
                replace(whole, resume=True).check(before[-1])  # to start from, it need not go on
            if before and start is None:
                raise UserError(
                    f"{args.out / f'stage{before[-1]}'}: stage {before[-1]} is not finished there; "
                    f"run it first, or leave it out of the recipe's stages"
                )
            stages[number](whole, start)
    except KeyboardInterrupt:
        print(f"\nstopped; --resume goes on from what {args.out} holds", file=sys.stderr)
        raise
    finally:
        engine.close()
    return 0


def _overrides(pairs: list[str]) -> dict[str, str]:
    out = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: expected KEY=VALUE, as in stage1.steps=100")
        out[key.strip()] = value.strip()
    return out
