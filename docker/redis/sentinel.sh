#!/bin/sh
# Starts a Sentinel. What it learns it writes into its configuration, which is therefore kept in /data.
#
#   SENTINEL_SERVICE  the name that clients ask for
#   SENTINEL_MASTER   "HOST PORT" of the master at the beginning
#   SENTINEL_PORT     26379
#   ANNOUNCE_HOST     the name under which the others reach this Sentinel
#   DOWN_AFTER_MS     silence after which a server counts as down, 5000
set -eu
umask 077
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

if [ ! -e "$DATA/sentinel.conf" ]; then
    cat >"$DATA/sentinel.conf" <<EOS
port ${SENTINEL_PORT:-26379}
dir $DATA
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $ANNOUNCE_HOST
sentinel announce-port ${SENTINEL_PORT:-26379}
sentinel monitor $SENTINEL_SERVICE $SENTINEL_MASTER 2
sentinel down-after-milliseconds $SENTINEL_SERVICE ${DOWN_AFTER_MS:-5000}
sentinel failover-timeout $SENTINEL_SERVICE 30000
sentinel auth-user $SENTINEL_SERVICE embedq-sentinel
sentinel auth-pass $SENTINEL_SERVICE $(password sentinel)
EOS
fi
exec redis-server "$DATA/sentinel.conf" --sentinel
