# On a fresh Debian 12 machine with git, make and root (or sudo): `make demo` and `make test` install what they need.

.PHONY: help ready build lint test test-sanitized test-modes test-stress test-engines demo bench profile clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo   mount a stack of layers with a Debian root in it, look at it, and run a container of it'
	@echo 'make test   every check there is, but for those below'
	@echo 'make test-sanitized   most of it once more, with ASan and UBSan'
	@echo 'make test-modes   crashes, hostile layers and many filesystems over io_uring and with files passed through'
	@echo 'make test-stress   many clients at once for minutes; SECONDS=600 for longer'
	@echo 'make test-engines   podman, buildah, skopeo, Docker and containerd on our mounts'
	@echo 'make bench  measure every peer; a part of it with ONLY=walk,untar PEERS=kernel,portable ROUNDS=5'
	@echo 'make profile WORKLOAD=untar   what the kernel asks, and where the daemon spends its time'
	@echo 'make build  compile the hot modules beside their sources'
	@echo 'make clean  remove everything made here'

ifneq ($(shell id -u),0)

ready build lint test test-sanitized test-modes test-stress test-engines demo bench profile clean:
	@exec sudo $(MAKE) --no-print-directory $@ $(MAKEOVERRIDES)

else

PYTHON := .venv/bin/python
PYTEST := tools/leaves-nothing $(PYTHON) -m pytest -p tests.noskip -p no:cacheprovider --quiet
# The tests of one file share mounts, so they stay together.
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadscope

# Not what counts a daemon's memory; and where clients fault by design, daemons alone are sanitized.
SANITIZED := tests/native tests/core tests/crash tests/faults tests/filesystems tests/hostile \
	$(filter-out %/test_memory.py,$(wildcard tests/options/test_*.py))

ready:
	@tools/bootstrap

build: ready
	@$(PYTHON) setup.py --quiet build_ext --inplace
	@# As an installation has it, also where Python is told to leave no bytecode behind: a mount takes half as long.
	@$(PYTHON) -m compileall -q overlayfs_py mount_helper

lint: build
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m mypy --no-error-summary
	@.venv/bin/lint-imports --no-logo >build/import-contract || { cat build/import-contract; exit 1; }

test: lint
	@echo '== the types, the style and the imports are fine'
	@echo '== the core, from source'
	@$(PYTEST) -p tests.pure tests/core tests/test_modes.py
	@echo '== everything, compiled'
	@tools/debian-tree >build/debian-tree
	@$(PYTEST) $(PARALLEL) --ignore=tests/engines

test-sanitized: build
	@echo '== all that drives a daemon, with ASan and UBSan'
	@$(subst $(PYTHON),tools/sanitized,$(PYTEST)) $(PARALLEL) $(SANITIZED)
	@echo '== the same daemons under the POSIX corpus, and compared with the kernel'
	@$(subst $(PYTHON),tools/sanitized --daemons,$(PYTEST)) $(PARALLEL) tests/posix tests/differential

test-modes: build
	@for options in uring=on io=passthrough,uring=on; do \
	    echo "== crashes, hostile layers and filesystems, with $$options" && \
	    OVERLAYFS_PY_TEST_OPTIONS=$$options $(PYTEST) $(PARALLEL) tests/crash tests/hostile tests/filesystems || exit 1; \
	done

test-stress: build
	@echo '== many clients at once, over each transport'
	@OVERLAYFS_PY_TEST_SECONDS=$(or $(SECONDS),60) $(PYTEST) tests/native/test_stress.py

test-engines: build
	@tools/bootstrap --engines
	@echo '== the container engines on our mounts'
	@$(PYTEST) $(PARALLEL) tests/engines

demo: build
	@tools/demo

bench: build
	@tools/leaves-nothing $(PYTHON) -m benchmarks run --only '$(ONLY)' --peers '$(PEERS)' $(if $(ROUNDS),--rounds $(ROUNDS))

profile: build
	@tools/leaves-nothing $(PYTHON) -m benchmarks profile '$(WORKLOAD)' $(if $(PEERS),--peers '$(PEERS)') $(if $(ROUNDS),--rounds $(ROUNDS))

clean:
	rm -rf .venv .cache build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find overlayfs_py -name '*.so' -delete

endif
