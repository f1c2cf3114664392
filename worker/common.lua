-- Put before each of the worker's scripts, behind the client's common.lua: what they share.

-- Whether this execution still holds its job: nobody canceled it, and its lease was not given to another.
local function holds(prefix, queue, id, execution)
  return redis.call('ZSCORE', wip_key(prefix, queue), id .. ':' .. execution)
    and redis.call('HGET', prefix .. ':job:' .. id, 'status') == 'started'
end

-- Puts a started job back: 'LPUSH' at the head of its queue, 'RPUSH' at the tail. Its waiting time runs anew.
local function put_back(prefix, queue, id, push)
  local key = prefix .. ':job:' .. id
  redis.call('HSET', key, 'status', 'queued', 'started_at', '', 'worker_name', '')
  local ttl = seconds(redis.call('HGET', key, 'ttl'), 0)
  if ttl > 0 then
    redis.call('EXPIRE', key, ttl)
  end
  redis.call(push, prefix .. ':queue:' .. queue, id)
end

-- One more attempt for a job that has retries left: at the tail of its queue, or the head ('queued'), or later
-- ('scheduled'), as RQ's Retry asked for. False if none is left.
local function try_again(prefix, queue, id)
  local key = prefix .. ':job:' .. id
  local fields = redis.call('HMGET', key, 'retries_left', 'retry_intervals', 'enqueue_at_front_on_retry')
  local left = tonumber(fields[1] or '') or 0
  if left < 1 then
    return false
  end
  redis.call('HSET', key, 'retries_left', left - 1)
  local readable, intervals = pcall(cjson.decode, fields[2] or '[]')
  if readable and type(intervals) == 'table' and #intervals > 0 then
    local interval = seconds(intervals[math.max(#intervals - left, 0) + 1], 0)
    if interval > 0 then
      -- `ended_at` tells RQ, and promote.lua, that it was tried before.
      redis.call('HSET', key, 'status', 'scheduled', 'started_at', '', 'worker_name', '', 'ended_at', timestamp())
      redis.call('ZADD', prefix .. ':scheduled:' .. queue, math.floor(clock()) + interval, id)
      return 'scheduled'
    end
  end
  put_back(prefix, queue, id, fields[3] == '1' and 'LPUSH' or 'RPUSH')
  return 'queued'
end

local function has_rate_limit(prefix, id)
  return redis.call('HEXISTS', prefix .. ':job:' .. id, 'rate_limit_key') == 1
end

-- Whether something follows this job's end: other jobs depend on it, it holds a slot of a rate limit, repeats, or names
-- a callback. RQ writes empty fields for callbacks that there are not.
local function has_sequel(prefix, id)
  local fields = redis.call('HMGET', prefix .. ':job:' .. id, 'rate_limit_key', 'repeats_left', 'success_callback_name',
    'failure_callback_name', 'stopped_callback_name')
  for _, field in ipairs({1, 2, 3, 4, 5}) do
    if fields[field] and fields[field] ~= '' then
      return true
    end
  end
  return redis.call('EXISTS', prefix .. ':job:' .. id .. ':dependents') == 1
end

-- Remembers that something follows this job's end: should the worker die before it is done, another does it.
local function note_sequel(prefix, queue, id)
  redis.call('ZADD', prefix .. ':embedq:sequels:' .. queue, clock(), id)
end

-- Ends a job as finished or failed: status, registry, result stream, times to live. fields: the stream entry's.
local function close_job(prefix, queue, id, status, ttl, ended_at, fields)
  local key, stream = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  local dependents, dependencies = key .. ':dependents', prefix .. ':job::' .. id .. ':dependencies'
  if ttl == 0 then
    if not has_sequel(prefix, id) then
      redis.call('DEL', key, stream, prefix .. ':executions:' .. id, dependencies)
      return
    end
    ttl = 600 -- kept until what follows is done, by another worker if need be
  end
  redis.call('HSET', key, 'status', status, 'ended_at', ended_at, 'last_heartbeat', ended_at)
  redis.call('XADD', stream, 'MAXLEN', '~', 10, '*', unpack(fields))
  local registry = prefix .. ':' .. status .. ':' .. queue
  if ttl < 0 then
    redis.call('ZADD', registry, '+inf', id)
    redis.call('PERSIST', stream)
  else
    redis.call('ZADD', registry, math.floor(clock()) + ttl, id)
    for _, expiring in ipairs({key, stream, dependents, dependencies}) do
      redis.call('EXPIRE', expiring, ttl)
    end
  end
end

-- Counts into a worker's hash, unless the worker is gone: a counter must not bring its key back for ever.
local function count(prefix, worker, field, amount)
  local key = prefix .. ':worker:' .. worker
  if amount ~= 0 and redis.call('EXISTS', key) == 1 then
    redis.call('HINCRBYFLOAT', key, field, amount)
  end
end

