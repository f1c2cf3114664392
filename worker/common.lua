-- Put before each of the worker's scripts: what they share. RQ's records of one execution are in five places.

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local function wip_key(prefix, queue)
  return prefix .. ':wip:' .. queue
end

-- Whether this execution still holds its job: nobody canceled it, and its lease was not given to another.
local function holds(prefix, queue, id, execution)
  return redis.call('ZSCORE', wip_key(prefix, queue), id .. ':' .. execution)
    and redis.call('HGET', prefix .. ':job:' .. id, 'status') == 'started'
end

-- Drops every record of one execution.
local function end_execution(prefix, queue, id, execution, worker)
  local pair = id .. ':' .. execution
  redis.call('ZREM', wip_key(prefix, queue), pair)
  redis.call('ZREM', prefix .. ':executions:' .. id, execution)
  redis.call('DEL', prefix .. ':execution:' .. pair)
  redis.call('SREM', prefix .. ':worker:' .. worker .. ':executions', pair)
end

-- Puts a started job back: 'LPUSH' at the head of its queue, 'RPUSH' at the tail. Its waiting time runs anew.
local function put_back(prefix, queue, id, push)
  local key = prefix .. ':job:' .. id
  redis.call('HSET', key, 'status', 'queued', 'started_at', '', 'worker_name', '')
  local ttl = tonumber(redis.call('HGET', key, 'ttl') or '')
  if ttl and ttl > 0 then
    redis.call('EXPIRE', key, ttl)
  end
  redis.call(push, prefix .. ':queue:' .. queue, id)
end

-- Ends a job as finished or failed: status, registry, result stream, times to live. fields: the stream entry's.
local function close_job(prefix, queue, id, status, ttl, ended_at, fields)
  local key, stream = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  local dependents, dependencies = key .. ':dependents', prefix .. ':job::' .. id .. ':dependencies'
  if ttl == 0 then
    if redis.call('EXISTS', dependents) == 0 then
      redis.call('DEL', key, stream, prefix .. ':executions:' .. id, dependencies)
      return
    end
    ttl = 60 -- kept until the jobs that depend on it are on their queues
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

