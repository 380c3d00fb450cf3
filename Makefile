# make demo: the four commands with their defaults and the baseline SASRec, ending in the results table.
# make test: style and tests. make fuzz: ten thousand spoilt inputs to every reader.
# make bench: this project against TRL, into bench/RESULTS.md. All make .venv and install into it what they need;
# make install does that alone.

PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test fuzz bench clean

install: .venv/installed

demo: .venv/installed
	$(BIN)/python prepare_data.py
	$(BIN)/python prepare_data.py --show 1
	$(BIN)/python sft.py --overwrite
	$(BIN)/python dpo_hano.py --sigma 0.05 --overwrite
	$(BIN)/python -m hanorec.ranking.sasrec
	$(BIN)/python evaluate.py

test: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n auto --dist worksteal

fuzz: .venv/tests
	$(BIN)/python tests/fuzz.py --inputs 10000

bench: .venv/tests
	$(BIN)/python -m pip install --quiet -r bench/requirements.txt
	$(BIN)/python bench/run.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/tests: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data/demo runs/demo
