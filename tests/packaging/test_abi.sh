# Builds one wheel with the torch in $PYTHON's environment and runs the operator tests under each of $ABI_TORCHES.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
echo "wheel built with torch $("$PYTHON" -c 'import torch; print(torch.__version__)'): $(basename "$work"/*.whl)"
for torch in $ABI_TORCHES; do
  "$PYTHON" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" numpy pytest pytest-timeout
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$work"/*.whl
  echo "== $("$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)')"
  "$work/venv/bin/python" -m pytest -q tests/ops tests/nn tests/test_weight.py
  rm -rf "$work/venv"
done
