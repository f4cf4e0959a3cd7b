# Every target sets up .venv on first use.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
READY := .venv/.installed

.PHONY: serve test test-clients lint bench bench-peers chaos clean

serve: $(READY)
	$(BIN)/expertline up --model nano --stages 2 --expert-parallel 2 --port $(PORT)

test: $(READY) chromium
	$(BIN)/pytest

# Other people's clients, each in an environment of its own under .clients/.
test-clients: $(READY)
	$(BIN)/python tests/clients/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The bench-1b shape (2.5 GB on disk, made on first use) at 1x1 and 2x2.
BENCH_MODEL ?= .bench/bench-1b
bench: $(READY)
	test -e $(BENCH_MODEL)/config.json || $(BIN)/expertline checkpoint random --shape bench-1b --out $(BENCH_MODEL)
	$(BIN)/expertline bench --model $(BENCH_MODEL) --threads 2 --batch 16 --prompt 256 --output 64 --json
	$(BIN)/expertline bench --model $(BENCH_MODEL) --stages 2 --expert-parallel 2 --batch 16 --prompt 256 --output 64 --json

# vLLM, Ray Serve LLM and transformers beside us, about 40 minutes; environments under .peers/.
bench-peers: $(READY)
	$(BIN)/python -m loadtest.peers

# Faults under load, every answer compared with the undisturbed one; about 35 minutes. As root on
# Linux also several nodes, in network namespaces.
chaos: $(READY) redis
	$(BIN)/python -m loadtest.chaos

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The browser that tests/console drives; without it those tests are skipped, not failed.
.PHONY: chromium
chromium:
	@if command -v chromium >/dev/null; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
			|| echo "chromium could not be installed: its tests will be skipped"; \
	else echo "chromium is not on PATH (Debian: apt-get install chromium): its tests will be skipped"; \
	fi

# The store of a cluster whose head dies; without it that scenario is skipped.
.PHONY: redis
redis:
	@if command -v redis-server >/dev/null; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server; } \
			|| echo "redis-server could not be installed: the loss of a head is skipped"; \
	else echo "redis-server is not on PATH (Debian: apt-get install redis-server): skipped"; \
	fi

clean:
	rm -rf .venv .clients .peers .bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache
