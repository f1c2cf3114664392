#!/bin/sh
# Makes docker/secrets/: a random password for each user of Redis and for Grafana's admin. Keeps those that are there.
# The folder is closed to other users of the host; the files can be read by any user id, as containers have others.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets
for name in worker producer observer exporter admin replica sentinel grafana; do
    file=secrets/$name-password
    if [ ! -e "$file" ]; then
        head -c 24 /dev/urandom | base64 | tr '+/' '-_' >"$file.new"
        chmod 644 "$file.new"
        mv "$file.new" "$file"
        echo "made docker/$file"
    fi
done
