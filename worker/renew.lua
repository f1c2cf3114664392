-- Extends the leases of one worker, and the worker's own heartbeat.
--
-- KEYS[1]  the worker's hash
-- KEYS[2]  the set of the worker's executions
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the worker's name
-- ARGV[3]  the lease, in seconds
-- ARGV[4]  seconds until the worker counts as dead
-- then     queue name, job id, execution id for each job
--
-- Returns {whether Redis knows the worker 0|1, then the places (1, 2, ...) of the jobs that it no longer holds: below 0
-- (-1, -2, ...) of those that are canceled}.

local prefix, worker, now, lease = ARGV[1], ARGV[2], timestamp(), tonumber(ARGV[3])
local ends, keep = clock() + lease, math.ceil(lease) + 3600
-- First, since a full server refuses a script that begins with a write which may take memory, and no other.
redis.call('EXPIRE', KEYS[2], keep)
clear_way('hash', KEYS[1])
clear_way('set', KEYS[2])
-- Not EXISTS: a state or heartbeat written since would count as a hash.
local replies = {redis.call('HEXISTS', KEYS[1], 'birth')}
local is_clear = {}
for i = 5, #ARGV, 3 do
  local queue, id, execution = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if not is_clear[queue] then
    clear_way('zset', wip_key(prefix, queue))
    is_clear[queue] = true
  end
  if holds(prefix, queue, id, execution) then
    redis.call('ZADD', wip_key(prefix, queue), 'XX', ends, id .. ':' .. execution)
    redis.call('EXPIRE', prefix .. ':execution:' .. id .. ':' .. execution, keep)
    redis.pcall('HSET', prefix .. ':execution:' .. id .. ':' .. execution, 'last_heartbeat',
      string.format('%.6f', clock()))
    redis.pcall('ZADD', prefix .. ':executions:' .. id, 'XX', ends + keep, execution)
    redis.call('EXPIRE', prefix .. ':executions:' .. id, keep)
    redis.call('HSET', prefix .. ':job:' .. id, 'last_heartbeat', now)
  else
    end_execution(prefix, queue, id, execution, worker)
    local is_canceled = redis.pcall('HGET', prefix .. ':job:' .. id, 'status') == 'canceled'
    replies[#replies + 1] = (i - 2) / 3 * (is_canceled and -1 or 1)
  end
end
if replies[1] == 1 then
  redis.call('HSET', KEYS[1], 'last_heartbeat', now)
  redis.call('EXPIRE', KEYS[1], ARGV[4])
end
return replies
