#!/usr/bin/env bash
# Make sure this machine has Chromium, in which the browser's tests run.
# Debian: installs it. Anywhere else: says what is missing.
set -eu

say() { printf '%s\n' "install_chromium: $*" >&2; }

if command -v chromium >/dev/null; then exit 0; fi
if ! command -v apt-get >/dev/null; then
    say "no chromium found. Install it so that 'chromium' is on the PATH, then run this again."
    exit 1
fi
as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        say "no chromium found, and root is needed to install it: apt-get install chromium"
        exit 1
    fi
    as_root="sudo"
fi
export DEBIAN_FRONTEND=noninteractive
say "no chromium found: installing Debian's"
$as_root apt-get -qq update
$as_root apt-get -qq install -y --no-install-recommends chromium
