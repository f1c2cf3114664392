-- Takes back the jobs of one queue whose lease has run out: another attempt while retries are left, else failed.
--
-- KEYS[1]  the queue's started registry
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the queue's name
-- ARGV[3]  seconds to keep a failure where the job doesn't say
-- ARGV[4]  base64 of the compressed reason
-- ARGV[5]  at most so many in one call
--
-- Returns {number tried again, number failed, ids of those after which something is still to be done...}.

local prefix, queue, now, limit = ARGV[1], ARGV[2], timestamp(), tonumber(ARGV[5])
local cutoff = clock()
local replies, left_alone, taken = {0, 0}, 0, 0

local function tell_sequel(id)
  note_sequel(prefix, queue, id)
  replies[#replies + 1] = id
end

local function fail(id, job, worker)
  local ttl = kept_for(job, seconds(job.failure_ttl, tonumber(ARGV[3])))
  if ttl == 0 then
    delete_job(prefix, id)
    return
  end
  append_result(prefix .. ':results:' .. id, {'type', 2, 'worker_name', worker, 'exc_string', ARGV[4]})
  close_job(prefix, id, job, 'failed', ttl, now)
  redis.call('ZADD', prefix .. ':failed:' .. queue, leaves_at(ttl, cutoff), id)
end

local function recover(id, execution)
  local job = job_after(prefix, id, has_dependents(prefix, id))
  local worker = redis.pcall('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'worker_name')
  worker = type(worker) == 'string' and worker or '' -- of a record of another type nothing is known
  if job.status == 'started' then
    local again = try_again(prefix, queue, id)
    if again then
      replies[1] = replies[1] + 1
      if again == 'scheduled' and job.has_rate_limit then
        tell_sequel(id)
      end
    else
      fail(id, job, worker)
      replies[2] = replies[2] + 1
      if job.has_sequel then
        tell_sequel(id)
      end
    end
  end
  end_execution(prefix, queue, id, execution, worker)
end

clear_way_for_end(prefix, queue)
while taken < limit do
  local pairs_here = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', cutoff, 'LIMIT', left_alone, 100)
  if #pairs_here == 0 then
    break
  end
  for _, pair in ipairs(pairs_here) do
    local id, execution = string.match(pair, '^(.*):([^:]*)$')
    if id then
      recover(id, execution)
      taken = taken + 1
    else
      left_alone = left_alone + 1
    end
  end
end
return replies
