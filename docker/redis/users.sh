#!/bin/sh
# Writes the users of Redis: what each may do from embedq's users.acl, its passwords, hashed, from the secrets.
#
# Every line of a secret is a password that Redis takes, so that one can be replaced without a pause (see README.md).
# A user without a secret keeps no password and cannot log in. Run again in the container, followed by ACL LOAD, it
# brings changed secrets into the Redis that runs.
set -eu
umask 077
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

# The rules of a user's passwords: one of each line of its secret.
passwords() {
    if [ -e "$SECRETS/$1-password" ]; then
        while IFS= read -r line || [ -n "$line" ]; do
            [ -z "$line" ] || printf ' #%s' "$(printf %s "$line" | sha256sum | cut -d ' ' -f 1)"
        done <"$SECRETS/$1-password"
    else
        printf ' resetpass'
    fi
}

{
    sed -n '/^user default /p' "$CONFIG/users.acl"
    for name in producer worker observer exporter; do
        rules=$(passwords "$name")
        [ -n "$rules" ] || { echo "the secret $name-password is empty" >&2; exit 1; }
        sed -n "s|^\(user embedq-$name on\) resetpass|\1$rules|p" "$CONFIG/users.acl"
    done
    # For administration, and for redis-cli's health check of a replicated pair.
    printf 'user embedq-admin on%s ~* &* +@all\n' "$(passwords admin)"
    if [ -n "${SENTINEL_SERVICE:-}" ]; then
        printf 'user embedq-replica on%s resetchannels -@all +psync +replconf +ping\n' "$(passwords replica)"
        printf 'user embedq-sentinel on%s resetchannels -@all &__sentinel__:hello +multi +exec +slaveof +ping' \
            "$(passwords sentinel)"
        printf ' +subscribe +publish +info +role +config|rewrite +client|setname +client|kill +script|kill\n'
    fi
} >"$RUN/users.acl.new"
mv "$RUN/users.acl.new" "$RUN/users.acl"
