# Two commands do all the set-up: `make demo` and `make test`. Everything else is for those who work on the house.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
UV     := $(VENV)/bin/uv
export ORT_DISABLE_TELEMETRY := 1
# Tests start hundreds of programs: each would compile all that it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-fast test-faults stack stack-down bench bench-peers lint proto constraints clean
TEST_RUN := $(CURDIR)/.stack/test
STACK    := MODELYARD_TEST_RUN=$(TEST_RUN) $(PY) -m infra.stack
WITH_STACK := $(STACK) stop >/dev/null; rm -rf $(TEST_RUN); $(STACK) start --available; trap '$(STACK) stop' EXIT; \
  export MODELYARD_TEST_RUN=$(TEST_RUN);
EMBEDDED := MODELYARD_TEST_RUN=$(CURDIR)/.stack/none MODELYARD_TEST_CONTAINERS=0

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ —/' | sort

$(UV):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here: install Python 3.11 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Modelyard needs Python 3.11 or newer; say make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.demo: $(UV) pyproject.toml constraints.txt
	@echo "installing Modelyard and what the demo needs …"
	@$(UV) pip install --quiet --python $(PY) --constraint constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test: $(UV) pyproject.toml constraints.txt
	@echo "installing Modelyard and what its tests need …"
	@$(UV) pip install --quiet --python $(PY) --constraint constraints.txt -e '.[demo,test,lint]'
	@touch $@

demo: $(VENV)/.demo          ## the whole path on this machine: register, build, deploy, score, capture, watch
	@$(PY) demo/run.py

test: $(VENV)/.test          ## every test, on the embedded parts and on every real server that this machine can run
	@$(WITH_STACK) $(PY) -m pytest -m "not slow" -n 3 --dist loadfile && $(PY) -m pytest -m "slow and not fault" -n 2 --dist loadfile

test-fast: $(VENV)/.test     ## the tests that take less than a minute together, on the embedded parts
	@$(EMBEDDED) $(PY) -m pytest -m "not slow" -n 3 --dist loadfile

test-faults: $(VENV)/.test   ## kills, freezes and cuts real servers under load (about half an hour)
	@$(WITH_STACK) $(PY) -m pytest -m fault -s

stack: $(VENV)/.test         ## Kafka, MongoDB, Azurite, Docker and a registry as programs on this machine
	@$(PY) -m infra.stack start

stack-down:                  ## stops exactly what make stack started
	@$(PY) -m infra.stack stop

bench: $(VENV)/.test         ## the benchmarks; prints figures, judges nothing
	@for b in tests/benchmarks/*.py; do echo "== $$b"; $(PY) $$b || exit 1; done

PEERS ?=
ROWS ?=
TRANSPORTS ?=
SECONDS ?= 2
ROUNDS ?= 3
bench-peers: $(VENV)/.test   ## our scoring server beside its peers, in ratios; PEERS=kserve,mlserver ROWS=lr,rf SECONDS=1
	@$(PY) -m tests.benchmarks.peers.run --peers "$(PEERS)" --rows "$(ROWS)" --transports "$(TRANSPORTS)" \
	  --seconds $(SECONDS) --rounds $(ROUNDS)

lint: $(VENV)/.test          ## ruff, mypy, the floors, generated code is up to date
	@$(VENV)/bin/ruff check services tests demo infra
	@$(VENV)/bin/mypy services/modelyard
	@$(VENV)/bin/lint-imports --no-cache
	@sh infra/generated.sh check

proto: $(VENV)/.test         ## make the generated code and the event schemas again
	@sh infra/generated.sh write

constraints: $(UV)           ## resolve the versions that everything is tested with anew
	@{ echo "# The versions that CI runs with; \`make constraints\` resolves them anew."; \
	  $(UV) pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate; } > .constraints
	@mv .constraints constraints.txt

clean:                       ## forget the virtual environment and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
