PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# a few minutes on two cores; without --model, mode baseline trains all models
DEMO = popularity,sasrec,bsarec,rpg,tiger,pmat,pmat_mcrl

.PHONY: demo test test-all lint clean

demo: $(VENV)/.installed
	$(BIN)/python main.py --mode baseline --dataset mock --model $(DEMO)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
