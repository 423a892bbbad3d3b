# grpo_lite: every target one line, documented by `##`. `make` alone prints this help.
RECIPE ?= quickstart
RUN    ?= runs/$(RECIPE)
ARGS   ?=
PYTHON ?= python3
VENV   ?= .venv
GPU    ?=
GPUS   ?= 1
BACKEND ?= auto
CLI    := $(VENV)/bin/grpo-lite
LAUNCH := $(VENV)/bin/accelerate launch --config_file launch/ddp.yaml --num_processes $(GPUS)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev plan backends probe train warmup eval merge export push verify chat recipes show check check-rewards check-env report compare watch ui reproduce reproduce-anchor doctor test test-slow test-all test-newest test-oldest lint clean

help:  ## Print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: RECIPE=%s  RUN=%s  ARGS="grpo.max_steps=50 data.train.path=my.jsonl"  VENV=%s\n' "$(RECIPE)" "$(RUN)" "$(VENV)"

setup: $(VENV)/.ready$(if $(filter unsloth,$(BACKEND)),-unsloth)  ## Install everything a run needs into .venv (other targets do it if needed); adds Unsloth if there is an NVIDIA driver, unless BACKEND=hf

setup-dev: $(VENV)/.ready-dev  ## Install what the tests and the linters need

plan: $(VENV)/.ready  ## Plan the memory of RECIPE on GPU=t4|rtx4060-8|…|11GiB, and what fits into BUDGET=3h; ARGS=--all-gpus for the tables
	@$(CLI) plan $(if $(findstring --all-gpus,$(ARGS)),,"$(RECIPE)") $(if $(GPU),--gpu $(GPU)) $(if $(BUDGET),--budget "$(BUDGET)") $(ARGS)

backends: $(VENV)/.ready  ## Time hf and unsloth on RECIPE; `auto` then takes the faster one on this GPU
	@$(CLI) backends $(RECIPE) $(ARGS)

probe: $(VENV)/.ready  ## Estimate in minutes whether RECIPE can learn: samples the untrained model on its prompts
	@$(CLI) probe "$(RECIPE)" $(ARGS)

train: $(VENV)/.ready  ## Train RECIPE into RUN, evaluate base and trained model, merge; resumes an interrupted run; BUDGET=3h GPUS=2
	@$(if $(filter-out 1,$(GPUS)),$(LAUNCH) -m grpo_lite.cli,$(CLI)) train "$(RECIPE)" --run "$(RUN)" $(if $(BUDGET),--budget "$(BUDGET)") $(ARGS)

warmup: $(VENV)/.ready  ## Run the warm-up of RECIPE alone, into RUN; `make train` on the same RUN continues with GRPO; GPUS=2
	@$(if $(filter-out 1,$(GPUS)),$(LAUNCH) -m grpo_lite.cli,$(CLI)) warmup "$(RECIPE)" --run "$(RUN)" $(ARGS)

eval: $(VENV)/.ready$(if $(findstring --lm-eval,$(ARGS)),-lm-eval)  ## Evaluate the base and the trained model of RUN again; ARGS="--lm-eval gsm8k" on other tasks
	@$(CLI) eval "$(RUN)" $(ARGS)

merge: $(VENV)/.ready  ## Merge RUN's adapter into the 16-bit base, and verify it
	@$(CLI) merge "$(RUN)" $(ARGS)

export: $(VENV)/.ready  ## Check RUN's merged model file by file, merging first if needed; GGUF=q8_0 for Ollama, NF4=1 for 4 bits
	@$(CLI) export "$(RUN)" $(foreach kind,$(GGUF),--gguf $(kind)) $(if $(NF4),--nf4) $(ARGS)

push: $(VENV)/.ready  ## Push RUN to REPO=user/name on the Hub; WHAT=adapter|merged|gguf PRIVATE=1 DRY_RUN=1 FORCE=1
	@$(CLI) push "$(RUN)" $(REPO) $(if $(WHAT),--what $(WHAT)) $(if $(PRIVATE),--private) $(if $(DRY_RUN),--dry-run) $(if $(FORCE),--force) $(ARGS)

verify: $(VENV)/.ready  ## Check every file of DIR (adapter, merged, GGUF …) against its sha256 sums
	@$(CLI) verify $(if $(DIR),"$(DIR)")

chat: $(VENV)/.ready  ## Chat with RUN's model, or ask it one PROMPT="…"; ARGS=--compare shows the base model's answers too
	@$(CLI) chat "$(RUN)" $(if $(PROMPT),"$$PROMPT") $(ARGS)

recipes: $(VENV)/.ready  ## List the recipes: model, data, least GPU
	@$(CLI) recipes

show: $(VENV)/.ready  ## Print the resolved RECIPE, with ARGS
	@$(CLI) show "$(RECIPE)" $(ARGS)

check: $(VENV)/.ready  ## Validate RECIPE, preview its prompts, score its gold answers; trains nothing
	@$(CLI) check "$(RECIPE)" $(ARGS)

check-rewards: $(VENV)/.ready  ## Score gold answers and many cheats with RECIPE's rewards
	@$(CLI) rewards check "$(RECIPE)" $(ARGS)

check-env: $(VENV)/.ready  ## Play RECIPE's environment with its gold policy, its cheats and random calls
	@$(CLI) check-env "$(RECIPE)" $(ARGS)

report: $(VENV)/.ready  ## Write RUN's report.html: verdict, curves, completions on one page (train writes it too)
	@$(CLI) report "$(RUN)"

compare: $(VENV)/.ready  ## Compare RUNS="runs/a runs/b" on one page, compare.html
	@$(CLI) compare $(RUNS) $(ARGS)

watch: $(VENV)/.ready  ## Follow RUN from another terminal
	@$(CLI) watch "$(RUN)" $(ARGS)

ui: $(VENV)/.ready-ui  ## Serve a local page over runs/: live curves and completions, compare, plan, ask; adds starlette and uvicorn
	@$(CLI) watch --web $(ARGS)

reproduce: $(VENV)/.ready  ## Run RUN's recipe again and compare the results (ARGS=--dry-run only lists what differs)
	@$(CLI) reproduce "$(RUN)" $(ARGS)

reproduce-anchor: $(VENV)/.ready  ## Train RECIPE=anchors/… and say in one line whether it is inside the published band
	@$(CLI) reproduce-anchor "$(RECIPE)" --run "$(RUN)" $(ARGS)

doctor: $(VENV)/.ready  ## Diagnose RUN and say what to change; without RUN, describe this machine
	@$(CLI) doctor $(if $(filter command line environment,$(origin RUN)),"$(RUN)")

test: $(VENV)/.ready-dev  ## Run the tests (no network, no GPU)
	@HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.ready-dev  ## Run the slow tests that take minutes (CI runs them after `test`)
	@HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "slow and not matrix and not gpu" $(ARGS)

test-all: $(VENV)/.ready-dev  ## Run all tests, the kill matrices of several hours among them
	@HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal $(ARGS)

test-newest: constraints/newest.txt  ## Run the tests on the newest upstream that pyproject.toml allows, in .venv-newest
test-oldest: constraints/oldest.txt  ## Run the tests on the versions that Unsloth brings, in .venv-oldest
test-newest test-oldest:
	@PIP_CONSTRAINT="$(CURDIR)/$<" $(MAKE) --no-print-directory test VENV=.venv-$(@:test-%=%)

.venv-newest/.ready: constraints/newest.txt
.venv-oldest/.ready: constraints/oldest.txt

lint: $(VENV)/.ready-dev  ## Check style (ruff) and types (mypy)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

lock: $(VENV)/.ready-dev  ## Write a uv.lock of your own: exact versions with hashes (ARGS=--upgrade takes newer ones)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" uv lock $(ARGS)

clean:  ## Remove caches and build files; runs/ and .venv stay
	@rm -rf build *.egg-info rewards/build rewards/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis && find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml
	$(if $(filter auto hf unsloth,$(BACKEND)),,$(error BACKEND=$(BACKEND): give auto, hf or unsloth))
	@$(PYTHON) grpo_lite/bootstrap.py $(VENV) $(if $(filter auto,$(BACKEND)),'unsloth?') && touch $@

$(VENV)/.ready-unsloth: $(VENV)/.ready
	@$(PYTHON) grpo_lite/bootstrap.py $(VENV) unsloth && touch $@

$(VENV)/.ready-ui: $(VENV)/.ready
	@$(PYTHON) grpo_lite/bootstrap.py $(VENV) ui && touch $@

$(VENV)/.ready-lm-eval: $(VENV)/.ready
	@$(PYTHON) grpo_lite/bootstrap.py $(VENV) lm-eval && touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PYTHON) grpo_lite/bootstrap.py $(VENV) dev && touch $@
