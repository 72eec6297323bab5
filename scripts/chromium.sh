#!/usr/bin/env bash
# Installs Debian's Chromium for the tests of the page where there is none and root may: `make test` calls it. Otherwise a
# sentence, and these tests are skipped.
set -uo pipefail

say() { echo "[setup] $*"; }

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    say "there is no Chromium, so the tests of the page are skipped: install the package chromium to run them"
    exit 0
fi
say "installing Chromium for the tests of the page (about 1 min) …"
export DEBIAN_FRONTEND=noninteractive
if ! output=$({ apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } 2>&1 </dev/null); then
    say "apt-get did not install it, so these tests are skipped; its last words:"
    say "    ${output##*$'\n'}"
fi
exit 0
