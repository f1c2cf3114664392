-- Cancels jobs that have not ended yet, whether they wait or run. A worker that holds one loses its hold: what it
-- publishes later changes nothing, and it is told at once, on a channel of its own for this.
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
  redis.pcall('PUBLISH', prefix .. ':embedq:cancel:' .. worker, id)
end

-- Without the right to the workers' records (see users.acl) they are left to the worker, which the job's hash names: it
-- holds the job no longer, as that is canceled, and strikes them off when it renews or publishes.
local function end_executions(id, queue, worker_name)
  local records, wip = prefix .. ':executions:' .. id, wip_key(prefix, queue)
  clear_way('zset', records)
  clear_way('zset', wip)
  local executions = redis.pcall('ZRANGE', records, 0, -1)
  if executions.err then
    if (worker_name or '') ~= '' then
      tell(worker_name, id)
    end
    return
  end
  for _, execution in ipairs(executions) do
    local worker = redis.pcall('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'worker_name')
    worker = type(worker) == 'string' and worker or ''
    end_execution(prefix, queue, id, execution, worker)
    tell(worker, id)
  end
end

local function cancel(id)
  local key, stream = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  local fields = redis.pcall('HMGET', key, 'status', 'origin', 'failure_ttl', 'embedq_change', 'worker_name')
  if fields.err then
    return false -- something else stands there
  end
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

  clear_way('list', prefix .. ':queue:' .. queue)
  clear_way('stream', stream)
  for _, registry in ipairs({':scheduled:', ':deferred:', ':ready:', ':canceled:', ':embedq:parked:'}) do
    clear_way('zset', prefix .. registry .. queue)
  end
  -- First what a server without memory refuses, so that it refuses before anything has changed.
  redis.call('HSET', key, 'status', 'canceled', 'ended_at', timestamp(), 'embedq_change', nonce .. ' ' .. status)
  redis.call('XADD', stream, 'MAXLEN', '~', 10, '*', 'type', 3, 'worker_name', '')
  if status == 'queued' then
    redis.call('LREM', prefix .. ':queue:' .. queue, 1, id)
    redis.call('ZREM', prefix .. ':embedq:parked:' .. queue, id)
  elseif status == 'started' then
    end_executions(id, queue, fields[5])
  end
  redis.call('ZREM', prefix .. ':scheduled:' .. queue, id)
  redis.call('ZREM', prefix .. ':deferred:' .. queue, id)
  redis.call('ZREM', prefix .. ':ready:' .. queue, id) -- where RQ has jobs between their dependencies and the queue

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
