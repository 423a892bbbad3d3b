#!/usr/bin/env bash
# Pack what a GPU machine without network needs to run bench/gpu_check.sh, in at most 64 MiB: this tree and wheels.
# Usage: bench/gpu_bundle.sh OUT [PACKAGE…]     then, on that machine: bash OUT/run.sh
# That machine has Linux on x86-64, Python 3.12, torch 2.11 or later with CUDA 13, transformers, peft, accelerate and the
# common scientific packages (numpy, scipy, pandas, pyarrow, matplotlib, psutil, rich …). PACKAGE… adds what it lacks.
# bitsandbytes is stripped to its library for CUDA 13.0 and the one for CPUs. PY (3.12) and CUDA (130) choose others.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd); shift
py=${PY:-3.12} cuda=${CUDA:-130}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
rm -rf "$out/wheels"; mkdir -p "$out/wheels"
platforms=(); for n in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$py" --implementation cp "${platforms[@]}" \
  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$out/wheels" \
  trl==1.16.0 bitsandbytes==0.50.2 datasets==4.8.5 dill==0.4.1 multiprocess==0.70.19 gguf math-verify \
  latex2sympy2_extended antlr4-python3-runtime==4.13.2 pydantic pydantic-core annotated-types typing-inspection \
  requests urllib3 charset-normalizer certifi idna "$@"

"$python" - "$out/wheels" "$cuda" <<'PY'
import pathlib, sys, zipfile
folder, cuda = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("bitsandbytes-*.whl")
stripped = wheel.with_suffix(".part")
keep = {f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so"}
with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(stripped, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
    names = {pathlib.PurePath(name).name for name in source.namelist()}
    assert keep <= names, f"the wheel has no {keep - names}: {sorted(name for name in names if name.endswith('.so'))}"
    left_out = {n for n in source.namelist() if n.endswith((".so", ".dll")) and pathlib.PurePath(n).name not in keep}
    for entry in source.infolist():
        data = source.read(entry)
        if entry.filename.endswith("RECORD"):
            data = b"".join(l for l in data.splitlines(True) if l.decode().split(",")[0] not in left_out)
        if entry.filename not in left_out:
            target.writestr(entry, data, zipfile.ZIP_DEFLATED)
stripped.replace(wheel)
PY

git archive --format=tar.gz -o "$out/tree.tar.gz" HEAD
cat > "$out/run.sh" <<'RUN'
#!/usr/bin/env bash
# Unpack the bundle into WHERE (a new folder) and run bench/gpu_check.sh there; its environment variables hold.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
where=${WHERE:-$(mktemp -d)}
out=${OUT:-$PWD/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$where/site" "$where/tree"
"$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$where/site" "$bundle"/wheels/*.whl
tar xzf "$bundle/tree.tar.gz" -C "$where/tree"
PYTHON=$python PYTHONPATH="$where/site${PYTHONPATH:+:$PYTHONPATH}" RUNS=${RUNS:-$where/runs} \
  bash "$where/tree/bench/gpu_check.sh" "$out"
RUN
size=$(du -sk "$out" | cut -f1)
ls -l "$out/wheels"
echo "$out: $((size / 1024)) MiB of at most 64; commit $(git rev-parse --short HEAD)"
[ "$size" -le $((64 * 1024)) ] || { echo "too large" >&2; exit 1; }
