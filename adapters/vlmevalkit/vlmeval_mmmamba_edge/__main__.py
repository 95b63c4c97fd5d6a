"""Run VLMEvalKit's run.py with our model class known to it; all other arguments are run.py's."""

import runpy
import sys
from pathlib import Path

import vlmeval_mmmamba_edge  # noqa: F401  importing it is what makes the class known

if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
    sys.exit("usage: python -m vlmeval_mmmamba_edge VLMEvalKit/run.py --config models.json ...")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
