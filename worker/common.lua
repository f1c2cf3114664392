-- Put before each of the worker's scripts, behind the client's common.lua: what they share.

-- Retries of one job, whatever its hash says; as in producer/settings.py.
local MAX_RETRIES = 1000

-- Values given to one command: Lua's stack takes some 8,000. Even, for commands that take pairs.
local SLICE = 4000

-- Calls `action(first, second, ...)` with a list's values, in as many calls as it takes; with none for an empty list.
local function in_slices(list, action)
  for first = 1, #list, SLICE do
    action(unpack(list, first, math.min(first + SLICE - 1, #list)))
  end
end

-- Whether this execution still holds its job: nobody canceled it, and its lease was not given to another.
local function holds(prefix, queue, id, execution)
  return type(redis.pcall('ZSCORE', wip_key(prefix, queue), id .. ':' .. execution)) == 'string'
    and redis.pcall('HGET', prefix .. ':job:' .. id, 'status') == 'started' -- no hash any more: held no longer
end

-- How often a job was tried before, of its fields embedq_attempts, embedq_retries and retries_left: as try_again counts
-- it, or as RQ's own clean-up, which may find an abandoned job first, has used up its retries.
local function attempts(counted, retries, left)
  local used = retries and left and seconds(retries, 0) - seconds(left, 0) or 0
  return math.max(0, seconds(counted, 0), used)
end

-- A started job waits again. Its waiting time runs anew.
local function wait_again(prefix, id)
  local key = prefix .. ':job:' .. id
  redis.call('HSET', key, 'status', 'queued', 'started_at', '', 'worker_name', '')
  start_waiting(key, redis.call('HGET', key, 'ttl'))
end

-- Puts a started job back: 'LPUSH' at the head of its queue, 'RPUSH' at the tail.
local function put_back(prefix, queue, id, push)
  wait_again(prefix, id)
  redis.call(push, prefix .. ':queue:' .. queue, id)
end

-- One more attempt for a job that has retries left: at the tail of its queue, or the head ('queued'), or later
-- ('scheduled'), as RQ's Retry asked for. False if none is left. Counts the attempt that is over: claim.lua tells it.
local function try_again(prefix, queue, id)
  local key = prefix .. ':job:' .. id
  local fields = redis.call('HMGET', key, 'retries_left', 'retry_intervals', 'enqueue_at_front_on_retry',
    'embedq_attempts', 'embedq_retries')
  local left = math.min(MAX_RETRIES, seconds(fields[1], 0))
  if left < 1 then
    return false
  end
  redis.call('HSET', key, 'retries_left', left - 1, 'embedq_attempts', attempts(fields[4], fields[5], fields[1]) + 1)
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

local function has_dependents(prefix, id)
  return redis.call('EXISTS', prefix .. ':job:' .. id .. ':dependents') == 1
end

-- What the end of a job needs to know of it: status, result_ttl, failure_ttl, has_rate_limit, has_dependencies (it
-- waited for others), has_dependents, has_sequel (something follows its end: other jobs depend on it, it holds a slot
-- of a rate limit, repeats, or names a callback). Of what is no job hash, all false.
local function job_after(prefix, id, dependents)
  local fields = redis.pcall('HMGET', prefix .. ':job:' .. id, 'status', 'result_ttl', 'failure_ttl', 'rate_limit_key',
    'dependency_ids', 'repeats_left', 'success_callback_name', 'failure_callback_name', 'stopped_callback_name')
  if fields.err then
    return {}
  end
  local has_sequel = dependents or fields[4] or fields[6]
  for i = 7, 9 do
    has_sequel = has_sequel or (fields[i] or '') ~= '' -- RQ writes empty names for callbacks that there are not
  end
  return {status = fields[1], result_ttl = fields[2], failure_ttl = fields[3], has_rate_limit = fields[4],
    has_dependencies = fields[5], has_dependents = dependents, has_sequel = has_sequel}
end

-- Clears the way for whatever may become of a queue's jobs.
local function clear_way_for_end(prefix, queue)
  clear_way('list', prefix .. ':queue:' .. queue)
  clear_way('zset', wip_key(prefix, queue))
  for _, registry in ipairs({':finished:', ':failed:', ':scheduled:', ':embedq:sequels:', ':embedq:parked:'}) do
    clear_way('zset', prefix .. registry .. queue)
  end
end

-- Remembers that something follows a job's end until it is done: should the worker die before, another does it.
local function note_sequel(prefix, queue, id)
  redis.call('ZADD', prefix .. ':embedq:sequels:' .. queue, clock(), id)
end

local function is_error(reply)
  return type(reply) == 'table' and reply.err ~= nil
end

-- Makes room for a key of ours where somebody put one of another type. Only then: a script that has deleted something
-- may go on writing though the server is full, which it must learn.
local function drop_other_type(key, reply)
  if string.find(reply.err, 'WRONGTYPE', 1, true) then
    redis.call('DEL', key)
  end
end

-- Appends an entry {name, value, ...} to a result stream, whatever somebody put under its name.
local function append_result(stream, entry)
  local reply = redis.pcall('XADD', stream, 'MAXLEN', '~', 10, '*', unpack(entry))
  if is_error(reply) then
    drop_other_type(stream, reply)
    redis.call('XADD', stream, '*', unpack(entry))
  end
end

-- For how many seconds an ended job is kept; 0: not at all. One with a sequel stays until that is done, by another
-- worker if need be.
local function kept_for(job, ttl)
  return ttl == 0 and job.has_sequel and 600 or ttl
end

-- When a job that ends now leaves the registry: the score there.
local function leaves_at(ttl, now_s)
  return ttl < 0 and '+inf' or math.floor(now_s) + ttl
end

local function delete_job(prefix, id)
  local key = prefix .. ':job:' .. id
  redis.call('DEL', key, prefix .. ':results:' .. id, prefix .. ':executions:' .. id,
    prefix .. ':job::' .. id .. ':dependencies')
end

-- Marks a job, whose result is written, as ended, to be kept for `ttl` seconds (-1: for good).
local function close_job(prefix, id, job, status, ttl, ended_at)
  local key, stream = prefix .. ':job:' .. id, prefix .. ':results:' .. id
  redis.call('HSET', key, 'status', status, 'ended_at', ended_at, 'last_heartbeat', ended_at)
  if ttl < 0 then
    redis.call('PERSIST', stream)
    return
  end
  redis.call('EXPIRE', key, ttl)
  redis.call('EXPIRE', stream, ttl)
  if job.has_dependents then
    redis.call('EXPIRE', key .. ':dependents', ttl)
  end
  if job.has_dependencies then
    redis.call('EXPIRE', prefix .. ':job::' .. id .. ':dependencies', ttl)
  end
end

-- Counts into a worker's hash, unless the worker is gone: a counter must not bring its key back for ever.
local function count(prefix, worker, field, amount)
  local key = prefix .. ':worker:' .. worker
  if amount ~= 0 and redis.call('EXISTS', key) == 1 then
    redis.pcall('HINCRBYFLOAT', key, field, amount) -- the field may be no number
  end
end

