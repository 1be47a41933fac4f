# Everything runs in .venv, which these targets make themselves (uv where present, otherwise venv and pip).
SHELL := /bin/bash
PYTHON ?= python3.11
BROKER ?= embedded
ORDERS ?= 200
# Test processes side by side, each with servers of its own. A file's tests stay together, and share them.
JOBS ?= 3
VENV := .venv
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-debian13 test-postgres lint format bench faults schema docs docs-site pictures dist dist-test deb deb-test clean

help: ## Shows this list.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 15

demo: $(STAMP) ## Runs the main job: orders become events, messages and invoices (BROKER=rabbitmq|pubsub, ORDERS=200).
	$(VENV)/bin/pgbridge demo --broker $(BROKER) --orders $(ORDERS)

test: $(STAMP) servers ## Installs the servers that the tests need, and runs all tests (JOBS=3 processes, PYTEST= more words).
	$(VENV)/bin/pytest --numprocesses $(JOBS) --dist loadfile $(PYTEST)

test-debian13: $(STAMP) ## Runs all tests in a folder with Debian 13: PostgreSQL 17, RabbitMQ 4.0, Python 3.13 (as root; debootstrap; JOBS=, PYTEST=).
	JOBS=$(JOBS) $(VENV)/bin/python -m tests.release trixie $(PYTEST)

test-postgres: $(STAMP) servers ## Runs the tests on another PostgreSQL than 18: VERSION=14 to 17 (JOBS=, PYTEST= as for test).
	programs=$$(deploy/postgres-programs $(VERSION)) && \
	  POSTGRES_PROGRAMS=$$programs $(VENV)/bin/pytest --numprocesses $(JOBS) --dist loadfile $(PYTEST)

lint: $(STAMP) ## Checks format, style, types and import directions.
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(STAMP) ## Formats the code.
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(STAMP) servers ## Measures every row of docs/performance.md beside its peers (QUICK=1: some 3 minutes).
	$(VENV)/bin/python -m tests.bench $(if $(QUICK),--quick)

faults: $(STAMP) servers ## Breaks everything under load, and counts what was lost (FAULTS=100 for each of 3 seeds, SEED=, ON=rabbitmq|nats|pubsub).
	$(VENV)/bin/python -m tests.faults $(if $(ON),--broker $(ON)) $(if $(FAULTS),--faults $(FAULTS)) $(if $(SEED),--seed $(SEED))

schema: $(STAMP) ## Writes sql/schema.sql from the migrations.
	$(VENV)/bin/python -m bridge.postgres.schema > sql/schema.sql

.PHONY: servers
servers:
	@deploy/install-test-servers

$(STAMP): pyproject.toml requirements.txt
	if command -v uv > /dev/null; then uv venv --quiet --allow-existing --python $(PYTHON) $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi
	if command -v uv > /dev/null; then uv pip install --quiet --python $(VENV)/bin/python -r requirements.txt -e '.[dev]'; \
	  else $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'; fi
	touch $@

docs: $(STAMP) ## Writes docs/settings.md, docs/bridge.schema.json and docs/commands.md from the models and the commands.
	$(VENV)/bin/python -m bridge.settings.document docs
	PYTHONPATH=$(CURDIR) $(VENV)/bin/python deploy/commands_page.py docs

docs-site: $(STAMP) ## Builds the documentation as a site, build/site, and fails at a link that leads nowhere.
	$(VENV)/bin/python -m mkdocs build --strict

pictures: $(STAMP) servers ## Draws docs/pictures/: what commands print on a terminal of 80 columns, and the console over the demo.
	$(VENV)/bin/python -m tests.pictures
	$(VENV)/bin/python -m tests.console_pictures

dist: $(STAMP) ## Builds the source archive, and from it the wheel, in build/dist.
	rm -rf build/dist
	$(VENV)/bin/python -m build --outdir build/dist .

dist-test: $(STAMP) servers ## Installs that wheel in a clean environment, and runs demo, tutorial and contract tests on it (some minutes).
	$(VENV)/bin/pytest -m packages tests/packages/test_dist.py $(PYTEST)

deb: ## Builds build/pgbridge_<version>_<arch>.deb, with a virtual environment inside, for the Debian release that this is.
	@deploy/build-deb

deb-test: $(STAMP) ## Builds, installs, upgrades and purges that package in a Debian 12 and a Debian 13 folder (as root; debootstrap).
	$(VENV)/bin/pytest -m packages tests/packages $(PYTEST)

clean: ## Removes what the other targets made.
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
