-- Cancels one job that has not ended yet, whether it waits or runs. A worker that holds it loses its hold: what
-- it publishes later changes nothing. Whoever waits for the result is woken by an entry of RQ's type 3 (stopped).
--
-- KEYS[1]  the job's hash
-- KEYS[2]  the job's result stream
-- KEYS[3]  the job's executions
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the job id
-- ARGV[3]  seconds to keep the canceled job where it doesn't say so itself
--
-- Returns the status found: a terminal one means that nothing was changed. False if there is no such job.

local prefix, id = ARGV[1], ARGV[2]
local fields = redis.call('HMGET', KEYS[1], 'status', 'origin', 'failure_ttl')
local status, queue = fields[1], fields[2]
local ttl = seconds(fields[3], tonumber(ARGV[3]))
if not status or not queue then
  return false
end
if status == 'finished' or status == 'failed' or status == 'canceled' or status == 'stopped' then
  return status
end

redis.call('LREM', prefix .. ':queue:' .. queue, 0, id)
redis.call('ZREM', prefix .. ':scheduled:' .. queue, id)
redis.call('ZREM', prefix .. ':deferred:' .. queue, id)
for _, execution in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  local worker = redis.call('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'worker_name') or ''
  end_execution(prefix, queue, id, execution, worker)
end

redis.call('HSET', KEYS[1], 'status', 'canceled', 'ended_at', timestamp())
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 10, '*', 'type', 3, 'worker_name', '')
-- RQ never clears this registry, so each cancellation drops what is as old as a canceled job can be.
local canceled = prefix .. ':canceled:' .. queue
local now_s = math.floor(clock())
redis.call('ZADD', canceled, now_s, id)
if ttl == 0 then
  ttl = 60 -- whoever waits for the result is to learn of it
end
if ttl > 0 then
  redis.call('EXPIRE', KEYS[1], ttl)
  redis.call('EXPIRE', KEYS[2], ttl)
  redis.call('ZREMRANGEBYSCORE', canceled, '-inf', '(' .. (now_s - ttl))
end
return status
