# The targets that CI and people call; the same commands everywhere.
.PHONY: format lint type test slow fuzz bench docs soak commit-checks

format:
	ruff check --fix-only .
	ruff format .

lint:
	ruff check .
	ruff format --check .

type:
	mypy

test:
	pytest

slow:
	pytest -m slow

# Inputs in all; `pip install -e ".[fuzz]"` first.
N = 100000
fuzz:
	PYTHONPATH=.:tests python -P -m fuzz.drive $(N)

bench:
	python -m hubrl.bench all

soak:
	python tests/soak.py

docs:
	PYTHONPATH=.:tests python -P tests/can_i_use.py

commit-checks: format lint type test
