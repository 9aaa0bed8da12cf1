# Sourced by tests/run and benchmarks/run: makes the clone's own virtual environment in .venv, with
# the torch that constraints.txt pins and this package installed in place, and says where it is:
#
#     . tools/environment.sh EXTRA      -> $python
#
# Nothing is installed again while what decides the result (the build files, the compiled sources,
# the interpreter) is what it was, so that the second time takes seconds. PYTHON names the
# interpreter (default python3, 3.10 or later); what pip prints goes to .venv/install.log.
extra=$1
python=$PWD/.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

base=${PYTHON:-python3}
if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
  say "ehrseq_fast needs Python 3.10 or later, got: $("$base" --version 2>&1). Set PYTHON=/path/to/python."
  exit 1
fi

fingerprint() {
  {
    "$base" -c 'import sys; print(sys.version)'
    env | grep -E '^(EHRSEQ_FAST_(CPP|CUDA)|TORCH_CUDA_ARCH_LIST|CXX|CFLAGS)=' | sort
    find pyproject.toml setup.py constraints.txt csrc -type f -not -path '*/__pycache__/*' -print0 |
      sort -z | xargs -0 cat
  } | cksum
}

# Whether .venv holds what is needed: the test extra holds all of the others.
is_ready() {
  local stamp
  for stamp in ".venv/installed-$extra" .venv/installed-test; do
    if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$1" ]; then return 0; fi
  done
  return 1
}

# install STEP COMMAND...
install() {
  say "ehrseq_fast: $1"
  shift
  if ! "$@" >> .venv/install.log 2>&1; then
    tail -n 40 .venv/install.log >&2
    say "ehrseq_fast: this failed: $* (all of it: .venv/install.log)"
    exit 1
  fi
}

wanted=$(fingerprint)
if ! is_ready "$wanted"; then
  if [ ! -x "$python" ]; then
    say "ehrseq_fast: making a virtual environment in .venv"
    "$base" -m venv .venv
  fi
  : > .venv/install.log
  rm -f .venv/installed-*
  install "installing torch (pinned in constraints.txt)" \
    "$python" -m pip install -c constraints.txt torch
  install "compiling and installing ehrseq_fast (some minutes; nvcc, where there is one, adds more)" \
    "$python" -m pip install -c constraints.txt -e ".[$extra]"
  if [ "$extra" = test ]; then
    # an oracle, for files that import none of what it depends on; tests skip where it cannot be had
    "$python" -m pip install --no-deps -c constraints.txt pycox >> .venv/install.log 2>&1 ||
      say "ehrseq_fast: pycox could not be installed, tests that compare with it are skipped"
  fi
  printf '%s' "$wanted" > ".venv/installed-$extra"
fi
