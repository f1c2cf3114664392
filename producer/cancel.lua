-- Cancels jobs that have not ended yet, whether they wait or run. A worker that holds one loses its hold: what it
-- publishes later changes nothing, and it is told at once, by a command on the channel on which RQ's workers listen.
-- Whoever waits for the result is woken by an entry of RQ's type 3 (stopped).
--
-- KEYS     none: the keys depend on the jobs
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  seconds to keep a canceled job where it doesn't say so itself
-- ARGV[3]  the nonce: unique to this call, so that it gives the same answer when it is sent again
-- then     the job ids
--
-- Returns for each job the status found: a terminal one means that nothing was changed. False if there is no such job.

local prefix, default_ttl, nonce = ARGV[1], tonumber(ARGV[2]), ARGV[3]

-- pcall: a user who may not publish cancels all the same, and the worker learns of it when it publishes.
local function tell(worker, id)
  redis.pcall('PUBLISH', prefix .. ':pubsub:' .. worker, cjson.encode({command = 'embedq-cancel', job_id = id}))
end

local function cancel(id)
  local key, stream = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  local fields = redis.call('HMGET', key, 'status', 'origin', 'failure_ttl', 'embedq_change')
  local status, queue = fields[1], fields[2]
  local ttl = seconds(fields[3], default_ttl)
  if not status or not queue then
    return false
  end
  local before = found_before(fields[4], nonce)
  if before then
    return before
  end
  if status == 'finished' or status == 'failed' or status == 'canceled' or status == 'stopped' then
    return status
  end

  -- First what a server without memory refuses, so that it refuses before anything has changed.
  redis.call('HSET', key, 'status', 'canceled', 'ended_at', timestamp(), 'embedq_change', nonce .. ' ' .. status)
  redis.call('XADD', stream, 'MAXLEN', '~', 10, '*', 'type', 3, 'worker_name', '')
  if status == 'queued' then
    redis.call('LREM', prefix .. ':queue:' .. queue, 1, id)
  end
  redis.call('ZREM', prefix .. ':scheduled:' .. queue, id)
  redis.call('ZREM', prefix .. ':deferred:' .. queue, id)
  redis.call('ZREM', prefix .. ':ready:' .. queue, id) -- where RQ has jobs between their dependencies and the queue
  for _, execution in ipairs(redis.call('ZRANGE', prefix .. ':executions:' .. id, 0, -1)) do
    local worker = redis.call('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'worker_name') or ''
    end_execution(prefix, queue, id, execution, worker)
    tell(worker, id)
  end

  -- RQ never clears this registry, so each cancellation drops what is as old as a canceled job can be.
  local canceled, now_s = prefix .. ':canceled:' .. queue, math.floor(clock())
  redis.call('ZADD', canceled, now_s, id)
  if ttl == 0 then
    ttl = 60 -- whoever waits for the result is to learn of it
  end
  if ttl > 0 then
    redis.call('EXPIRE', key, ttl)
    redis.call('EXPIRE', stream, ttl)
    redis.call('EXPIRE', key .. ':dependents', ttl)
    redis.call('EXPIRE', prefix .. ':job::' .. id .. ':dependencies', ttl)
    redis.call('ZREMRANGEBYSCORE', canceled, '-inf', '(' .. (now_s - math.max(ttl, default_ttl)))
  end
  return status
end

local found = {}
for i = 4, #ARGV do
  found[i - 3] = cancel(ARGV[i])
end
return found
