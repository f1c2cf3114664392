-- Deletes failed jobs with all that belongs to them. One that was requeued meanwhile, or has failed anew since it was
-- looked at, is left alone, and so is one after whose end something is still to be done, or that others wait for.
--
-- KEYS     none: the keys depend on the jobs
-- ARGV[1]  RQ's key prefix
-- then     queue name, job id, ended_at as it was looked at ('': it told no time) for each job
--
-- Returns for each job 1: gone, by this call or before; 0: left alone.

local prefix = ARGV[1]

local function forget(queue, id)
  local registry = prefix .. ':failed:' .. queue
  clear_way('zset', registry)
  redis.call('ZREM', registry, id)
end

-- Records that whoever died may have left. pcall: they may be of another type, and the worker anybody's word.
local function end_executions(queue, id)
  local records = prefix .. ':executions:' .. id
  local executions = redis.pcall('ZRANGE', records, 0, -1)
  for _, execution in ipairs(executions) do
    local worker = redis.pcall('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'worker_name')
    end_execution(prefix, queue, id, execution, type(worker) == 'string' and worker or '')
  end
  redis.call('DEL', records)
end

local function purge(queue, id, ended_at)
  local key = prefix .. ':job:' .. id
  local fields = redis.pcall('HMGET', key, 'status', 'ended_at', 'group_id', 'origin')
  if fields.err then
    return 0 -- something else stands there
  end
  local status = fields[1]
  if not status then
    if redis.call('EXISTS', key) == 0 then
      forget(queue, id)
      return 1
    end
    return 0
  end
  if (status ~= 'failed' and status ~= 'stopped') or (ended_at ~= '' and fields[2] ~= ended_at) then
    return 0
  end
  local origin = fields[4] or queue
  for _, name in ipairs({queue, origin}) do
    if type(redis.pcall('ZSCORE', prefix .. ':embedq:sequels:' .. name, id)) == 'string' then
      return 0
    end
  end
  if redis.call('EXISTS', key .. ':dependents') == 1 then
    return 0 -- they would wait for ever
  end
  end_executions(origin, id)
  if fields[3] then
    redis.pcall('SREM', prefix .. ':group:' .. fields[3], id)
  end
  redis.call('DEL', key, prefix .. ':job::' .. id .. ':dependencies', prefix .. ':results:' .. id)
  forget(queue, id)
  if origin ~= queue then
    forget(origin, id)
  end
  return 1
end

local replies = {}
for i = 2, #ARGV, 3 do
  replies[#replies + 1] = purge(ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
return replies
