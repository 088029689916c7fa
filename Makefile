# Everything a contributor does, one line each: `make help`.

CARGO  ?= cargo
CACHE  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/engine
DEMO   := $(or $(ENGINE_DEMO_MODEL),$(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf)
MODEL  ?= $(DEMO)
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=
PREFILL_ARGS ?=
ENGINE ?=
DECODE_WORKERS ?= 1
PREFILL_WORKERS ?= 1
PEERS  ?= llama.cpp nixl dynamo
RDMA   ?= yes
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 120

.PHONY: help setup setup-services setup-rdma run cluster demo-model test-assets test test-rdma fmt lint doc client bench bench-types bench-frontend bench-host bench-scale bench-rdma fuzz soak soak-round avx512 goldens cuda cuda-check gpu-check device-pages

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install the few Debian packages the build needs, or say which are missing
	@scripts/setup.sh

setup-services: ## The same, and the services that a cluster and the tests run: etcd and NATS
	@scripts/setup.sh services

setup-rdma: ## The same, and an emulated machine with RDMA devices: QEMU and soft-RoCE
	@scripts/setup.sh services rdma

run: setup $(if $(filter $(DEMO),$(MODEL)),demo-model) ## Serve the demo model on 127.0.0.1:8000 (MODEL=, HOST=, PORT=, ARGS= change that)
	$(CARGO) run --release --locked -- --model $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

cluster: setup-services $(if $(filter $(DEMO),$(MODEL)),demo-model) ## Start etcd, NATS, a frontend, a decode and a prefill worker here; Ctrl-C stops them (MODEL=, PORT=, ARGS=, PREFILL_ARGS=, DECODE_WORKERS=, PREFILL_WORKERS=; ENGINE= one that is built)
	$(if $(ENGINE),,$(CARGO) build --release --locked --bin engine)
	@PORT=$(PORT) DECODE_WORKERS=$(DECODE_WORKERS) PREFILL_WORKERS=$(PREFILL_WORKERS) PREFILL_ARGS="$(PREFILL_ARGS)" scripts/cluster.sh $(or $(ENGINE),target/release/engine) $(MODEL) $(ARGS)

demo-model: setup ## Fetch the demo model, 98 MB, once
	@scripts/fetch-demo-model.sh

test-assets: setup ## Fetch Qwen3's tokenizer for the tests, once
	@scripts/fetch-test-assets.sh

test: $(if $(RDMA),setup-rdma,setup-services) demo-model test-assets ## Format check, all tests, those on RDMA devices (RDMA= leaves them out) and on an emulated CUDA device, lints, documentation, the OpenAI client
	@$(CARGO) clippy --version >/dev/null
	$(if $(RDMA),@PATH=$$PATH:/usr/sbin tests/rdma/kernel.sh >/dev/null)
	$(CARGO) fmt --all --check
	$(CARGO) test --workspace --locked --no-run
	@nice -n 19 scripts/build-ahead.sh & ahead=$$!; \
	$(CARGO) test --workspace --locked --no-fail-fast || { kill $$ahead; exit 1; }; wait $$ahead
	$(MAKE) --no-print-directory lint cuda-check device-pages doc client $(if $(RDMA),test-rdma)

test-rdma: setup-rdma ## The tests that need an RDMA device, in an emulated machine (QEMU) with soft-RoCE; part of make test
	tests/rdma/run.sh

fmt: ## Format the code
	$(CARGO) fmt --all

lint: ## Clippy on everything; warnings are errors
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

doc: ## Build the documentation; warnings are errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked

client: setup demo-model ## Run the stock OpenAI Python client against the server
	@# As `cargo test --workspace` builds it: another selection means other features, and compiling everything again.
	$(CARGO) build --workspace --tests --locked
	tests/openai_client/run.sh

bench: setup-services bench-frontend $(if $(filter $(DEMO),$(MODEL)),demo-model) ## Measure beside llama.cpp, NIXL and Dynamo, fetched at the first run (PEERS= leaves them out); writes benches/results/
	$(if $(filter llama.cpp,$(PEERS)),scripts/fetch-llama-cpp.sh)
	$(if $(filter nixl,$(PEERS)),scripts/fetch-nixl.sh)
	$(CARGO) bench --locked --bench transfer -- --results benches/results $(if $(filter nixl,$(PEERS)),--nixl "$$(scripts/fetch-nixl.sh)")
	$(CARGO) bench --locked --bench disaggregation -- --model $(MODEL) --results benches/results
	$(CARGO) bench --locked --bench suite -- --model $(MODEL) --results benches/results $(if $(filter llama.cpp,$(PEERS)),--llama "$$(scripts/fetch-llama-cpp.sh)") $(ARGS)

bench-types: setup ## Measure the forward pass beside llama.cpp on the shape of Qwen3-0.6B, in GGUF files of five types; at the first run llama.cpp is built (10 to 25 minutes) and the files are made (3.1 GB)
	scripts/fetch-llama-cpp.sh
	scripts/make-shape-gguf.sh
	$(CARGO) bench --locked --bench suite -- --types "$$(scripts/make-shape-gguf.sh)" --results benches/results --llama "$$(scripts/fetch-llama-cpp.sh)" $(ARGS)

bench-frontend: setup-services ## Measure the frontend beside Dynamo's, fetched at the first run (PEERS= leaves it out); part of make bench
	$(if $(filter dynamo,$(PEERS)),scripts/fetch-dynamo.sh)
	$(CARGO) bench --locked --bench frontend -- --results benches/results $(if $(filter dynamo,$(PEERS)),--dynamo "$$(scripts/fetch-dynamo.sh)")

bench-host: setup ## Measure how long a device would wait for the host between two steps
	$(CARGO) bench --locked --bench host -- --results benches/results

bench-scale: setup-services ## What grows with what: clusters of up to 200 decode and 100 prefill mock workers
	$(CARGO) bench --locked --bench scale -- --results benches/results

bench-rdma: setup-rdma ## Measure RDMA transfers beside ib_write_bw, in the machine of make test-rdma
	@scripts/setup.sh perftest
	benches/rdma/run.sh

fuzz: setup ## Fuzz each parser for FUZZ_SECONDS (600)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO) test --workspace --locked --test fuzz -- --nocapture

soak: ## Rounds of make soak-round, until it is stopped or one fails
	@while $(MAKE) --no-print-directory soak-round; do :; done; exit 1

soak-round: setup-services demo-model ## The handoff's simulation on fresh seeds, 64 streaming clients, chaos: SOAK_SECONDS (120) each; then long outages
	SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --release --locked --test simulation soak -- --ignored --nocapture
	SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --release --locked --test soak -- --ignored --nocapture
	SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --release --locked --test chaos -- --ignored --nocapture
	$(CARGO) test --release --locked --test disaggregated -- --ignored --nocapture

avx512: setup ## Run the kernels' tests on an emulated processor with AVX-512 (Bochs, slow)
	tests/avx512/run.sh

cuda: setup ## Build target/cuda/engine, with CUDA; fetches NVIDIA's compiler from PyPI at the first run, and needs no GPU
	CUDA_HOME="$$(scripts/fetch-nvcc.sh)" $(CARGO) build --release --locked --features cuda --bin engine
	@mkdir -p target/cuda && strip -o target/cuda/engine target/release/engine && ls -lh target/cuda/engine

cuda-check: setup ## Compile the CUDA kernels and lint what drives them; look at what became of the kernels. Needs no GPU; part of make test
	scripts/check-kernels.sh

gpu-check: setup-services test-assets ## Make target/cuda/gpu-check and its archive, all that checks and measures a GPU, to be carried to one; runs the tests on a stand-in here
	CUDA_HOME="$$(scripts/fetch-nvcc.sh)" scripts/build-gpu-check.sh
	scripts/check-driver.sh

device-pages: setup-services ## Whole clusters whose pages are in device memory, the engine built with CUDA, on a stand-in for libcuda. Needs no GPU; part of make test
	CUDA_HOME="$$(scripts/fetch-nvcc.sh)" scripts/check-device-pages.sh

goldens: demo-model ## Make the reference fixtures anew with transformers (downloads PyTorch)
	tests/reference/run.sh
