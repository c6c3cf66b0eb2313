# Two commands: `make demo` and `make test`. Both make .venv first, once.
#   make demo PYTHON=python3.12    another Python (3.10 or newer) for a new .venv
#   make test ARGS='-k layout'     some of the tests
#   make test-all                  also the slow ones: launches of ranks, kills, whole recipes
#   make coverage                  the same, with the branches that no test takes
#   make nightly                   tests that repeat the same for hours: kills, full disks, a soak
#   make gpu-check                 correctness, speed and memory on a GPU: docs/gpu.md

# Without PYTHON, the first of these that is new enough makes .venv.
PYTHONS = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)
STAMP = .venv/.installed

# Products and sums of which the CPU decides the last bits.
NUMERICAL = \
    $(addprefix tests/eval/metrics/test_,$(addsuffix .py,class_metrics retrieval_metrics)) \
    $(addprefix tests/eval/probes/test_,$(addsuffix .py,logistic_fit)) \
    $(addprefix tests/selectors/fitting/test_,$(addsuffix .py,covariance kmeans)) \
    $(addprefix tests/selectors/kernels/test_,$(addsuffix .py,low_similarities pair_log_sums)) \
    $(addprefix tests/selectors/methods/test_,$(addsuffix .py,clip_score density image_based \
        nearest normsim running_covariance semdedup vas)) \
    $(addprefix tests/selectors/methods/clipcov/test_,$(addsuffix .py,clipcov greedy)) \
    $(addprefix tests/selectors/methods/jest/test_,$(addsuffix .py,jest joint_sampling \
        learnability pair_losses)) \
    $(addprefix tests/selectors/methods/negcliploss/test_,$(addsuffix .py,negcliploss)) \
    $(addprefix tests/selectors/methods/removal/test_,$(addsuffix .py,optimal_design vas_d)) \
    $(addprefix tests/trainer/losses/test_,$(addsuffix .py,paired reference values))

# What is compiled is kept, whatever the environment says: processes that tests start read it.
ONE_THREAD = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
PYTEST = $(ONE_THREAD) .venv/bin/python -m pytest -n 2 --dist worksteal

# Of what is carried to a GPU machine without a network, and for which Python there.
GPU_WHEELS = build/gpu-wheels
GPU_PYTHON = 3.12
MORE =
# glibc 2.28 and older
PLATFORMS = $(foreach version,_2_28 _2_27 _2_26 _2_24 _2_17 2014 _2_12 2010 _2_5 1,--platform manylinux$(version)_x86_64)

.PHONY: demo docs test test-all nightly coverage test-avx2 record same-answers setup lint constraints clean moved
.PHONY: gpu-check gpu-wheels

demo: $(STAMP)
	.venv/bin/siftclip demo

test: $(STAMP)
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)

nightly: $(STAMP)
	$(ONE_THREAD) .venv/bin/python -m pytest --nightly $(ARGS)

# Of what runs in the processes of pytest itself: what tests start costs no more for it. The floor
# is in pyproject.toml.
coverage: $(STAMP)
	$(PYTEST) $(ARGS) --cov

# The numerical tests as on a CPU without AVX-512, VNNI, bf16 and AMX, and with other BLAS kernels.
test-avx2: $(STAMP)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE $(PYTEST) $(NUMERICAL)

# What selectors, runs and evaluations answer, read again as a diff of tests/recording.
record: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python tests/recording/record.py tests/recording

# Says that changed code of selectors answers as before; refused where the recording differs.
same-answers: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python tests/recording/same_answers.py $(ARGS)

# docs/options.md, from the dataclasses in trainer/settings/, and the tables of docs/open_clip.md.
docs: $(STAMP)
	.venv/bin/python -m siftclip.trainer.settings.describing.reference docs/options.md
	.venv/bin/python -m siftclip.trainer.migration.open_clip_page docs/open_clip.md

# Writes gpu_check/gpu_check.json; ARGS='--device cpu --tiny' runs the same code without a GPU.
gpu-check: $(STAMP)
	.venv/bin/python benchmarks/gpu_check.py $(ARGS)

# The one package without a wheel of its own is built; it holds no compiled code.
gpu-wheels: $(STAMP)
	rm -rf $(GPU_WHEELS)
	PIP_CONSTRAINT=constraints.txt .venv/bin/python -m pip wheel --no-deps --wheel-dir $(GPU_WHEELS) \
	    antlr4-python3-runtime
	PIP_CONSTRAINT=constraints.txt .venv/bin/python -m pip download --no-deps --dest $(GPU_WHEELS) \
	    --only-binary=:all: --implementation cp \
	    --python-version $(GPU_PYTHON) $(PLATFORMS) \
	    --requirement benchmarks/gpu_checks/wheels.txt $(MORE)
	@du -sm $(GPU_WHEELS) | { read -r mib folder; echo "$$folder: $$mib MiB"; test $$mib -le 64; } \
	    || { echo 'These are more than the 64 MiB that travel: take less with MORE=' >&2; exit 1; }

setup: $(STAMP)

lint: $(STAMP)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/codespell

# The stamp is written last, so that an interrupted installation is done again. It holds the name
# of this folder, because an environment does not work in a copied or renamed one.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): moved
endif

# One at a time: a second make waits for the lock of the first, which ends with it, and finds the work
# done. The constraints also hold for what is needed to build packages; pip 25.3 has its own name for
# that.
$(STAMP): pyproject.toml constraints.txt
	@set -e; exec 9<.; \
	if command -v flock >/dev/null && ! flock -n 9; then \
	    echo 'Waiting for another make, which installs into .venv.'; flock 9; \
	fi; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" != "$$(pwd -P)" ]; then \
	    for candidate in $(PYTHONS); do \
	        if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	            python="$$candidate"; break; \
	        fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo 'siftclip needs Python 3.10 or newer, which is none of: $(PYTHONS)' >&2; \
	        echo 'Name one with PYTHON=, such as: make setup PYTHON=/opt/python3.12/bin/python3' >&2; \
	        exit 1; \
	    fi; \
	    echo "Installing into .venv with $$("$$python" --version): once, some minutes, about 7 GB."; \
	    "$$python" -m venv --clear .venv; \
	elif [ $(STAMP) -nt pyproject.toml ] && [ $(STAMP) -nt constraints.txt ]; then \
	    exit 0; \
	fi; \
	rm -f $(STAMP); set -x; \
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	    .venv/bin/python -m pip install -e '.[dev]'; \
	{ set +x; } 2>/dev/null; pwd -P >$(STAMP)

# Pins that still fit are kept; UPGRADE=--upgrade renews all. Where packages come from is up to
# the settings of uv, and never stands in the file.
constraints:
	@command -v uv >/dev/null || { echo 'make constraints needs uv: pip install uv' >&2; exit 1; }
	uv pip compile --universal --python-version 3.10 --extra dev $(UPGRADE) \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	    --quiet --output-file constraints.txt pyproject.toml
	@printf '%s\n' \
	    '# Tested versions of everything that siftclip installs, for Python 3.10 and newer.' \
	    '# Made by `make constraints`, read by `make setup`; the ranges are in pyproject.toml.' \
	    '# For Python 3.10, torch ends with 2.14.1, numpy with 2.2, pandas with 2.3.' \
	    | cat - constraints.txt >constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf .venv .coverage build dist gpu_check .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
