#!/bin/sh
# Starts Redis on embedq's redis.conf, with the users of users.sh.
#
#   REDIS_MAXMEMORY   bytes, or 4gb: what the data may take; the container needs more (see compose.yaml)
#   REDIS_PORT        6379
#   SENTINEL_SERVICE  with Sentinels: the name that they know this master and its replica by; then also
#   ANNOUNCE_HOST     the name under which the others reach this server
#   REPLICA_OF        "HOST PORT" of the master that this server begins under; Sentinel may change that
set -eu
umask 077
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

"$(dirname "$0")/users.sh"
base=$CONFIG/redis.conf
if [ -n "${SENTINEL_SERVICE:-}" ]; then
    # Sentinel has the configuration rewritten when it makes another server the master: it must be kept.
    base=$DATA/redis.conf
    if [ ! -e "$base" ]; then
        { cat "$CONFIG/redis.conf"; [ -z "${REPLICA_OF:-}" ] || printf 'replicaof %s\n' "$REPLICA_OF"; } >"$base"
    fi
    replication="
replica-announce-ip $ANNOUNCE_HOST
replica-announce-port ${REDIS_PORT:-6379}
masteruser embedq-replica
masterauth $(password replica)"
fi

# What differs from one installation to the next comes in last, by standard input: nobody sees it in a list of processes.
exec redis-server "$base" - <<EOS
port ${REDIS_PORT:-6379}
dir $DATA
aclfile $RUN/users.acl
maxmemory ${REDIS_MAXMEMORY:?set it to what the data may take}
${replication:-}
EOS
