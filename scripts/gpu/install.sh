#!/usr/bin/env bash
# Make a virtual environment over the packages of the python3 at hand, with a folder of wheels before them. No network.
#
#     bash scripts/gpu/install.sh ENVIRONMENT WHEELS [plugin]      from the repository's root
#
# `plugin`: this working tree too, and its start hook. Leaves ENVIRONMENT/bin/python3. `pip install --target` would not
# do: `.pth` files there are not read (the hook is one), and console scripts do not find it. Nor `--system-site-packages`:
# python3 may itself be of an environment, whose packages another one does not see. So: an empty environment, and one
# `.pth` line that adds the folder of the python3 at hand behind its own (`site.addsitedir` adds at the end).
set -euo pipefail
environment=$1 wheels=$2
python3 -m venv --without-pip "$environment"
site=$("$environment/bin/python3" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
behind=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
python3 -m pip --disable-pip-version-check --python "$environment/bin/python3" install -q --no-index --no-deps \
    --no-compile --no-cache-dir "$wheels"/*.whl
printf 'import site; site.addsitedir("%s")\n' "$behind" > "$site/zz_behind.pth"
if [ "${3:-}" = plugin ]; then # the working tree before the hook: such files are read in alphabetical order
    printf '%s\n' "$PWD" > "$site/aa_solopo.pth"
    cp solopo_plugin.pth "$site/solopo_plugin.pth"
fi
