-- Publishes what became of jobs. Each counts only while the named execution still holds its job, so a call sent
-- twice, or by a worker that lost its lease, changes nothing.
--
-- KEYS     none: the keys depend on the jobs
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the worker's name
-- ARGV[3]  seconds to keep a result where the job doesn't say
-- ARGV[4]  seconds to keep a failure where the job doesn't say
-- then for each job
--   +0  outcome: 'finished', 'failed', 'retry' (another attempt while retries are left, else failed), or 'parked' (not
--       tried: it waits for a worker that reads its wire version)
--   +1  queue name    +2  job id    +3  execution id
--   +4  base64 of the result, or of the compressed reason; empty: the stream with the entry is staged already, under
--       the name of the job's own, a colon and the execution id. Of one that is parked, the version
--   +5  seconds of work
--
-- Returns for each job the sum of 1: done, now or, as far as its result shows it, by the same call before; 2: something
-- is still to be done after it; 4: what was done is that it is tried again; 8: not done, as it is canceled. 0: held no
-- longer, nothing changed. Staged streams that were not used stay where they are.

local FIELDS = 6
local DONE, HAS_SEQUEL, AGAIN, CANCELED = 1, 2, 4, 8
local ENTRIES = {finished = {1, 'return_value'}, failed = {2, 'exc_string'}}

local prefix, worker = ARGV[1], ARGV[2]
local result_ttl, failure_ttl = tonumber(ARGV[3]), tonumber(ARGV[4])
local now, now_s = timestamp(), clock()
local replies, failures, parked, work_s = {}, 0, 0, 0
local ended = {finished = {}, failed = {}} -- by queue: score, id, score, id, ...
local held, pairs_by_queue, execution_keys, all_pairs = {}, {}, {}, {}
local some_have_dependents = false

-- Puts the job's entry into its result stream. Without the times that RQ may write there: they stand in the job's hash,
-- and here they would take a result of float16 vectors into the server's next size of blocks.
local function write_result(status, id, execution, payload)
  local stream = prefix .. ':results:' .. id
  if payload == '' then
    -- A stream is there already if the job failed before and was requeued.
    if redis.call('RENAMENX', stream .. ':' .. execution, stream) == 0 then
      local entry = redis.call('XRANGE', stream .. ':' .. execution, '-', '+')[1]
      append_result(stream, entry[2])
    end
  else
    local kind = ENTRIES[status]
    append_result(stream, {'type', kind[1], 'worker_name', worker, kind[2], payload, 'execution_id', execution})
  end
end

local function told(queue, id, has_sequel)
  if has_sequel then
    note_sequel(prefix, queue, id)
  end
  return has_sequel and DONE + HAS_SEQUEL or DONE
end

-- Whether the job's last result is this execution's: the same call came before, and its reply was lost.
local function was_published(id, execution)
  local entries = redis.pcall('XREVRANGE', prefix .. ':results:' .. id, '+', '-', 'COUNT', 1)
  local fields = entries[1] and entries[1][2] or {} -- none of a key of another type
  for i = 1, #fields, 2 do
    if fields[i] == 'execution_id' then
      return fields[i + 1] == execution
    end
  end
  return false
end

-- What is said of a job that this execution does not hold.
local function told_of_other(queue, id, execution, status)
  local sequel = redis.call('ZSCORE', prefix .. ':embedq:sequels:' .. queue, id) and HAS_SEQUEL or 0
  if status == 'canceled' then
    return CANCELED + sequel
  end
  -- The result of a stopped job is stop.lua's.
  return (status ~= 'stopped' and was_published(id, execution) and DONE or 0) + sequel
end

local function publish(i)
  local outcome, queue, id, execution = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local job = job_after(prefix, id, some_have_dependents and has_dependents(prefix, id))
  local pair = id .. ':' .. execution
  if not held[pair] or job.status ~= 'started' then
    end_execution(prefix, queue, id, execution, worker)
    return told_of_other(queue, id, execution, job.status)
  end
  execution_keys[#execution_keys + 1] = prefix .. ':execution:' .. pair
  execution_keys[#execution_keys + 1] = prefix .. ':executions:' .. id
  all_pairs[#all_pairs + 1] = pair
  work_s = work_s + tonumber(ARGV[i + 5])
  if outcome == 'parked' then
    parked = parked + 1
    wait_again(prefix, id)
    redis.call('ZADD', prefix .. ':embedq:parked:' .. queue, ARGV[i + 4], id)
    return DONE
  end
  if outcome ~= 'finished' then
    failures = failures + 1
    local again = outcome == 'retry' and try_again(prefix, queue, id)
    if again then
      return AGAIN + told(queue, id, again == 'scheduled' and job.has_rate_limit)
    end
  end
  local status = outcome == 'finished' and 'finished' or 'failed'
  local ttl = status == 'finished' and seconds(job.result_ttl, result_ttl) or seconds(job.failure_ttl, failure_ttl)
  ttl = kept_for(job, ttl)
  if ttl == 0 then
    delete_job(prefix, id)
  else
    write_result(status, id, execution, ARGV[i + 4])
    close_job(prefix, id, job, status, ttl, now)
    local registry = ended[status]
    registry[queue] = registry[queue] or {}
    table.insert(registry[queue], leaves_at(ttl, now_s))
    table.insert(registry[queue], id)
  end
  return told(queue, id, job.has_sequel)
end

clear_way('hash', prefix .. ':worker:' .. worker)
clear_way('set', prefix .. ':worker:' .. worker .. ':executions')
local dependents_keys = {}
for i = 5, #ARGV, FIELDS do
  local queue, id = ARGV[i + 1], ARGV[i + 2]
  if not pairs_by_queue[queue] then
    clear_way_for_end(prefix, queue)
    pairs_by_queue[queue] = {}
  end
  table.insert(pairs_by_queue[queue], id .. ':' .. ARGV[i + 3])
  dependents_keys[#dependents_keys + 1] = prefix .. ':job:' .. id .. ':dependents'
end
-- Hardly any job has dependents: asked once for all.
in_slices(dependents_keys, function(...)
  some_have_dependents = redis.call('EXISTS', ...) > 0 or some_have_dependents
end)
for queue, of_queue in pairs(pairs_by_queue) do
  local place = 0
  in_slices(of_queue, function(...)
    for _, score in ipairs(redis.call('ZMSCORE', wip_key(prefix, queue), ...)) do
      place = place + 1
      held[of_queue[place]] = score
    end
  end)
end
for i = 5, #ARGV, FIELDS do
  replies[#replies + 1] = publish(i)
end

in_slices(execution_keys, function(...) redis.call('DEL', ...) end)
in_slices(all_pairs, function(...) redis.call('SREM', prefix .. ':worker:' .. worker .. ':executions', ...) end)
for queue, of_queue in pairs(pairs_by_queue) do
  in_slices(of_queue, function(...) redis.call('ZREM', wip_key(prefix, queue), ...) end)
end
for status, by_queue in pairs(ended) do
  for queue, members in pairs(by_queue) do
    in_slices(members, function(...) redis.call('ZADD', prefix .. ':' .. status .. ':' .. queue, ...) end)
  end
end
count(prefix, worker, 'successful_job_count', #all_pairs - failures - parked)
count(prefix, worker, 'failed_job_count', failures)
count(prefix, worker, 'total_working_time', work_s)
return replies
