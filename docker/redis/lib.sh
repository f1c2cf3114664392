# shellcheck shell=sh disable=SC2034
# For the scripts beside this one: where the container's files are. Another place for any of them is for trying them out
# without a container.
: "${SECRETS:=/run/secrets}" "${CONFIG:=/etc/embedq}" "${RUN:=/run/embedq}" "${DATA:=/data}"

# The first line of a secret: the password that we use ourselves.
password() { head -n 1 "$SECRETS/$1-password"; }
