# Sourced by speedrun.sh and test.sh: `setup_venv EXTRAS` makes .venv with the package and the
# extras of pyproject.toml (e.g. `serve`), and puts its commands first on PATH.
# Installs once; afterwards it needs no network until pyproject.toml or constraints.txt change.
# PYTHON=python3.12 chooses the interpreter of a new .venv.

setup_error() {
    echo "error: $*" >&2
    return 1
}

setup_venv() {
    local extras="${1:-}" root python venv stamp wanted pin torch started=$SECONDS
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="$root/.venv"

    if [ ! -e "$venv" ]; then
        python="${PYTHON:-python3}"
        command -v "$python" > /dev/null || setup_error "$python was not found; install Python 3.10 or newer." || return 1
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
            || setup_error "Python 3.10 or newer is needed, $python is $("$python" -V 2>&1); name another with PYTHON=…" || return 1
        "$python" -c 'import ensurepip, venv' 2> /dev/null \
            || setup_error "$python lacks the module venv (Debian, Ubuntu: apt-get install python3-venv)." || return 1
        echo "setup: making .venv with $("$python" -V)"
        "$python" -m venv "$venv" || { rm -rf "$venv"; setup_error "could not make .venv."; return 1; }
    fi
    python="$venv/bin/python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null \
        || setup_error ".venv has no working Python 3.10 or newer; delete the folder .venv and try again." || return 1
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"

    # what is asked for, against what was installed last time
    stamp="$venv/.installed-${extras:-base}"
    wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" <(echo "$root") | "$python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return 0; fi

    "$python" -m pip --version > /dev/null 2>&1 \
        || setup_error ".venv has no pip (an interrupted setup?); delete the folder .venv and try again." || return 1
    # torch first and alone: a torch that is there and new enough stays, whoever built it
    pin="$(sed -n 's/^torch==//p' "$root/constraints.txt")"
    torch="$(setup_torch_version "$python" "$root")"
    if [ -z "$torch" ]; then
        echo "setup: installing torch $pin (once, a few minutes)"
        if ! setup_cpu_torch "$python" "$pin"; then
            "$python" -m pip install --quiet --disable-pip-version-check "torch==$pin" \
                || setup_error "torch $pin could not be installed (see above); install any torch into .venv and try again." || return 1
        fi
        torch="$(setup_torch_version "$python" "$root")"
    fi
    echo "setup: installing nanochat_nb${extras:+[$extras]} beside torch $torch (once, a few minutes)"
    sed "s/^torch==.*/torch==${torch%%+*}/" "$root/constraints.txt" > "$venv/constraints.txt"
    "$python" -m pip install --quiet --disable-pip-version-check --constraint "$venv/constraints.txt" \
        --editable "$root${extras:+[$extras]}" || setup_error "the installation failed (see above)." || return 1
    echo "$wanted" > "$stamp"
    echo "setup: done in $((SECONDS - started)) s"
}

# The version of the torch in .venv if pyproject.toml accepts it, else nothing.
setup_torch_version() {
    "$1" - "$2/pyproject.toml" << 'EOF'
import importlib.metadata, re, sys
numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)[:2]]
least = re.search(r'"torch>=([\d.]+)"', open(sys.argv[1], encoding="utf-8").read())[1]
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = "0.0"
print(version if numbers(version) >= numbers(least) else "")
EOF
}

# On Linux without an NVIDIA GPU: PyTorch's CPU wheel (0.2 GB) instead of the default one, which
# brings gigabytes of CUDA libraries.  Its dependencies come later, with everything else.
setup_cpu_torch() {
    [ "$(uname -s)" = Linux ] || return 1
    if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then return 1; fi
    "$1" -m pip install --quiet --disable-pip-version-check --no-deps --timeout 15 --retries 1 \
        --index-url https://download.pytorch.org/whl/cpu "torch==$2" 2> /dev/null && return 0
    echo "setup: PyTorch's CPU wheels cannot be reached; taking the default build"
    return 1
}
