# Every target sets up what it needs: a bare Python is enough. `make help` lists them.
PYTHON ?= python3
PROBLEM ?= digits-cnn
OUT ?= report
SECONDS ?= 300

BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help report test lint types format docs figures bench-statistics bench-floors bench-operators bench-resnet \
	bench-gp bench-gp-million bench-tomography bench-tomography-quality bench-tomography-phantom bench-noise bench-optimisers \
	bench-defaults bench-posteriors bench-quality bench-sampled bench-bias bench-cuda peers install clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

report: $(STAMP) ## train PROBLEM (digits-cnn), measure it, and write the report to OUT (report)
	$(BIN)/paraboloid inspect $(PROBLEM) --out $(OUT)
	@echo "The report: $(abspath $(OUT))/report.html"

test: $(STAMP) ## run the tests, one process for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check types
	$(BIN)/pyright

format: $(STAMP) ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation into site/; a broken link fails
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The documentation: $(abspath site)/index.html"

figures: $(STAMP) ## draw the figures of the documentation
	$(BIN)/python docs/gallery/make.py
	$(BIN)/python docs/figures/bias.py
	$(BIN)/python docs/figures/gp.py

bench-statistics: $(STAMP) ## time the statistics against a plain gradient (peers too: make peers)
	$(BIN)/python -m benchmarks.statistics

bench-floors: $(STAMP) ## time the pieces that the statistics cannot do without
	$(BIN)/python -m benchmarks.floors

bench-operators: $(STAMP) ## time the curvature operators against a plain gradient (peers too: make peers)
	$(BIN)/python -m benchmarks.operators

bench-resnet: $(STAMP) ## time KFAC and EKFAC of ResNet-18, with their memory
	$(BIN)/python -m benchmarks.resnet

bench-noise: $(STAMP) ## time gradient clustering against an epoch of plain gradients
	$(BIN)/python -m benchmarks.noise

bench-gp: $(STAMP) ## time Gaussian processes against GPyTorch's (after: make peers), and at scale
	$(BIN)/python -m benchmarks.gp
	$(BIN)/python -m benchmarks.gp --scale 20000

bench-gp-million: $(STAMP) ## condition on a million points for SECONDS (300) of CPU time, and say what was reached
	$(BIN)/python -m benchmarks.gp --scale 1000000 --samples 0 --solvers block inducing --seconds $(SECONDS)

bench-tomography: $(STAMP) ## time products with a projector against MIRTorch's (after: make peers)
	$(BIN)/python -m benchmarks.tomography

bench-tomography-quality: $(STAMP) ## reconstruct the published protocol's 50 characters, going on where it stopped
	$(BIN)/python -m benchmarks.tomography_quality

bench-tomography-phantom: $(STAMP) ## reconstruct scikit-image's phantom at 128 x 128 (after: pip install scikit-image)
	$(BIN)/python -m benchmarks.tomography_phantom

bench-bias: $(STAMP) ## time pb.bias on digits-cnn, and two-batch curvature in gradients
	$(BIN)/python -m benchmarks.bias

bench-optimisers: $(STAMP) ## time steps of the optimisers against Adam's, with the state they keep
	$(BIN)/python -m benchmarks.optimisers

bench-defaults: $(STAMP) ## train every problem with every optimiser as it comes; goes on where it was stopped
	$(BIN)/python -m benchmarks.defaults

bench-posteriors: $(STAMP) ## time fitting and predicting Laplace posteriors, with their memory (peers too: make peers)
	$(BIN)/python -m benchmarks.posteriors
	$(BIN)/python -m benchmarks.posteriors --memory

bench-sampled: $(STAMP) ## measure sampled Laplace of ResNet-50: a step in gradients, memory by samples
	$(BIN)/python -m benchmarks.sampled

bench-quality: $(STAMP) ## measure likelihood, calibration and detection of noise on few digits (after: make peers)
	$(BIN)/python -m benchmarks.posterior_quality
	$(BIN)/python -m benchmarks.posterior_use
	$(BIN)/python -m benchmarks.posterior_untouched
	$(BIN)/python -m benchmarks.posterior_threshold
	$(BIN)/python -m benchmarks.posterior_tuning

bench-cuda: $(STAMP) ## time everything on a CUDA device (in an environment whose torch has one)
	$(BIN)/python -m benchmarks.cuda

# --no-deps: BackPACK and laplace-torch ask for torchvision, which nothing here uses and which would bring its own torch.
peers: $(STAMP) ## install the packages that the benchmarks compare with
	$(BIN)/python -m pip install --quiet -c constraints.txt einconv einops linear_operator opt_einsum tqdm unfoldNd scipy \
		torchmetrics
	$(BIN)/python -m pip install --quiet --no-deps backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 opacus==1.6.0 \
		PyHessian==0.1 laplace-torch==0.3 asdfghjkl asdl gpytorch==1.15.2 jaxtyping wadler_lindig mpmath \
		mirtorch==0.4.0 torchkbnufft PyWavelets

install: $(STAMP) ## only set up the environment in .venv

# The stamp is written last, so an interrupted set-up is simply done again. An environment whose Python is missing or
# lacks pip (interrupted before ensurepip ended) is rebuilt; any other is completed in place.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: paraboloid needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another one: make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "make: '$(PYTHON) -m venv' failed; on Debian install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean: ## remove the environment, caches, the built documentation and the report
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info site $(OUT)
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
