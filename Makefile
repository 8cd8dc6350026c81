# Every task by one name. Each sets up .venv by itself, once: the stamp follows settings.ini.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHELL  := /bin/bash
ARGS   ?=
JOBS   ?= auto

.PHONY: run test lab export readme docs bench clean lint help
.DELETE_ON_ERROR:

$(VENV)/stamp-run: settings.ini setup.py pyproject.toml
	@echo "== setting up $(VENV): the package and what it needs (once; torch takes a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lesson11 needs Python >= 3.10; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp-run
	@echo "== adding the notebook and test tools to $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[nb,dev,docs]'
	@touch $@

# The site is made of text: neither the package nor torch need be there.
$(VENV)/stamp-docs: settings.ini
	@echo "== adding Sphinx to $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python -c "import configparser as c; i=c.ConfigParser(); i.read('settings.ini'); print(i['DEFAULT']['docs_requirements'])")
	@touch $@

$(VENV)/stamp-bench: $(VENV)/stamp-dev
	@echo "== adding the peers to $(VENV) (once; one that does not install is skipped by name)"
	@for p in $$($(BIN)/python -c "import configparser as c; i=c.ConfigParser(); i.read('settings.ini'); print(i['DEFAULT']['bench_requirements'])"); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$p" || echo "   skipped: $$p"; done
	@touch $@

run: $(VENV)/stamp-run       ## train on Imagenette (the sample where there is no network), print the table
	@$(BIN)/exp-train $(ARGS)

test: $(VENV)/stamp-dev      ## every test, every notebook among them, a process a core and one more (make test JOBS=0: in this one)
	@echo "== tests (notebooks included)"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lab: $(VENV)/stamp-dev       ## open the course in JupyterLab
	@echo "== JupyterLab on the repository, at nbs/index.ipynb"
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

export: $(VENV)/stamp-dev    ## nbs/ -> exp/, tables of notebooks into nbs/index.ipynb, README.md from it
	@echo "== exporting nbs/ to exp/"
	@$(BIN)/exp-export $(ARGS)
	@$(MAKE) --no-print-directory readme

readme: $(VENV)/stamp-dev    ## tables of notebooks into nbs/index.ipynb, README.md from it
	@echo "== tables of notebooks into nbs/index.ipynb, README.md from it"
	@$(BIN)/python tests/house.py --index
	@$(BIN)/python -m exp.export --readme

docs: $(VENV)/stamp-docs     ## the course as a site and a book: build/site/index.html, build/lesson11.epub; no notebook is run
	@echo "== the course as build/site/index.html and build/lesson11.epub"
	@$(BIN)/python -m sphinx -q -W --keep-going -j auto -d build/doctrees -c docs . build/site $(ARGS)
	@$(BIN)/python -m sphinx -q -b epub -D html_math_renderer=mathml -d build/epub-doctrees -c docs . build/epub $(ARGS)
	@cp build/epub/lesson11.epub build/

lint: $(VENV)/stamp-dev      ## what ruff finds to complain of, in notebooks too
	@$(BIN)/ruff check .

bench: $(VENV)/stamp-bench   ## ours beside the peers, one table of medians and ratios
	@echo "== benchmarks"
	@$(BIN)/python -m benchmarks $(ARGS)

clean:                       ## remove what the other tasks made, .venv included; data under ~/.fastai stays
	@echo "== removing $(VENV), build products and caches"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .out
	@find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

help:                        ## what there is to make, this list among it
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1 \2/p' Makefile | while read -r task text; do printf '%-8s %s\n' "$$task" "$$text"; done
