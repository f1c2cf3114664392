-- Publishes what became of jobs. Each counts only while the named execution still holds its job, so a call sent
-- twice, or by a worker that lost its lease, changes nothing.
--
-- KEYS     none: the keys depend on the jobs
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the worker's name
-- ARGV[3]  now, as RQ writes a time
-- ARGV[4]  seconds to keep a result where the job doesn't say
-- ARGV[5]  seconds to keep a failure where the job doesn't say
-- then for each job
--   +0  outcome: 'finished', 'failed', or 'retry' (another attempt while retries are left, else failed)
--   +1  queue name    +2  job id    +3  execution id
--   +4  base64 of the result, or of the compressed reason
--   +5  seconds of work
--
-- Returns for each job 0: held no longer, nothing changed; 1: done; 2: done, now or by the same call before, and RQ
-- has something to do after it.

local prefix, worker, now = ARGV[1], ARGV[2], ARGV[3]
local result_ttl, failure_ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local replies, successes, failures, work_s = {}, 0, 0, 0

local function entry(kind, field, payload, id, execution)
  local created = redis.call('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'created_at') or clock()
  return {'type', kind, 'worker_name', worker, field, payload, 'execution_id', execution,
    'execution_started_at', created, 'execution_ended_at', string.format('%.6f', clock())}
end

for i = 6, #ARGV, 6 do
  local outcome, queue, id, execution, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  if not holds(prefix, queue, id, execution) then
    local status = redis.call('HGET', prefix .. ':job:' .. id, 'status')
    local has_ended = status == 'finished' or status == 'failed' or status == 'scheduled'
    replies[#replies + 1] = has_ended and has_sequel(prefix, id) and 2 or 0
  else
    local ttls = redis.call('HMGET', prefix .. ':job:' .. id, 'result_ttl', 'failure_ttl')
    replies[#replies + 1] = has_sequel(prefix, id) and 2 or 1
    if outcome == 'finished' then
      local fields = entry(1, 'return_value', payload, id, execution)
      close_job(prefix, queue, id, 'finished', seconds(ttls[1], result_ttl), now, fields)
      successes = successes + 1
    else
      failures = failures + 1
      local again = outcome == 'retry' and try_again(prefix, queue, id)
      if again then
        replies[#replies] = again == 'scheduled' and has_rate_limit(prefix, id) and 2 or 1
      else
        local fields = entry(2, 'exc_string', payload, id, execution)
        close_job(prefix, queue, id, 'failed', seconds(ttls[2], failure_ttl), now, fields)
      end
    end
    if replies[#replies] == 2 then
      note_sequel(prefix, queue, id)
    end
    work_s = work_s + tonumber(ARGV[i + 5])
  end
  end_execution(prefix, queue, id, execution, worker)
end

count(prefix, worker, 'successful_job_count', successes)
count(prefix, worker, 'failed_job_count', failures)
count(prefix, worker, 'total_working_time', work_s)
return replies
