# Two commands do all the set-up on a fresh machine:  make chat   and   make test
PYTHON ?= python3
CHAT_VENV := .venv-chat
TEST_VENV := .venv
TORCH := torch==2.13.0

.PHONY: chat test lint wheel clean

# Talk to the embedded default bundle. Installs NumPy, Pillow, tokenizers, safetensors and ONNX Runtime.
chat: $(CHAT_VENV)/ready
	@$(CHAT_VENV)/bin/mmmamba-edge chat $(ARGS)

test: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/pyright
	$(TEST_VENV)/bin/pytest -n 2 $(ARGS)

lint: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check --fix .
	$(TEST_VENV)/bin/ruff format .
	$(TEST_VENV)/bin/pyright

wheel: $(TEST_VENV)/ready
	rm -rf build dist
	$(TEST_VENV)/bin/python -m build --wheel --outdir dist .

$(CHAT_VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(CHAT_VENV)
	$(CHAT_VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[onnxruntime]"
	@touch $@

# torch first, at exactly this version: asked for as a range, pip would fetch gigabytes of CUDA.
$(TEST_VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(TEST_VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info $(CHAT_VENV) $(TEST_VENV)
