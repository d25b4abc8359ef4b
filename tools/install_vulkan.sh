#!/usr/bin/env bash
# Make sure this machine has a Vulkan driver, so that wgpu finds an adapter.
# Debian and Ubuntu: installs Mesa's drivers (lavapipe, the CPU one, among them). Anywhere else: says what is missing.
set -eu

have_driver() {
    ls /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json 2>/dev/null | grep -q . ||
        [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ]
}

have_loader() { ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1'; }

say() { printf '%s\n' "install_vulkan: $*" >&2; }

case "$(uname -s)" in
    Linux) ;;
    *) exit 0 ;; # Metal and D3D12 come with the system
esac
if have_driver && have_loader; then exit 0; fi
if ! command -v apt-get >/dev/null; then
    say "no Vulkan driver found. Install your distribution's Vulkan loader and Mesa drivers" \
        "(Fedora: vulkan-loader mesa-vulkan-drivers; Arch: vulkan-icd-loader vulkan-swrast), then run this again."
    exit 1
fi
as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        say "no Vulkan driver found, and root is needed to install one: apt-get install libvulkan1 mesa-vulkan-drivers"
        exit 1
    fi
    as_root="sudo"
fi
export DEBIAN_FRONTEND=noninteractive
say "no Vulkan driver found: installing Mesa's"

# Mesa 22 of Debian 12 runs our kernels about 5 times slower than the 25 in its backports. The backports entry
# is derived from the sources this machine already trusts, in an apt configuration of its own: nothing is left behind.
backports() {
    . /etc/os-release
    [ "${ID:-}" = debian ] && [ "${VERSION_CODENAME:-}" = bookworm ] || return 1
    local uri work
    uri=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
        awk '$1 == "URIs:" { u = $2 }
             $1 == "Suites:" && / bookworm( |$)/ && u { print u; exit }
             $1 == "deb" { for (i = 2; i < NF; i++) if ($i ~ /:\/\// && $(i + 1) == "bookworm") { print $i; exit } }')
    [ -n "$uri" ] || return 1
    work=$(mktemp -d)
    trap 'rm -rf "$work"' RETURN
    mkdir -p "$work/lists/partial"
    chmod 755 "$work" "$work/lists"
    printf 'Types: deb\nURIs: %s\nSuites: bookworm bookworm-updates bookworm-backports\nComponents: main\nSigned-By: %s\n' \
        "$uri" /usr/share/keyrings/debian-archive-keyring.gpg >"$work/debian.sources"
    local options=(-o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$work" -o "Dir::State::Lists=$work/lists")
    $as_root apt-get "${options[@]}" -qq update || return 1
    $as_root apt-get "${options[@]}" -qq install -y --no-install-recommends \
        -t bookworm-backports libvulkan1 mesa-vulkan-drivers
}

if ! (backports); then
    $as_root apt-get -qq update
    $as_root apt-get -qq install -y --no-install-recommends libvulkan1 mesa-vulkan-drivers
fi
case "$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers)" in
    2[0-4].* | 1*) say "warning: this Mesa is older than 25; its CPU driver is about 5 times slower" ;;
esac
