-- Puts one failed or canceled job back on its queue, with the retries it was enqueued with.
--
-- KEYS[1]  the job's hash
-- KEYS[2]  the set of all queues
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the job id
-- ARGV[3]  'RPUSH', or 'LPUSH' for the head of the queue
-- ARGV[4]  the nonce: unique to this call, so that it gives the same answer when it is sent again
--
-- Returns the status found: unless it is failed, stopped or canceled nothing was changed. False if there is no
-- such job.

local prefix, id = ARGV[1], ARGV[2]
local fields = redis.pcall('HMGET', KEYS[1], 'status', 'origin', 'embedq_retries', 'ttl', 'embedq_change')
if fields.err then
  return false -- something else stands there
end
local status, queue = fields[1], fields[2]
if not status or not queue then
  return false
end
local before = found_before(fields[5], ARGV[4])
if before then
  return before
end
if status ~= 'failed' and status ~= 'stopped' and status ~= 'canceled' then
  return status
end

clear_way('set', KEYS[2])
clear_way('list', prefix .. ':queue:' .. queue)
clear_way('zset', prefix .. ':failed:' .. queue)
clear_way('zset', prefix .. ':canceled:' .. queue)
-- First what a server without memory refuses, so that it refuses before anything has changed.
redis.call('HSET', KEYS[1], 'status', 'queued', 'enqueued_at', timestamp(), 'started_at', '', 'ended_at', '',
  'worker_name', '', 'embedq_change', ARGV[4] .. ' ' .. status)
if fields[3] then
  redis.call('HSET', KEYS[1], 'retries_left', fields[3])
end
redis.call('SADD', KEYS[2], prefix .. ':queue:' .. queue)
redis.call(ARGV[3], prefix .. ':queue:' .. queue, id)
redis.call('ZREM', prefix .. ':failed:' .. queue, id)
redis.call('ZREM', prefix .. ':canceled:' .. queue, id)
start_waiting(KEYS[1], fields[4])
redis.call('PERSIST', KEYS[1] .. ':dependents')
redis.call('PERSIST', prefix .. ':job::' .. id .. ':dependencies')
return status
