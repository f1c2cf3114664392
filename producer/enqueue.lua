-- Puts many jobs on one queue, all of them or none: at once, later, or when the jobs they depend on have finished.
-- A job whose id and data are there already is left as it is: the same call sent twice enqueues once.
--
-- KEYS[1]   the queue's list
-- KEYS[2]   the set of all queues
-- ARGV[1]   RQ's key prefix
-- ARGV[2]   the queue's name
-- ARGV[3]   'RPUSH' or 'LPUSH' (at the head; the first job of the call comes out first)
-- ARGV[4]   seconds until a waiting job vanishes, 0: never
-- ARGV[5]   at most so many jobs on the queue, delayed and deferred ones included; 0: no limit
-- ARGV[6]   1: an id is the hash of its request, and a job of that id which failed or was canceled is enqueued afresh
-- ARGV[7]   'now'; 'at' and ARGV[8]: a second since 1970; 'in' and ARGV[8]: seconds from now
-- ARGV[9]   the group that the jobs join, or ''
-- ARGV[10]  d, the number of jobs that each of these depends on
-- ARGV[11]  n, the number of ARGVs with the fields all jobs share: name, value, name, value, ...
-- then      d job ids, n shared fields; job id, data, description, number of texts for each of at most 1,000 jobs
--
-- Returns {'done', the ids that were there already...}, or with nothing written {'taken', the ids of jobs with other
-- data...}, {'full', jobs on the queue} or {'missing', the dependencies that do not exist...}.

local LINGER_S = 60 -- for which a result that dedupe finds is kept at least

local prefix, queue, push, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local max_depth, is_hash, when, group = tonumber(ARGV[5]), ARGV[6] == '1', ARGV[7], ARGV[9]
local first_shared = 12 + tonumber(ARGV[10])
local first_job = first_shared + tonumber(ARGV[11])
local job_prefix = prefix .. ':job:'
local scheduled, deferred = prefix .. ':scheduled:' .. queue, prefix .. ':deferred:' .. queue
local parked = prefix .. ':embedq:parked:' .. queue

local function has_failed(status)
  return status == 'failed' or status == 'stopped' or status == 'canceled'
end

local ids, job_keys = {}, {}
for i = first_job, #ARGV, 4 do
  ids[#ids + 1] = ARGV[i]
  job_keys[#job_keys + 1] = job_prefix .. ARGV[i]
end

-- Mostly no id is there, which one command tells.
local fresh, known, taken, again = {}, {'done'}, {'taken'}, {}
-- A result that is told of is there for a while yet.
local function linger(id, key, status)
  local left = status == 'finished' and redis.call('TTL', key) or -1
  if left >= 0 and left < LINGER_S then
    redis.call('EXPIRE', key, LINGER_S)
    redis.call('EXPIRE', prefix .. ':results:' .. id, LINGER_S)
  end
end

clear_way('list', KEYS[1])
clear_way('zset', scheduled)
clear_way('zset', deferred)
local any_is_there = redis.call('EXISTS', unpack(job_keys)) > 0
for place, key in ipairs(job_keys) do
  if not any_is_there or redis.call('EXISTS', key) == 0 then
    fresh[#fresh + 1] = place
  else
    local fields = redis.call('HMGET', key, 'data', 'status', 'origin')
    if not is_hash and fields[1] ~= ARGV[first_job + 4 * place - 3] then
      taken[#taken + 1] = ids[place]
    elseif is_hash and has_failed(fields[2]) then
      fresh[#fresh + 1] = place
      again[place] = fields[3] or queue
    else
      known[#known + 1] = ids[place]
      linger(ids[place], key, fields[2])
    end
  end
end
if #taken > 1 then
  return taken
end

if #fresh > 0 and max_depth > 0 then
  clear_way('zset', parked)
  local depth = redis.call('LLEN', KEYS[1]) + redis.call('ZCARD', scheduled) + redis.call('ZCARD', deferred)
    + redis.call('ZCARD', parked)
  if depth + #fresh > max_depth then
    return {'full', depth}
  end
end

local missing, unfinished = {'missing'}, 0
for i = 12, first_shared - 1 do
  local key = job_prefix .. ARGV[i]
  local status = redis.call('HGET', key, 'status')
  if not status and redis.call('EXISTS', key) == 0 then
    missing[#missing + 1] = ARGV[i]
  elseif status ~= 'finished' then
    unfinished = unfinished + 1
  end
end
if #fresh > 0 and #missing > 1 then
  return missing
end

-- From here on everything is written. The first command is one that a server without memory refuses, so that it
-- refuses before anything has changed.
local now = timestamp()
clear_way('set', KEYS[2])
redis.call('SADD', KEYS[2], KEYS[1])
if group ~= '' then
  clear_way('set', prefix .. ':groups')
  clear_way('set', prefix .. ':group:' .. group)
  redis.call('SADD', prefix .. ':groups', group)
  redis.call('SADD', prefix .. ':group:' .. group, unpack(ids))
end

local due, status = 0, 'queued'
if when ~= 'now' then
  due = tonumber(ARGV[8]) + (when == 'in' and clock() or 0)
end
if unfinished > 0 then
  status = 'deferred'
elseif due > 0 and due > clock() then
  status = 'scheduled'
end
local shared = {'status', status, 'created_at', now, 'origin', queue}
if status == 'queued' then
  shared[#shared + 1], shared[#shared + 2] = 'enqueued_at', now
end
for i = first_shared, first_job - 1 do
  shared[#shared + 1] = ARGV[i]
end

-- A job that had ended is as if new.
local function renew(id, key, its_queue)
  redis.pcall('ZREM', prefix .. ':failed:' .. its_queue, id)
  redis.pcall('ZREM', prefix .. ':canceled:' .. its_queue, id)
  redis.call('HSET', key, 'started_at', '', 'ended_at', '', 'worker_name', '')
  redis.call('PERSIST', key)
  redis.call('PERSIST', key .. ':dependents')
  redis.call('DEL', prefix .. ':job::' .. id .. ':dependencies')
end

local function depend(id)
  redis.call('ZADD', deferred, math.floor(clock()), id)
  clear_way('set', prefix .. ':job::' .. id .. ':dependencies')
  for i = 12, first_shared - 1 do
    local dependents = job_prefix .. ARGV[i] .. ':dependents'
    clear_way('set', dependents)
    redis.call('SADD', dependents, id)
    local left = redis.call('TTL', job_prefix .. ARGV[i])
    -- That of one that has failed: its keys go together. One that waits has a time to live of another kind.
    if left > 0 and has_failed(redis.call('HGET', job_prefix .. ARGV[i], 'status')) then
      redis.call('EXPIRE', dependents, left)
    end
  end
  redis.call('SADD', prefix .. ':job::' .. id .. ':dependencies', unpack(ARGV, 12, first_shared - 1))
end

local queued = {}
for _, place in ipairs(fresh) do
  local i, id, key = first_job + 4 * place - 4, ids[place], job_keys[place]
  if again[place] then
    -- What the earlier call asked for and this one does not.
    redis.call('HDEL', key, 'ttl', 'retry_intervals', 'group_id', 'enqueue_at_front', 'success_callback_name',
      'failure_callback_name', 'dependency_id', 'dependency_ids', 'embedq_attempts',
      'embedq_traceparent', 'embedq_tracestate')
  end
  redis.call('HSET', key, 'data', ARGV[i + 1], 'description', ARGV[i + 2], 'embedq_texts', ARGV[i + 3], unpack(shared))
  if again[place] then
    renew(id, key, again[place])
  end
  if status == 'deferred' then
    depend(id)
  elseif status == 'scheduled' then
    redis.call('ZADD', scheduled, due, id)
  else
    queued[#queued + 1] = id
    if ttl > 0 then
      redis.call('EXPIRE', key, ttl)
    end
  end
end
if #queued > 0 then
  if push == 'LPUSH' then
    for left = 1, math.floor(#queued / 2) do
      local right = #queued + 1 - left
      queued[left], queued[right] = queued[right], queued[left]
    end
  end
  redis.call(push, KEYS[1], unpack(queued))
end
return known
