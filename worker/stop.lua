-- Ends a started job because somebody asked for it, as RQ does: status stopped, in the failed registry, never retried.
--
-- KEYS     none: the keys depend on the job
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the worker's name
-- ARGV[3]  the queue's name
-- ARGV[4]  the job id
-- ARGV[5]  the execution id
-- ARGV[6]  base64 of the compressed reason
-- ARGV[7]  seconds to keep a failure where the job doesn't say
--
-- Returns 0: held no longer, nothing changed; 1: stopped, now or by the same call before.

local prefix, worker, queue, id, execution = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
clear_way_for_end(prefix, queue)
local job = job_after(prefix, id, has_dependents(prefix, id))
if not holds(prefix, queue, id, execution) then
  return job.status == 'stopped' and 1 or 0
end

local created = redis.pcall('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'created_at')
created = type(created) == 'string' and created or clock()
local ttl = kept_for(job, seconds(job.failure_ttl, tonumber(ARGV[7])))
if ttl == 0 then
  delete_job(prefix, id)
else
  -- RQ 3.0 has a result type of its own for stopped jobs, but writes that of failed ones.
  append_result(prefix .. ':results:' .. id, {'type', 2, 'worker_name', worker, 'exc_string', ARGV[6],
    'execution_id', execution, 'execution_started_at', created, 'execution_ended_at', string.format('%.6f', clock())})
  close_job(prefix, id, job, 'stopped', ttl, timestamp())
  redis.call('ZADD', prefix .. ':failed:' .. queue, leaves_at(ttl, clock()), id)
  note_sequel(prefix, queue, id)
end
end_execution(prefix, queue, id, execution, worker)
count(prefix, worker, 'failed_job_count', 1)
return 1
