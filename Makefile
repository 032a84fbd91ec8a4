# Everything that a bare clone needs: Python 3.11, pip and make.  `make help` lists the targets.
#
# CI's time in minutes, on 2 quiet cores: unit 3, end to end 2, families 1, simulation 1, namespaces 1, slow 10,
# containers 5 (8 where the engine must be installed).

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
PROMPT ?= What is the capital of France?
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test unit families e2e namespaces slow lint types laws protos sim sim-long ci containers bench bench-decode bench-swarm bench-lane bench-rtt bench-failover bench-experts bench-linear bench-start bench-pack bench-routing-table bench-gossip bench-gossip-scale bench-gossip-nodes clean

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@sed -n "s/^# CI/\nCI/p; s/^# installed/installed/p" $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@echo "making the environment in $(VENV), which takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[demo,dev]'
	@touch $@ $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml constraints.txt
	@echo "making the environment in $(VENV), which takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[demo]'
	@touch $@

demo: $(DEMO_STAMP)  ## Four nodes answer together, and go on when one is killed (builds the demo model once)
	@checkpoint=$$($(BIN)/shoal demo-model) && \
	model=$$($(BIN)/shoal pack "$$checkpoint") && \
	$(BIN)/shoal demo --model "$$model" "$(PROMPT)"

test: unit e2e  ## The fast suite: unit, end to end

unit: $(STAMP)  ## Pure units, parsers, stores, the door against toys; the pure files' coverage
	$(BIN)/python -m pytest -q -n 2 -m 'not families and not e2e and not slow and not namespaces and not containers and not sim' \
		--cov=coordinator --cov=node --cov-branch --cov-report=json:$(VENV)/coverage.json
	$(BIN)/python -m tests.pure_coverage $(VENV)/coverage.json

families: $(STAMP)  ## Every family against transformers, token for token
	$(BIN)/python -m pytest -q -n 2 -m 'families and not slow'

e2e: $(STAMP)  ## Real processes, a real store, the real command
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'e2e and not slow'

namespaces: $(STAMP)  ## Nodes on one LAN, in network namespaces (needs Linux, root, iproute2 and iptables, which it installs)
	@{ command -v ip && command -v iptables; } >/dev/null || test "$$(id -u)" != 0 || { apt-get update -qq && apt-get install -y -qq iproute2 iptables; } || true
	$(BIN)/python -m pytest -q -m namespaces tests/net

sim: $(STAMP)  ## The virtual network: 200 seeds of mixed faults, or one in words (SEED=7)
	$(if $(SEED),$(BIN)/python -m tests.sim --seed $(SEED),$(BIN)/python -m pytest -q -n 2 -m sim tests/sim)

sim-long: $(STAMP)  ## Five thousand seeds, on all cores
	$(BIN)/python -m tests.sim --seeds 5000

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict, all four rooms
	$(BIN)/mypy

laws: $(STAMP)  ## import-linter: who may import whom
	$(BIN)/lint-imports

protos: $(STAMP)  ## Is the generated protobuf code current?
	$(BIN)/python -m protos.generate --check

slow: $(STAMP)  ## Minutes long: a 4 GB checkpoint, a hundred runs in a row
	$(BIN)/python -m pytest -q -m slow

containers: $(STAMP)  ## Four nodes in containers, one killed in the middle of an answer (needs Docker)
	$(BIN)/python -m pytest -q -m containers tests/deploy

ci: test families lint types laws protos sim namespaces slow containers  ## All that CI asks

bench: bench-decode bench-swarm bench-lane bench-rtt bench-failover bench-experts bench-linear bench-start bench-pack bench-routing-table bench-gossip bench-gossip-scale bench-gossip-nodes  ## Every figure that the README quotes

bench-decode: $(STAMP)  ## Tokens a second against transformers, batch 1 and 8
	$(BIN)/python -m bench.decode

bench-swarm: $(STAMP)  ## Two and four nodes against one and against transformers
	$(BIN)/python -m bench.swarm

bench-lane: $(STAMP)  ## What a remote layer costs beyond compute
	$(BIN)/python -m bench.expert_lane

bench-rtt: $(STAMP)  ## Long ways between nodes: 1, 5, 20 and 50 ms
	$(BIN)/python -m bench.rtt

bench-failover: $(STAMP)  ## How much later a token comes when a peer dies
	$(BIN)/python -m bench.failover

bench-experts: $(STAMP)  ## Ways to compute experts at 1, 8, 64 and 256 rows
	$(BIN)/python -m bench.experts

bench-linear: $(STAMP)  ## Ways to multiply a few rows by a weight
	$(BIN)/python -m bench.linear

bench-start: $(STAMP)  ## Start to first token, and memory without weights
	$(BIN)/python -m bench.start

bench-pack: $(STAMP)  ## Peak memory of packing 4 GB
	$(BIN)/python -m bench.pack_memory

bench-routing-table: $(STAMP)  ## Time and memory of the routing table at 10,000 records
	$(BIN)/python -m bench.routing_table

bench-gossip: $(STAMP)  ## How fast a death is found, false ones, and what gossip costs, from 10 to 5,000 virtual nodes
	$(BIN)/python -m bench.gossip

bench-gossip-scale: $(STAMP)  ## A crash, a join and a partition among 10,000 virtual nodes
	$(BIN)/python -m bench.gossip_scale

bench-gossip-nodes: $(STAMP)  ## Twenty real nodes: three killed, two stopped, all back; what it costs while nothing happens
	$(BIN)/python -m bench.gossip_nodes

clean:  ## Remove the environment and caches (not the demo model)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
