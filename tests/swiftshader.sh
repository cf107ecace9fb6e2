#!/usr/bin/env bash
# Lay SwiftShader (a Vulkan driver in software) and a Vulkan loader into the folder $1, so that the
# WebGPU tests run without a GPU. Both come from Debian's chromium-common, of which nothing is
# installed; root is needed only if apt's lists were never fetched.
set -euo pipefail
folder=${1:?usage: swiftshader.sh FOLDER}
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "no SwiftShader: it is taken from a Debian package, and this is no Debian" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq download chromium-common 2>/dev/null ||
    { apt-get -qq update && apt-get -qq download chromium-common; }
dpkg-deb --fsys-tarfile chromium-common_*.deb | tar --extract --strip-components=4 \
    ./usr/lib/chromium/{libvk_swiftshader.so,libvulkan.so.1,vk_swiftshader_icd.json}
cd - >/dev/null
mkdir -p "$folder"
mv "$work"/{libvk_swiftshader.so,vk_swiftshader_icd.json} "$folder"
# Last, since its presence says that everything is there.
mv "$work"/libvulkan.so.1 "$folder"
