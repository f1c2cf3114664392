-- Takes back the jobs of one queue whose lease has run out: another attempt while retries are left, else failed. A job
-- that was tried before, and that the worker had not begun, is not to blame for its end: it goes back as it was.
--
-- KEYS[1]  the queue's started registry
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the queue's name
-- ARGV[3]  seconds to keep a failure where the job doesn't say
-- ARGV[4]  base64 of the compressed reason of those whose execution notes none
-- ARGV[5]  at most so many in one call
--
-- Returns {number taken back, how many of them are tried again, how many failed, ids of those after which something is still to be done...}.

local prefix, queue, now, limit = ARGV[1], ARGV[2], timestamp(), tonumber(ARGV[5])
local cutoff = clock()
local replies, left_alone, taken = {0, 0, 0}, 0, 0

local function tell_sequel(id)
  note_sequel(prefix, queue, id)
  replies[#replies + 1] = id
end

local function fail(id, job, worker, reason)
  local ttl = kept_for(job, seconds(job.failure_ttl, tonumber(ARGV[3])))
  if ttl == 0 then
    delete_job(prefix, id)
    return
  end
  append_result(prefix .. ':results:' .. id, {'type', 2, 'worker_name', worker, 'exc_string', reason})
  close_job(prefix, id, job, 'failed', ttl, now)
  redis.call('ZADD', prefix .. ':failed:' .. queue, leaves_at(ttl, cutoff), id)
end

local function was_tried(id)
  local fields = redis.call('HMGET', prefix .. ':job:' .. id, 'embedq_attempts', 'embedq_retries', 'retries_left')
  return attempts(unpack(fields)) > 0
end

local function recover(id, execution)
  local job = job_after(prefix, id, has_dependents(prefix, id))
  local record = prefix .. ':execution:' .. id .. ':' .. execution
  local noted = redis.pcall('HMGET', record, 'worker_name', 'begun') -- of a record of another type nothing is known
  local worker, begun = noted[1] or '', noted[2]
  if job.status == 'started' and not begun and was_tried(id) then
    put_back(prefix, queue, id, 'RPUSH')
    replies[2] = replies[2] + 1
  elseif job.status == 'started' then
    local again = try_again(prefix, queue, id)
    if again then
      replies[2] = replies[2] + 1
      if again == 'scheduled' and job.has_rate_limit then
        tell_sequel(id)
      end
    else
      fail(id, job, worker, begun or ARGV[4])
      replies[3] = replies[3] + 1
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
replies[1] = taken
return replies
